"""Guidance: from the predictions of one step to one prediction, an equation each.

All predictions are `[B, C, h, w]` and of one kind (noise, velocity, …): the equations are made of
differences between predictions, weighted, so they mean the same for every kind. Safe Latent
Diffusion alone compares differences with a threshold, which the paper chose for noise predictions.
`guidance_scale` and `omega` are numbers, or tensors that broadcast, such as `[B, 1, 1, 1]` for one
value per image.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor

from vldnp.files import unknown
from vldnp.finite import is_finite

Scale = float | Tensor
Rule = Callable[[Tensor, Tensor, Tensor, Scale, float], Tensor]


def cfg(pred_uncond: Tensor, pred_cond: Tensor, guidance_scale: Scale) -> Tensor:
    """Classifier-free guidance, ε_u + g (ε_c − ε_u) (Ho & Salimans 2022, arXiv 2207.12598)."""
    return pred_uncond + guidance_scale * (pred_cond - pred_uncond)


def added(pred_cfg: Tensor, pred_neg: Tensor, pred_uncond: Tensor, omega: float) -> Tensor:
    """The negative term of VL-DNP, ε_cfg − ω (ε_n − ε_u) (arXiv 2510.26052)."""
    return pred_cfg - omega * (pred_neg - pred_uncond)


def replaced(pred_neg: Tensor, pred_cond: Tensor, guidance_scale: Scale) -> Tensor:
    """The usual negative prompt, ε_n + g (ε_c − ε_n): ε_n stands where CFG has ε_u.

    Its strength is tied to g. It needs no ε_u, which the sampler evaluates all the same, because
    x̂₀ always comes from ε_cfg; a pipeline that does only this spends two evaluations a step.
    """
    return cfg(pred_neg, pred_cond, guidance_scale)


def composable_not(
    pred_uncond: Tensor, pred_cond: Tensor, pred_neg: Tensor, guidance_scale: Scale
) -> Tensor:
    """Concept negation, ε_u + g (ε_c − ε_n) (Liu et al. 2022, arXiv 2206.01714, section NOT).

    Its strength is tied to g too: it is `added` with ω = g.
    """
    return pred_uncond + guidance_scale * (pred_cond - pred_neg)


def perpendicular(vector: Tensor, to: Tensor) -> Tensor:
    """v − (⟨v, p⟩ / ‖p‖²) p for each image: what of v is at right angles to p.

    Both are `[B, …]`. Where p is zero, v is returned as it is.
    """
    dims = tuple(range(1, to.ndim))
    along = (vector * to).sum(dims, keepdim=True)
    squared_norm = (to * to).sum(dims, keepdim=True)
    return vector - torch.where(squared_norm > 0, along / squared_norm, 0) * to


def perp_neg(
    pred_uncond: Tensor, pred_cond: Tensor, pred_neg: Tensor, guidance_scale: Scale, omega: float
) -> Tensor:
    """Perp-Neg, ε_cfg − ω (ε_n − ε_u)^⊥ (Armandpour et al. 2023, arXiv 2304.04968, Perp-Neg).

    ⊥ takes what is perpendicular to ε_c − ε_u, so that nothing of the prompt itself is undone.
    The paper weights the term with g·w; here ω = g·w, so that ω compares with that of `added`.
    """
    pos, neg = pred_cond - pred_uncond, pred_neg - pred_uncond
    return pred_uncond + guidance_scale * pos - omega * perpendicular(neg, pos)


def sld_scale(pred_cond: Tensor, pred_neg: Tensor, scale: float, threshold: float) -> Tensor:
    """μ of Safe Latent Diffusion, for every element (arXiv 2211.05105, eqs. 5 and 6).

    μ = min(1, |φ|) where ε_c − ε_n < λ, else 0, with φ = s_S (ε_c − ε_n). The paper prints a
    maximum, its authors' code takes the minimum; only that keeps μ ≤ 1 as the text describes.
    """
    apart = pred_cond - pred_neg
    return torch.where(apart < threshold, (scale * apart).abs().clamp(max=1), 0)


@dataclass(frozen=True)
class SLD:
    """Safe Latent Diffusion (Schramowski et al., CVPR 2023, arXiv 2211.05105, eqs. 3 to 8).

    γ_t = μ (ε_n − ε_u) + s_m ν_t, the momentum goes on as ν_{t+1} = β_m ν_t + (1 − β_m) γ_t, and
    the prediction is ε_u + g (ε_c − ε_u − γ_t), without γ_t in the first δ steps, in which the
    momentum already builds up. It has no ω. As μ jumps at λ, rounding errors may grow more than
    under the other rules.

    Attributes:
        scale: s_S ≥ 0; at 0 this is plain CFG.
        warmup: δ, in steps of 50; scaled to the run's number of steps.
        threshold: λ.
        momentum_scale, momentum_beta: s_m and β_m, in 0..1.
    """

    scale: float = 1000.0
    warmup: float = 10.0
    threshold: float = 0.01
    momentum_scale: float = 0.3
    momentum_beta: float = 0.4

    def __post_init__(self):
        for name, value in asdict(self).items():
            limit = 1 if name.startswith("momentum") else float("inf")
            if not (is_finite(value) and 0 <= value <= limit):
                raise ValueError(
                    f"SLD's {name} must be a finite number from 0 to {limit}, not {value!r}"
                )

    def __call__(self, pred_uncond, pred_cond, pred_neg, guidance_scale, omega=None) -> Tensor:
        """One step on its own: after the warm-up, without momentum."""
        memory = torch.zeros_like(pred_uncond)
        return self.step(pred_uncond, pred_cond, pred_neg, guidance_scale, None, memory, 1.0)[0]

    def step(
        self,
        pred_uncond: Tensor,
        pred_cond: Tensor,
        pred_neg: Tensor,
        guidance_scale: Scale,
        omega: None,
        momentum: Tensor,
        progress: float,
    ) -> tuple[Tensor, Tensor]:
        """The prediction, and the momentum ν for the image's next step. See `remembering`."""
        mu = sld_scale(pred_cond, pred_neg, self.scale, self.threshold)
        gamma = mu * (pred_neg - pred_uncond) + self.momentum_scale * momentum
        momentum = self.momentum_beta * momentum + (1 - self.momentum_beta) * gamma
        if 50 * progress < self.warmup - 1e-9:  # i / N is not exact
            gamma = torch.zeros_like(gamma)
        pred = pred_uncond + guidance_scale * (pred_cond - pred_uncond - gamma)
        return pred.to(pred_uncond.dtype), momentum  # the memory may be the more precise

    def describe(self) -> dict:
        return {"kind": "sld", **asdict(self)}


SLD_STRENGTHS: dict[str, SLD] = {
    "weak": SLD(200.0, 15.0, 0.0, 0.0, 0.0),
    "medium": SLD(1000.0, 10.0, 0.01, 0.3, 0.4),
    "strong": SLD(2000.0, 7.0, 0.025, 0.5, 0.7),
    "max": SLD(5000.0, 0.0, 1.0, 0.5, 0.7),
}
"""The paper's four settings. (diffusers' pipeline had 20 for the weak scale, the paper has 200.)"""


def sld(strength: str = "medium", **changes: float) -> SLD:
    """One of the paper's four settings, with some of its hyper-parameters changed.

    Raises:
        ValueError: an unknown strength, or a hyper-parameter out of its range.
    """
    if strength not in SLD_STRENGTHS:
        raise unknown("SLD strength", strength, SLD_STRENGTHS)
    return replace(SLD_STRENGTHS[strength], **changes)


RULES: dict[str, Rule] = {
    "added": lambda uncond, cond, neg, g, omega: added(cfg(uncond, cond, g), neg, uncond, omega),
    "replaced": lambda uncond, cond, neg, g, omega: replaced(neg, cond, g),
    "composable-not": lambda uncond, cond, neg, g, omega: composable_not(uncond, cond, neg, g),
    "perp-neg": perp_neg,
    **{f"sld-{strength}": setting for strength, setting in SLD_STRENGTHS.items()},
}
"""name → rule(pred_uncond, pred_cond, pred_neg, guidance_scale, omega) → prediction.

A rule sees only the images that have a negative prompt now. A `Method` takes one of these names
or any callable with this signature. A rule that remembers something from step to step has a
method `step` besides; see `remembering`.
"""


def rule(name_or_callable: str | Rule) -> Rule:
    """The rule of that name, or the callable itself.

    Raises:
        ValueError: an unknown name.
    """
    if callable(name_or_callable):
        return name_or_callable
    if name_or_callable not in RULES:
        raise unknown("guidance rule", name_or_callable, RULES)
    return RULES[name_or_callable]


def has_omega(name_or_callable: str | Rule) -> bool:
    """Whether ω has a part in the rule's equation."""
    without = ("replaced", "composable-not")
    return name_or_callable not in without and not isinstance(rule(name_or_callable), SLD)


def remembering(name_or_callable: str | Rule) -> Callable[..., tuple[Tensor, Tensor]]:
    """A rule in the form that the sampler calls: what it remembers goes in and comes out.

    `step(pred_uncond, pred_cond, pred_neg, guidance_scale, omega, memory, progress)` gives the
    prediction and the new memory: a tensor as large as the predictions, of zeros before the first
    step. An image that has no negative prompt in a step keeps its memory. `progress` is i / N.
    Most rules remember nothing and hand the memory on.
    """
    chosen = rule(name_or_callable)
    if hasattr(chosen, "step"):
        return chosen.step

    def step(pred_uncond, pred_cond, pred_neg, guidance_scale, omega, memory, progress):
        return chosen(pred_uncond, pred_cond, pred_neg, guidance_scale, omega), memory

    return step
