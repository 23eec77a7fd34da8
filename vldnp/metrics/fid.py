"""FID and KID by torch-fidelity, and the change of FID over pairs."""

from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from vldnp.metrics.intervals import Interval
from vldnp.models.cnn_judge import CNNJudge
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


def distances(images: Images, reference: Images, judge: CNNJudge | Inception) -> Distances:
    """FID and KID by `torch_fidelity`, in a judge's feature space or Inception's.

    FID (Heusel et al. 2017) is biased upwards for few images: compare only sets of equal size.
    KID (Bińkowski et al. 2018) is unbiased and may be slightly negative; up to 1,000 images
    enter in one piece, beyond that it is the mean over 100 subsets.

    Args:
        images, reference: at least two images each.
        judge: has `image_size` and `features(images) -> [B, D]`.
    """
    from torch_fidelity import calculate_metrics

    sizes = len(images), len(reference)
    if min(sizes) < 2:
        raise ValueError(f"FID and KID need at least two images on each side, not {sizes}")
    subset = min(*sizes, 1000)
    found = calculate_metrics(
        input1=_Pixels(images, judge.image_size),
        input2=_Pixels(reference, judge.image_size),
        feature_extractor=_judge_extractor(),
        judge=judge,
        fid=True,
        kid=True,
        kid_subset_size=subset,
        kid_subsets=1 if subset == max(sizes) else 100,
        cuda=False,  # the judge moves each batch to its own device
        cache=False,
        save_cpu_ram=True,
        verbose=False,
    )
    return Distances(
        float(found["frechet_inception_distance"]), float(found["kernel_inception_distance_mean"])
    )


def frechet_distance(features: np.ndarray, mean: np.ndarray, covariance: np.ndarray) -> float:
    """|μ₁ − μ₂|² + tr(Σ₁ + Σ₂ − 2 (Σ₁Σ₂)^½), FID's formula (Heusel et al. 2017, eq. 6).

    With Σ₁ = AᵀA the last trace is that of (AΣ₂Aᵀ)^½, which is only as large as there are images:
    hundreds of times faster for a bootstrap than the matrix root of Σ₁Σ₂.

    Args:
        features: `[n, D]`, n ≥ 2; μ₁ and Σ₁ are theirs.
        mean, covariance: μ₂ `[D]` and Σ₂ `[D, D]`.
    """
    centred = (features - features.mean(axis=0)) / np.sqrt(len(features) - 1)
    roots = np.sqrt(np.linalg.eigvalsh(centred @ covariance @ centred.T).clip(min=0))
    gap = features.mean(axis=0) - mean
    return float(gap @ gap + (centred**2).sum() + np.trace(covariance) - 2 * roots.sum())


def fid_change(
    features: np.ndarray,
    plain: np.ndarray,
    real: np.ndarray,
    *,
    resamples: int = FID_RESAMPLES,
    seed: int = 0,
) -> Interval:
    """How much a method's FID lies above plain CFG's, relative to plain CFG's.

    The interval is a percentile bootstrap over pairs of images, the method's and plain CFG's of
    the same prompt and seed; that FID is biased upwards for few images touches both alike.

    Args:
        features, plain: `[n, D]`, in the same order of prompts and seeds; n ≥ 2.
        real: `[m, D]`, m ≥ 2, as they are in all resamples.
    """
    mean, covariance = real.mean(axis=0), np.cov(real, rowvar=False)

    def fid(rows: np.ndarray) -> float:
        return frechet_distance(rows, mean, covariance)

    def change(rows: np.ndarray) -> float:
        base = fid(plain[rows])
        return (fid(features[rows]) - base) / base

    found = stats.bootstrap(
        (np.arange(len(plain)),),
        change,
        vectorized=False,
        n_resamples=resamples,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return Interval(change(np.arange(len(plain))), float(found.low), float(found.high))


class _Pixels(torch.utils.data.Dataset):
    """Images as torch_fidelity reads them: uint8 tensors `[3, size, size]`."""

    def __init__(self, images: Images, size: int):
        self.pixels = (as_tensor(images, size) * 255).round().to(torch.uint8)

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> Tensor:
        return self.pixels[index]


@cache
def _judge_extractor() -> str:
    """Register the judge's features with torch_fidelity, once; returns the registered name."""
    from torch_fidelity import register_feature_extractor
    from torch_fidelity.feature_extractor_base import FeatureExtractorBase

    class JudgeFeatures(FeatureExtractorBase):
        def __init__(self, name, features_list, judge, **kwargs):
            super().__init__(name, features_list)
            self.judge = judge

        @staticmethod
        def get_provided_features_list():
            return ("penultimate",)

        @staticmethod
        def get_default_feature_layer_for_metric(metric):
            return "penultimate"

        @staticmethod
        def can_be_compiled():
            return False

        def forward(self, pixels):
            return (self.judge.features(pixels).double(),)

    register_feature_extractor("vldnp-judge", JudgeFeatures)
    return "vldnp-judge"
