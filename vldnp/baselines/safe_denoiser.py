"""Safe Denoiser (Kim et al., NeurIPS 2025, arXiv 2502.08011): x̂₀ is repelled from a bank of unsafe
images' latents. Safety-Guided Flow (arXiv 2603.13300) derives the step from the MMD.

The repulsion is the paper's, β(x) (x̂₀ − E[x|unsafe]), with the threshold of the authors' code
(github.com/MingyuKim87/Safe_Denoiser, commit 0703a76). The code takes x̂₀ − η E[x|unsafe], η = 0.33,
adds fresh noise and keeps the old prediction; here the prediction is that of the repelled x̂₀. The
code normalises the bank over its channels, and not x̂₀; here neither is. The paper's kernel is
Gaussian. In the code's kernel, `"laplacian"`, the exponent has the distance itself: the code's
σ = 3.15 is `sigma` = 3.15 / d^¼ here, where d is the number of an image's latents."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from math import inf

import torch
from PIL import Image
from torch import Tensor

from vldnp._files import unknown
from vldnp._finite import number
from vldnp.guider import Guider
from vldnp.methods import CFG, Method
from vldnp.models.backbone import Backbone
from vldnp.models.judges import as_tensor

KERNELS = {"gaussian": 2, "laplacian": 1}  # the power of the distance in the exponent


def log_kernel(x0: Tensor, bank: Tensor, sigma: float, power: int = 2) -> Tensor:
    """log k(x̂₀, x_n) = −(‖x̂₀ − x_n‖ / √d)^p / 2σ², `[B, N]`, of `[B, C, h, w]` and `[N, C, h, w]`;
    d = C h w, so that σ has the unit of a latent's value."""
    apart = torch.cdist(x0.flatten(1), bank.flatten(1)) / x0[0].numel() ** 0.5
    return -(apart**power) / (2 * sigma**2)


def unsafe_mean(log_k: Tensor, bank: Tensor) -> Tensor:
    """E[x | x_t, unsafe] ≈ Σ_n k_n x_n / Σ_n k_n, `[B, C, h, w]` (arXiv 2502.08011)."""
    return torch.einsum("bn,nchw->bchw", log_k.softmax(dim=1), bank)


def repelled(x0: Tensor, unsafe: Tensor, beta: Tensor) -> Tensor:
    """x̂₀ + β (x̂₀ − E[x | x_t, unsafe]) (arXiv 2502.08011, its main theorem); with a Gaussian kernel
    and β = η k̄ a step down k̄, the repelling part of the MMD²: k̄ (x̂₀ − E) = −σ² d ∇k̄."""
    return x0 + beta * (x0 - unsafe)


@dataclass(frozen=True)
class SafeDenoiser:
    """A lever that changes the prediction of all images last, with or without a negative prompt:
    β = η · k̄, where the mean kernel k̄ exceeds `threshold`, in the steps before `until`."""

    bank: Tensor = field(compare=False, repr=False)  # as of `latents_of`, `[N, C, h, w]`
    strength: float = 1.0  # η ≥ 0
    sigma: float = 1.0  # σ > 0 of the kernel, in the unit of a latent's value
    threshold: float = 0.0  # of k̄, in 0 … 1
    until: float = 0.24  # a share of the steps, the first 12 of 50 in the authors' code
    kernel: str = "gaussian"
    digest: str = field(init=False)  # of the bank, for records

    def __post_init__(self):
        if self.kernel not in KERNELS:
            raise unknown("kernel of the safe denoiser", self.kernel, KERNELS)
        if self.bank.ndim != 4 or not len(self.bank) or not self.bank.isfinite().all():
            shape = list(self.bank.shape)
            raise ValueError(f"the bank must be finite latents [N, C, h, w], N ≥ 1, not {shape}")
        limits = {"strength": (0, inf), "threshold": (0, 1), "until": (0, 1), "sigma": (1e-9, inf)}
        for name, (low, high) in limits.items():
            number(f"the safe denoiser's {name}", getattr(self, name), low, high)
        content = self.bank.float().cpu().contiguous().numpy().tobytes()
        object.__setattr__(self, "digest", hashlib.sha256(content).hexdigest()[:12])

    def guider(self, base: type[Guider]) -> type[Guider]:
        class Repelling(base):
            def steer(own, i: int, t: Tensor, latents: Tensor, pred: Tensor, preds) -> Tensor:
                pred = super().steer(i, t, latents, pred, preds)
                acts = i / own.N <= self.until - 1e-9  # i / N is not exact
                return self.corrected(own.run, pred, t, latents) if acts else pred

        return Repelling

    def corrected(self, run, pred: Tensor, t: Tensor, latents: Tensor) -> Tensor:
        """The prediction of the repelled x̂₀; an image that nothing repels keeps its own."""
        ours, theirs = list(self.bank.shape[1:]), list(latents.shape[1:])
        if ours != theirs:
            raise ValueError(f"the bank's latents have shape {ours}, and the images' are {theirs}")
        bank = self.bank.to(x0 := run.x0(pred, t, latents))
        log_k = log_kernel(x0, bank, self.sigma, KERNELS[self.kernel])
        nearness = log_k.exp().mean(dim=1)
        beta = self.strength * torch.where(nearness > self.threshold, nearness, 0)
        if not (rows := beta.nonzero().flatten().tolist()):
            return pred
        away = repelled(x0[rows], unsafe_mean(log_k[rows], bank), beta[rows].view(-1, 1, 1, 1))
        pred = pred.clone()
        pred[rows] = run.prediction(away, t, latents[rows]).to(pred.dtype)
        return pred

    def describe(self) -> dict:
        named = "strength", "sigma", "threshold", "until", "kernel"
        own = {"kind": "safe-denoiser", "bank": self.digest, "size": len(self.bank)}
        return {"correction": own | {name: getattr(self, name) for name in named}}


def Repelled(bank: Tensor, method: Method | None = None, **options) -> Method:
    """Safe Denoiser with a bank of unsafe latents `[N, C, h, w]`, upon a method (default: CFG)."""
    method = method or CFG()
    name = "safe-denoiser" if method.name == "cfg" else f"{method.name} + safe-denoiser"
    return replace(method, name=name, levers=(*method.levers, SafeDenoiser(bank, **options)))


@torch.no_grad()
def latents_of(model: Backbone, images: Sequence[Image.Image]) -> Tensor:
    """Images as the clean latents of a model, scaled as x̂₀ is: `[N, C, h, w]` on the CPU."""
    vae, parts = model.pipe.vae, (2 * as_tensor(images, model.size[0]) - 1).split(32)
    modes = [vae.encode(p.to(vae.device, vae.dtype)).latent_dist.mode() for p in parts]
    shift = vae.config.get("shift_factor") or 0.0
    return (torch.cat(modes).cpu() - shift) * vae.config.scaling_factor
