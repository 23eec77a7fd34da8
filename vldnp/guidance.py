"""Guidance rules: the predictions of one step become one prediction, by one equation each.

Predictions are `[k, C, h, w]`. The equations weight differences between them, so they hold for any
kind (noise, velocity, …). g and ω are numbers, or tensors that broadcast, such as `[k, 1, 1, 1]`.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from vldnp._files import unknown
from vldnp.models.conditioning import Conditioning

Scale = float | Tensor
Equation = Callable[[Tensor, Tensor, Tensor, Scale, Scale | None], Tensor]
"""(pred_uncond, pred_cond, pred_neg, guidance_scale, omega) → prediction."""


def cfg(pred_uncond: Tensor, pred_cond: Tensor, guidance_scale: Scale) -> Tensor:
    """Classifier-free guidance, ε_u + g (ε_c − ε_u) (Ho & Salimans 2022, arXiv 2207.12598)."""
    return pred_uncond + guidance_scale * (pred_cond - pred_uncond)


def added(
    pred_uncond: Tensor, pred_cond: Tensor, pred_neg: Tensor, guidance_scale: Scale, omega: Scale
) -> Tensor:
    """VL-DNP, ε_cfg − ω (ε_n − ε_u) (arXiv 2510.26052)."""
    return cfg(pred_uncond, pred_cond, guidance_scale) - omega * (pred_neg - pred_uncond)


def replaced(
    pred_uncond: Tensor, pred_cond: Tensor, pred_neg: Tensor, guidance_scale: Scale, omega: None
) -> Tensor:
    """The usual negative prompt, ε_n + g (ε_c − ε_n): ε_n replaces ε_u."""
    return cfg(pred_neg, pred_cond, guidance_scale)


def composable_not(
    pred_uncond: Tensor, pred_cond: Tensor, pred_neg: Tensor, guidance_scale: Scale, omega: None
) -> Tensor:
    """Concept negation, ε_u + g (ε_c − ε_n) (Liu et al. 2022, arXiv 2206.01714): ω is g here."""
    return pred_uncond + guidance_scale * (pred_cond - pred_neg)


def perpendicular(vector: Tensor, to: Tensor) -> Tensor:
    """v − (⟨v, p⟩ / ‖p‖²) p for each image, `[k, …]`; v itself where p is zero."""
    dims = tuple(range(1, to.ndim))
    along = (vector * to).sum(dims, keepdim=True)
    squared_norm = (to * to).sum(dims, keepdim=True)
    return vector - torch.where(squared_norm > 0, along / squared_norm, 0) * to


def perp_neg(
    pred_uncond: Tensor, pred_cond: Tensor, pred_neg: Tensor, guidance_scale: Scale, omega: Scale
) -> Tensor:
    """Perp-Neg, ε_cfg − ω (ε_n − ε_u)^⊥ (Armandpour et al. 2023, arXiv 2304.04968); ⊥ is the part
    perpendicular to ε_c − ε_u. The paper weights the term by g·w; here ω = g·w."""
    pos, neg = pred_cond - pred_uncond, pred_neg - pred_uncond
    return pred_uncond + guidance_scale * pos - omega * perpendicular(neg, pos)


class Rule:
    """How a negative prompt enters the prediction of the images that have one."""

    uses_omega: bool = True  # whether ω is in the equation; at ω = 0 it is then ε_cfg
    uses_uncond: bool = True  # whether it needs ε_u where g = 1

    def branch(
        self, negative: Conditioning, prompted: Callable[[], Conditioning], omega: Scale | None
    ) -> Conditioning:
        """What `pred_neg` is the prediction of: the encoded negative prompts, `[k·K, L, D]`, or
        what a rule makes of them and of the prompts that they belong to (`prompted()`)."""
        return negative

    def step(self, pred_uncond, pred_cond, pred_neg, guidance_scale, omega, state, progress):
        """The prediction, `[k, C, h, w]`, and the state for the next step (zeros before the first);
        `pred_neg` is `[k, K, C, h, w]`, for K negative prompts of each image; progress is i / N."""
        raise NotImplementedError

    def describe(self) -> str | dict:
        """JSON-able; everything that decides what the rule does."""


@dataclass(frozen=True)
class EquationRule(Rule):
    """An equation as a rule; it gets `pred_neg` without the axis K where K = 1."""

    name: str
    equation: Equation
    uses_omega: bool = True

    def step(self, pred_uncond, pred_cond, pred_neg, guidance_scale, omega, state, progress):
        neg = pred_neg.squeeze(1)
        return self.equation(pred_uncond, pred_cond, neg, guidance_scale, omega), state

    def describe(self) -> str:
        return self.name


RULES: dict[str, Rule] = {
    "added": EquationRule("added", added),
    "replaced": EquationRule("replaced", replaced, uses_omega=False),
    "composable-not": EquationRule("composable-not", composable_not, uses_omega=False),
    "perp-neg": EquationRule("perp-neg", perp_neg),
}
"""The rules that have a name."""


def rule(source: str | Rule | Equation) -> Rule:
    """The rule of a known name, a rule itself, or a function as a rule that uses ω."""
    if isinstance(source, Rule):
        return source
    if isinstance(source, str):
        if source not in RULES:
            raise unknown("guidance rule", source, RULES)
        return RULES[source]
    kind = source if hasattr(source, "__qualname__") else type(source)
    return EquationRule(f"{kind.__module__}.{kind.__qualname__}", source)
