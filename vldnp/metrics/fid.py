"""FID and KID by torch-fidelity, and the change of FID over pairs."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from scipy import stats
from torch import Tensor

from moji.judge import CNNJudge
from vldnp.metrics.intervals import Interval
from vldnp.models.judges import Images, as_tensor

FID_RESAMPLES = 200


class Inception:
    """The usual feature space of FID: Inception v3's last pooling, as `torch_fidelity` has it.

    Args:
        network: torch_fidelity's `FeatureExtractorInceptionV3`; the default fetches its weights.

    Raises:
        OSError: they are not here and cannot be fetched.
    """

    name, image_size = "inception-v3", 299

    def __init__(self, network: torch.nn.Module | None = None, device="cpu"):
        if network is None:
            from torch_fidelity.feature_extractor_inceptionv3 import (
                URL_INCEPTION_V3,
                FeatureExtractorInceptionV3,
            )

            # torch_fidelity itself checks neither the file's hash nor what is pickled in it.
            torch.hub.load_state_dict_from_url(
                URL_INCEPTION_V3, progress=False, check_hash=True, weights_only=True
            )
            network = FeatureExtractorInceptionV3(self.name, ["2048"])
        self.network = network.to(device).eval()

    @torch.inference_mode()
    def features(self, pixels: Tensor) -> Tensor:
        """uint8 `[B, 3, H, W]` → `[B, 2048]` on the CPU."""
        device = next(self.network.parameters()).device
        return torch.cat([self.network(x.to(device))[0].cpu() for x in pixels.split(64)])


class Distances(NamedTuple):
    """Distances between two sets of images in a feature space."""

    fid: float
    kid: float


def features(images: Images, space: CNNJudge | Inception) -> Tensor:
    """What a judge or Inception sees in images: `[n, D]`, float64, on the CPU.

    Args:
        images: any number of them.
        space: has `image_size` and `features(uint8 images) -> [B, D]`, here of 64 images at a time.
    """
    pixels = (as_tensor(images, space.image_size) * 255).round().to(torch.uint8)
    return torch.cat([space.features(part) for part in pixels.split(64)]).cpu().double()


def distances(images: Tensor, reference: Tensor) -> Distances:
    """FID and KID by `torch_fidelity` between the features of images and of real ones.

    FID (Heusel et al. 2017) is biased upwards for few images: compare only sets of equal size.
    KID (Bińkowski et al. 2018) is unbiased and may be slightly negative; up to 1,000 images
    enter in one piece, beyond that it is the mean over 100 subsets.

    Args:
        images, reference: `[n, D]` and `[m, D]`, as `features` gives them; at least two rows each.
    """
    from torch_fidelity import metric_fid, metric_kid

    sizes = len(images), len(reference)
    if min(sizes) < 2:
        raise ValueError(f"FID and KID need at least two images on each side, not {sizes}")
    subset = min(*sizes, 1000)
    fid = metric_fid.fid_statistics_to_metric(
        *map(metric_fid.fid_features_to_statistics, (images, reference)), verbose=False
    )
    kid = metric_kid.kid_features_to_metric(
        images,
        reference,
        kid_subset_size=subset,
        kid_subsets=1 if subset == max(sizes) else 100,
        verbose=False,
    )
    return Distances(fid[metric_fid.KEY_METRIC_FID], kid[metric_kid.KEY_METRIC_KID_MEAN])


def frechet_distance(features: np.ndarray, mean: np.ndarray, root: np.ndarray) -> float:
    """|μ₁ − μ₂|² + tr(Σ₁ + Σ₂ − 2 (Σ₁Σ₂)^½), FID's formula (Heusel et al. 2017, eq. 6).

    With Σ₁ = AᵀA and Σ₂ = BBᵀ the last trace is the sum of AB's singular values: hundreds of times
    faster for a bootstrap than the matrix root of Σ₁Σ₂, for few images and for many.

    Args:
        features: `[n, D]`, n ≥ 2; μ₁ and Σ₁ are theirs.
        mean, root: μ₂ `[D]` and B `[D, D]`, as `root_of` gives it.
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
    features: np.ndarray,
    plain: np.ndarray,
    real: np.ndarray,
    prompts: Sequence | None = None,
    *,
    resamples: int = FID_RESAMPLES,
    seed: int = 0,
) -> Interval:
    """How much a method's FID lies above plain CFG's.

    The interval is a percentile bootstrap over prompts, each with the method's images and plain
    CFG's; that FID is biased upwards for few images touches both alike.

    Args:
        features, plain: `[n, D]`, in the same order of prompts and seeds; n ≥ 2.
        real: `[m, D]`, m ≥ 2, as they are in all resamples.
        prompts: the prompt of each row; by default each row has its own.
    """
    mean, root = real.mean(axis=0), root_of(np.cov(real, rowvar=False))
    of_prompt = pd.Series(np.arange(len(plain))).groupby(
        np.arange(len(plain)) if prompts is None else np.asarray(prompts)
    )
    rows_of = [rows.to_numpy() for _, rows in of_prompt]

    def change(drawn: np.ndarray) -> float:
        rows = np.concatenate([rows_of[i] for i in drawn])
        return frechet_distance(features[rows], mean, root) - frechet_distance(
            plain[rows], mean, root
        )

    found = stats.bootstrap(
        (np.arange(len(rows_of)),),
        change,
        vectorized=False,
        n_resamples=resamples,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return Interval(change(np.arange(len(rows_of))), float(found.low), float(found.high))
