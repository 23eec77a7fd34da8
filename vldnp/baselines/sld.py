"""Safe Latent Diffusion (Schramowski et al., CVPR 2023, arXiv 2211.05105) as a guidance rule."""

from dataclasses import asdict, dataclass, replace
from math import inf

import torch

from vldnp import negatives
from vldnp._files import unknown
from vldnp._finite import number
from vldnp.guidance import Rule
from vldnp.methods import Method


@dataclass(frozen=True)
class SLDRule(Rule):
    """γ_t = μ (ε_n − ε_u) + s_m ν_t; ε = ε_u + g (ε_c − ε_u − γ_t) (eqs. 3 to 8), with the momentum
    ν_{t+1} = β_m ν_t + (1 − β_m) γ_t; in the first δ steps γ_t only builds up ν. μ is min(1,
    s_S |ε_c − ε_n|) where ε_c − ε_n < λ, chosen for noise predictions, and else 0. The paper prints
    a maximum; the authors' code takes the minimum."""

    scale: float = 1000.0  # s_S ≥ 0; at 0 this is CFG
    warmup: float = 10.0  # δ, in steps of 50; scaled to the run's number of steps
    threshold: float = 0.01  # λ
    momentum_scale: float = 0.3  # s_m and β_m, in 0..1
    momentum_beta: float = 0.4
    uses_omega = False

    def __post_init__(self):
        for name, value in asdict(self).items():
            number(f"SLD's {name}", value, 0, 1 if name.startswith("momentum") else inf)

    def step(self, pred_uncond, pred_cond, pred_neg, guidance_scale, omega, momentum, progress):
        neg = pred_neg.squeeze(1)
        apart = pred_cond - neg
        mu = torch.where(apart < self.threshold, (self.scale * apart).abs().clamp(max=1), 0)
        gamma = mu * (neg - pred_uncond) + self.momentum_scale * momentum
        momentum = self.momentum_beta * momentum + (1 - self.momentum_beta) * gamma
        if 50 * progress < self.warmup - 1e-9:  # i / N is not exact
            gamma = torch.zeros_like(gamma)
        pred = pred_uncond + guidance_scale * (pred_cond - pred_uncond - gamma)
        return pred.to(pred_uncond.dtype), momentum  # the state may be more precise

    def describe(self) -> dict:
        return {"kind": "sld", **asdict(self)}


STRENGTHS = {"weak": SLDRule(200.0, 15.0, 0.0, 0.0, 0.0), "medium": SLDRule()}
STRENGTHS["strong"] = SLDRule(2000.0, 7.0, 0.025, 0.5, 0.7)
STRENGTHS["max"] = SLDRule(5000.0, 0.0, 1.0, 0.5, 0.7)
"""The paper's four settings. (diffusers' pipeline had 20 for the weak scale, the paper has 200.)"""


def sld(strength: str = "medium", **changes: float) -> SLDRule:
    """One of `STRENGTHS`, with some of its hyper-parameters changed."""
    if strength not in STRENGTHS:
        raise unknown("SLD strength", strength, STRENGTHS)
    return replace(STRENGTHS[strength], **changes)


def SLD(negative_prompt: str, strength: str = "medium", **changes: float) -> Method:
    """Safe Latent Diffusion with the safety concept `negative_prompt`; see `sld`."""
    rule = sld(strength, **changes)
    policy = negatives.Static(negative_prompt) if rule.scale else negatives.Policy()
    return Method(f"sld-{strength}", policy, rule)
