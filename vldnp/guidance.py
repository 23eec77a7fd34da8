"""Guidance: from the predictions of one step to one prediction, an equation each.

All predictions are `[B, C, h, w]` and of one kind (noise, velocity, …): the equations are linear
with weights that sum to one, so they mean the same for every kind. `guidance_scale` and `omega`
are numbers, or tensors that broadcast, such as `[B, 1, 1, 1]` for one value per image.
"""

from collections.abc import Callable

from torch import Tensor

from vldnp.files import unknown

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


RULES: dict[str, Rule] = {
    "added": lambda uncond, cond, neg, g, omega: added(cfg(uncond, cond, g), neg, uncond, omega),
    "replaced": lambda uncond, cond, neg, g, omega: replaced(neg, cond, g),
}
"""name → rule(pred_uncond, pred_cond, pred_neg, guidance_scale, omega) → prediction.

A rule sees only the images that have a negative prompt now. A `Method` takes one of these names
or any callable with this signature.
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
