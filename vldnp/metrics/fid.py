"""FID by torch-fidelity, in any space with a `name` and `features(images) -> [n, D]`."""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from vldnp._files import unknown

RESIZES = ("torch-fidelity", "bicubic")
"""Filters to 299 × 299: torch-fidelity's own, of its network; bicubic with antialiasing."""


class Inception:
    """FID's usual space: Inception v3's last pooling, as `torch_fidelity` has it; see `RESIZES`."""

    def __init__(self, network: torch.nn.Module | None = None, device="cpu", resize=RESIZES[0]):
        if resize not in RESIZES:
            raise unknown("resize", resize, RESIZES)
        if network is None:
            from torch_fidelity import feature_extractor_inceptionv3 as inception

            # torch_fidelity checks neither the file's hash nor its pickled content.
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
            images = [torch.cat(images)] if len({image.shape for image in images}) == 1 else images
        parts = images.split(64) if isinstance(images, Tensor) else images
        return torch.cat([self.network(self._bytes(part).to(device))[0].cpu() for part in parts])

    def _bytes(self, pixels: Tensor) -> Tensor:
        if self.resize == "bicubic":
            pixels = pixels if pixels.is_floating_point() else pixels / 255
            pixels = interpolate(pixels, (299, 299), mode="bicubic", antialias=True)
        return (pixels.clamp(0, 1) * 255).round().byte() if pixels.is_floating_point() else pixels


def features(images: Sequence[Image.Image] | Tensor, space) -> Tensor:
    """Features of images, 64 at a time: `[n, D]`, float64, on the CPU."""
    parts = (images[start : start + 64] for start in range(0, len(images), 64))
    return torch.cat([space.features(part) for part in parts]).cpu().double()


def fid(images: Tensor, reference: Tensor) -> float:
    """FID (Heusel et al. 2017) between features `[n, D]`. FID is biased upwards for few images:
    compare only sets of equal size."""
    from torch_fidelity import metric_fid

    if (least := min(len(images), len(reference))) < 2:
        raise ValueError(f"FID needs at least two images on each side, not {least}")
    statistics = map(metric_fid.fid_features_to_statistics, (images, reference))
    found = metric_fid.fid_statistics_to_metric(*statistics, verbose=False)
    return found[metric_fid.KEY_METRIC_FID]
