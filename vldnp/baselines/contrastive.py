"""Contrastive CFG as a guidance rule: the term shrinks as ε_n moves away from ε_u."""

from dataclasses import dataclass

import torch

from vldnp._finite import number
from vldnp.guidance import Rule, cfg


@dataclass(frozen=True)
class Contrastive(Rule):
    """ε_cfg − ω λ (ε_n − ε_u) with λ = 2 / (1 + exp(τ ‖ε_n − ε_u‖²)): the negative term of Chang et
    al. 2024, arXiv 2411.17077. The positive term is CFG's, as with `naive_positive_cfg` in the
    authors' code, which has this τ, and g for ω. The norm is over all latents of an image, so λ → 0
    for latents of many dimensions: choose τ accordingly."""

    tau: float = 0.2
    uses_omega = True

    def __post_init__(self):
        number("tau", self.tau, 0)

    def step(self, pred_uncond, pred_cond, pred_neg, guidance_scale, omega, state, progress):
        neg = pred_neg.squeeze(1) - pred_uncond
        squared = (neg.float() ** 2).sum(dim=tuple(range(1, neg.ndim)), keepdim=True)
        weight = 2 * torch.sigmoid(-self.tau * squared).to(neg.dtype)
        return cfg(pred_uncond, pred_cond, guidance_scale) - omega * weight * neg, state

    def describe(self) -> dict:
        return {"kind": "contrastive", "tau": self.tau}
