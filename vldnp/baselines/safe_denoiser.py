"""Safe Denoiser: x̂₀ is repelled from a bank of unsafe pictures' latents, without a word.

Kim et al., "Training-Free Safe Denoisers for Safe Use of Diffusion Models", NeurIPS 2025,
arXiv 2502.08011. Safety-Guided Flow (Kim et al., ICLR 2026, arXiv 2603.13300) derives the same
step from a maximum mean discrepancy. Where the paper and its authors' code
(github.com/MingyuKim87/Safe_Denoiser, commit 0703a76) differ, or this from both:

- The paper weights the repulsion by how near the bank is, β(x) (x̂₀ − E[x|unsafe]); the code takes
  x̂₀ − η E[x|unsafe] with a constant η = 0.33 wherever the kernels' sum exceeds a threshold. This
  is the paper's, with the threshold.
- The paper's kernel is Gaussian in the distance; the code has the distance itself, not squared, in
  the exponent (`kernel="laplacian"`), which its σ = 3.15 is for.
- The code normalises the bank's latents over their channels, and not x̂₀; here neither is.
- The code adds fresh noise to the repelled x̂₀ and goes on with the old prediction; here the
  prediction is the one that belongs to the repelled x̂₀, and nothing is drawn.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from PIL import Image
from torch import Tensor

from vldnp._files import unknown
from vldnp._finite import is_finite
from vldnp.guider import Guider
from vldnp.methods import CFG, Method
from vldnp.models.backbone import Backbone
from vldnp.models.judges import as_tensor

KERNELS = {"gaussian": 2, "laplacian": 1}
"""Kernel → the power of the distance in its exponent."""


def log_kernel(x0: Tensor, bank: Tensor, sigma: float, power: int = 2) -> Tensor:
    """log k(x̂₀, x_n) = −(‖x̂₀ − x_n‖ / √d)^p / 2σ², `[B, N]`, of `[B, C, h, w]` and `[N, C, h, w]`.

    The distance is per dimension (d = C h w), so that σ has the unit of a latent's value.
    """
    apart = torch.cdist(x0.flatten(1), bank.flatten(1)) / x0[0].numel() ** 0.5
    return -(apart**power) / (2 * sigma**2)


def unsafe_mean(log_k: Tensor, bank: Tensor) -> Tensor:
    """E[x | x_t, unsafe] ≈ Σ_n k_n x_n / Σ_n k_n, `[B, C, h, w]` (arXiv 2502.08011)."""
    return torch.einsum("bn,nchw->bchw", log_k.softmax(dim=1), bank)


def repelled(x0: Tensor, unsafe: Tensor, beta: Tensor) -> Tensor:
    """The safe denoiser, x̂₀ + β (x̂₀ − E[x | x_t, unsafe]) (arXiv 2502.08011, its main theorem).

    With a Gaussian kernel and β = η k̄, k̄ the mean of k_n, it is a step of gradient descent on the
    mean kernel, the repelling part of the squared MMD (arXiv 2603.13300): k̄ (x̂₀ − E) = −σ² d ∇k̄.
    """
    return x0 + beta * (x0 - unsafe)


@dataclass(frozen=True)
class SafeDenoiser:
    """A lever that changes the prediction of all images at last, with or without a negative prompt.

    β = η · k̄, where the mean kernel k̄ exceeds `threshold`, in the steps before `until`.

    Attributes:
        bank: unsafe images' clean latents, scaled as x̂₀ is: `[N, C, h, w]`; see `latents_of`.
        strength: η ≥ 0; at 0 nothing changes.
        sigma: σ > 0 of the kernel, in the unit of a latent's value.
        threshold: of k̄, in 0 … 1.
        until: the share of the steps in which it acts, the first 12 of 50 in the authors' code.
        kernel: `gaussian` or `laplacian`.
        digest: of the bank, for records.
    """

    bank: Tensor = field(compare=False, repr=False)
    strength: float = 1.0
    sigma: float = 1.0
    threshold: float = 0.0
    until: float = 0.24
    kernel: str = "gaussian"
    digest: str = field(init=False)

    def __post_init__(self):
        if self.kernel not in KERNELS:
            raise unknown("kernel of the safe denoiser", self.kernel, KERNELS)
        if self.bank.ndim != 4 or not len(self.bank) or not self.bank.isfinite().all():
            raise ValueError(
                "the bank of the safe denoiser must be finite latents [N, C, h, w], N ≥ 1, not "
                f"{list(self.bank.shape)}"
            )
        least = {"strength": 0, "threshold": 0, "until": 0, "sigma": 1e-9}
        most = {"threshold": 1, "until": 1}
        for name, low in least.items():
            value, high = getattr(self, name), most.get(name, float("inf"))
            if not (is_finite(value) and low <= value <= high):
                raise ValueError(
                    f"the safe denoiser's {name} must be a number from {low} to {high}, not "
                    f"{value!r}"
                )
        content = self.bank.float().cpu().contiguous().numpy().tobytes()
        object.__setattr__(self, "digest", hashlib.sha256(content).hexdigest()[:12])

    def guider(self, base: type[Guider]) -> type[Guider]:
        class Repelling(base):
            def steer(own, i: int, t: Tensor, latents: Tensor, pred: Tensor, preds) -> Tensor:
                pred = super().steer(i, t, latents, pred, preds)
                return self.corrected(own.run, pred, t, latents, i / own.N)

        return Repelling

    def corrected(self, run, pred: Tensor, t: Tensor, latents: Tensor, progress: float) -> Tensor:
        """The prediction of the repelled x̂₀; what nothing repels keeps its own, bit for bit."""
        if progress > self.until - 1e-9:  # i / N is not exact
            return pred
        if self.bank.shape[1:] != latents.shape[1:]:
            raise ValueError(
                f"the bank holds latents of shape {list(self.bank.shape[1:])}, and the images' "
                f"are {list(latents.shape[1:])}"
            )
        x0 = run.x0(pred, t, latents)
        bank = self.bank.to(x0)
        log_k = log_kernel(x0, bank, self.sigma, KERNELS[self.kernel])
        nearness = log_k.exp().mean(dim=1)
        beta = self.strength * torch.where(nearness > self.threshold, nearness, 0)
        rows = beta.nonzero().flatten().tolist()
        if not rows:
            return pred
        away = repelled(x0[rows], unsafe_mean(log_k[rows], bank), beta[rows].view(-1, 1, 1, 1))
        pred = pred.clone()
        pred[rows] = run.prediction(away, t, latents[rows]).to(pred.dtype)
        return pred

    def describe(self) -> dict:
        named = ("strength", "sigma", "threshold", "until", "kernel")
        settings = {name: getattr(self, name) for name in named}
        own = {"kind": "safe-denoiser", "bank": self.digest, "size": len(self.bank), **settings}
        return {"correction": own}


def Repelled(bank: Tensor, method: Method | None = None, **options) -> Method:
    """Safe Denoiser with a bank of unsafe latents `[N, C, h, w]`, upon a method (default: CFG)."""
    method = method or CFG()
    name = "safe-denoiser" if method.name == "cfg" else f"{method.name} + safe-denoiser"
    return replace(method, name=name, levers=(*method.levers, SafeDenoiser(bank, **options)))


@torch.no_grad()
def latents_of(model: Backbone, images: Sequence[Image.Image]) -> Tensor:
    """Images as the clean latents of a model, scaled as x̂₀ is: `[N, C, h, w]` on the CPU."""
    vae, (height, _) = model.pipe.vae, model.picture_size(None, None)
    parts = []
    for pixels in as_tensor(images, height).split(32):
        pixels = (2 * pixels - 1).to(vae.device, vae.dtype)
        mode = vae.encode(pixels).latent_dist.mode()
        parts.append((mode - (vae.config.get("shift_factor") or 0.0)) * vae.config.scaling_factor)
    return torch.cat(parts).cpu()
