"""FID and KID by torch-fidelity, and the change of FID over pairs.

A feature space is any object with `features(images) -> [n, D]`; images as those of judges.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from PIL import Image
from scipy import stats
from torch import Tensor
from torch.nn.functional import interpolate

from vldnp._files import unknown
from vldnp.metrics.intervals import Interval

RESIZES = ("torch-fidelity", "bicubic")
"""Filters to 299 × 299: torch-fidelity's own, of its network; bicubic with antialiasing."""


class Inception:
    """The usual feature space of FID: Inception v3's last pooling, as `torch_fidelity` has it, with
    its weights; `resize` is one of `RESIZES`."""

    def __init__(self, network: torch.nn.Module | None = None, device="cpu", resize=RESIZES[0]):
        if resize not in RESIZES:
            raise unknown("resize", resize, RESIZES)
        if network is None:
            from torch_fidelity import feature_extractor_inceptionv3 as inception

            # torch_fidelity itself checks neither the file's hash nor what is pickled in it.
            torch.hub.load_state_dict_from_url(
                inception.URL_INCEPTION_V3, progress=False, check_hash=True, weights_only=True
            )
            network = inception.FeatureExtractorInceptionV3("inception-v3", ["2048"])
        self.network, self.resize = network.to(device).eval(), resize
        self.name = f"inception-v3, {resize}"

    @torch.inference_mode()
    def features(self, images: Sequence[Image.Image] | Tensor) -> Tensor:
        """Images of any sizes → `[n, 2048]` on the CPU."""
        device = next(self.network.parameters()).device
        if not isinstance(images, Tensor):
            arrays = [torch.from_numpy(np.array(image.convert("RGB"))) for image in images]
            images = [array.permute(2, 0, 1)[None] for array in arrays]
            alike = len({image.shape for image in images}) == 1
            images = [torch.cat(images)] if alike else images
        parts = images.split(64) if isinstance(images, Tensor) else images
        return torch.cat([self.network(self._bytes(part).to(device))[0].cpu() for part in parts])

    def _bytes(self, pixels: Tensor) -> Tensor:
        if self.resize == "bicubic":
            pixels = pixels if pixels.is_floating_point() else pixels / 255
            pixels = interpolate(pixels, (299, 299), mode="bicubic", antialias=True)
        return (pixels.clamp(0, 1) * 255).round().byte() if pixels.is_floating_point() else pixels


class Distances(NamedTuple):
    fid: float
    kid: float


def features(images: Sequence[Image.Image] | Tensor, space) -> Tensor:
    """Features of images, 64 at a time: `[n, D]`, float64, on the CPU."""
    parts = (images[start : start + 64] for start in range(0, len(images), 64))
    return torch.cat([space.features(part) for part in parts]).cpu().double()


def distances(images: Tensor, reference: Tensor) -> Distances:
    """FID and KID by `torch_fidelity` between the features of images and of real ones, two or more.

    FID (Heusel et al. 2017) is biased upwards for few images: compare only sets of equal size.
    KID (Bińkowski et al. 2018) is unbiased and may be slightly negative; beyond 1,000 images it is
    the mean over 100 subsets.
    """
    from torch_fidelity import metric_fid, metric_kid

    sizes = len(images), len(reference)
    if min(sizes) < 2:
        raise ValueError(f"FID and KID need at least two images on each side, not {sizes}")
    subset = min(*sizes, 1000)
    statistics = map(metric_fid.fid_features_to_statistics, (images, reference))
    fid = metric_fid.fid_statistics_to_metric(*statistics, verbose=False)
    subsets = {"kid_subset_size": subset, "kid_subsets": 1 if subset == max(sizes) else 100}
    kid = metric_kid.kid_features_to_metric(images, reference, **subsets, verbose=False)
    return Distances(fid[metric_fid.KEY_METRIC_FID], kid[metric_kid.KEY_METRIC_KID_MEAN])


def frechet_distance(features: np.ndarray, mean: np.ndarray, root: np.ndarray) -> float:
    """|μ₁ − μ₂|² + tr(Σ₁ + Σ₂ − 2 (Σ₁Σ₂)^½), FID's formula (Heusel et al. 2017, eq. 6).

    With Σ₁ = AᵀA and Σ₂ = BBᵀ the last trace is the sum of AB's singular values, which is faster.
    μ₁ and Σ₁ are of `features` `[n, D]`, `mean` is μ₂ `[D]`, `root` is B `[D, D]` (`root_of`).
    """
    centred = (features - features.mean(axis=0)) / np.sqrt(len(features) - 1)
    shared = np.linalg.svd(centred @ root, compute_uv=False).sum()
    gap = features.mean(axis=0) - mean
    return float(gap @ gap + (centred**2).sum() + (root**2).sum() - 2 * shared)


def root_of(covariance: np.ndarray) -> np.ndarray:
    """B `[D, D]` with BBᵀ = Σ."""
    values, vectors = np.linalg.eigh(covariance)
    return vectors * np.sqrt(values.clip(min=0))


def fid_change(
    features: np.ndarray, plain: np.ndarray, real: np.ndarray, prompts=None, *, resamples=200
) -> Interval:
    """How much a method's FID lies above CFG's, with a percentile bootstrap over prompts.

    That FID is biased upwards for few images touches both alike. `features` and `plain` `[n, D]`
    have the same order of prompts and seeds; by default each row has a prompt of its own.
    """
    mean, root = real.mean(axis=0), root_of(np.cov(real, rowvar=False))
    numbers = np.arange(len(plain))
    groups = pd.Series(numbers).groupby(numbers if prompts is None else np.asarray(prompts))
    rows_of = [rows.to_numpy() for _, rows in groups]

    def change(drawn: np.ndarray) -> float:
        rows = np.concatenate([rows_of[i] for i in drawn])
        own, other = (frechet_distance(side[rows], mean, root) for side in (features, plain))
        return own - other

    sample, rng = np.arange(len(rows_of)), np.random.default_rng(0)
    how = {"n_resamples": resamples, "method": "percentile", "vectorized": False}
    found = stats.bootstrap((sample,), change, **how, rng=rng).confidence_interval
    return Interval(change(sample), float(found.low), float(found.high))
