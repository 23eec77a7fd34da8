"""Combining the predictions of one step to one prediction, an equation each.

All predictions are `[B, C, h, w]` and of one kind (noise, velocity, …): the equations are made of
differences between predictions, weighted, so they mean the same for every kind. `guidance_scale`
and `omega` are numbers, or tensors that broadcast, such as `[B, 1, 1, 1]` for one value per image.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from vldnp._files import unknown
from vldnp.models.run import Run

Scale = float | Tensor
Equation = Callable[[Tensor, Tensor, Tensor, Scale, Scale | None], Tensor]
"""(pred_uncond, pred_cond, pred_neg, guidance_scale, omega) → prediction."""


def cfg(pred_uncond: Tensor, pred_cond: Tensor, guidance_scale: Scale) -> Tensor:
    """Classifier-free guidance, ε_u + g (ε_c − ε_u) (Ho & Salimans 2022, arXiv 2207.12598)."""
    return pred_uncond + guidance_scale * (pred_cond - pred_uncond)


def added(pred_cfg: Tensor, pred_neg: Tensor, pred_uncond: Tensor, omega: Scale) -> Tensor:
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


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """⟨a, b⟩ / (‖a‖ ‖b‖) for each image, `[B]`.

    Of ε_c and ε_u it is γ_t of Adaptive Guidance (Castillo et al. 2023, arXiv 2312.12487).
    """
    return torch.cosine_similarity(a.flatten(1), b.flatten(1))


def log_posterior(
    log_p: Tensor,
    x0: Tensor,
    x0_neg: Tensor,
    x0_uncond: Tensor,
    snr: float,
    snr_next: float,
    temperature: float = 1.0,
    offset: float = 0.0,
) -> Tensor:
    """log p(c₋ | x_{t−1}) of Dynamic Negative Guidance (arXiv 2410.14398), from that of x_t.

    log p − (τ (‖x_{t−1} − μ_n‖² − ‖x_{t−1} − μ_u‖²) − δ) / 2σ², where μ_n and μ_u are the means of
    an ancestral step of DDPM by ε_n and ε_u, and σ² = (1−ᾱ')/(1−ᾱ) · (1 − ᾱ/ᾱ') its variance.
    With x_{t−1} at the mean of the step that is taken, as where no noise is added,
    ‖x_{t−1} − μ_n‖² / σ² = (SNR' − SNR) ‖x̂₀ − x̂₀ⁿ‖², which holds for predictions of every kind.

    Args:
        log_p: `[B, 1, 1, 1]`.
        x0, x0_neg, x0_uncond: x̂₀ from the guided prediction, ε_n and ε_u, `[B, C, h, w]`.
        snr, snr_next: ᾱ/(1 − ᾱ) before and after the step.
        temperature, offset: τ and δ.
    """
    dims = tuple(range(1, x0.ndim))
    apart = ((x0 - x0_neg) ** 2 - (x0 - x0_uncond) ** 2).sum(dims, keepdim=True)
    bar, bar_next = snr / (1 + snr), snr_next / (1 + snr_next)
    variance = (1 - bar_next) / (1 - bar) * (1 - bar / bar_next)
    return log_p - temperature * (snr_next - snr) / 2 * apart + offset / (2 * variance)


def perpendicular(vector: Tensor, to: Tensor) -> Tensor:
    """v − (⟨v, p⟩ / ‖p‖²) p for each image: what of v is at right angles to p.

    Both are `[B, …]`. Where p is zero, v is returned as it is.
    """
    dims = tuple(range(1, to.ndim))
    along = (vector * to).sum(dims, keepdim=True)
    squared_norm = (to * to).sum(dims, keepdim=True)
    return vector - torch.where(squared_norm > 0, along / squared_norm, 0) * to


def perp_neg(
    pred_uncond: Tensor, pred_cond: Tensor, pred_neg: Tensor, guidance_scale: Scale, omega: Scale
) -> Tensor:
    """Perp-Neg, ε_cfg − ω (ε_n − ε_u)^⊥ (Armandpour et al. 2023, arXiv 2304.04968, Perp-Neg).

    ⊥ takes what is perpendicular to ε_c − ε_u, so that nothing of the prompt itself is undone.
    The paper weights the term with g·w; here ω = g·w, so that ω compares with that of `added`.
    """
    pos, neg = pred_cond - pred_uncond, pred_neg - pred_uncond
    return pred_uncond + guidance_scale * pos - omega * perpendicular(neg, pos)


@dataclass(frozen=True)
class Rule:
    """How a negative prompt enters the prediction. It sees only the images that have one now.

    Another class may stand in for this one: it has `uses_omega`, `step` and `describe`. Where a
    policy gives its images K negative prompts each, `pred_neg` is `[B, K, C, h, w]`. A class may
    have `conditioning(cond, negative, omega)` besides: what `pred_neg` is the prediction of, from
    the encoded prompts and their negative prompts, in place of the latter alone. It then says by
    `evaluations` how many rows of the network's batch that takes, and by `uses_uncond` whether it
    needs ε_u where g = 1.

    Attributes:
        name: as in records.
        equation: what it computes.
        uses_omega: whether ω has a part in the equation; at ω = 0 it is then ε_cfg.
    """

    name: str
    equation: Equation
    uses_omega: bool = True

    def step(
        self,
        pred_uncond: Tensor,
        pred_cond: Tensor,
        pred_neg: Tensor,
        guidance_scale: Scale,
        omega: Scale | None,
        state: Tensor,
        progress: float,
    ) -> tuple[Tensor, Tensor]:
        """The prediction, and the rule's state for the image's next step.

        Args:
            state: as large as the predictions, zeros before the first step; an image keeps it
                while it has no negative prompt. These rules have none and hand it on.
            progress: i / N.
        """
        return self.equation(pred_uncond, pred_cond, pred_neg, guidance_scale, omega), state

    def describe(self) -> str:
        return self.name


class Correction(Protocol):
    """What changes the guided prediction of all images, with or without a negative prompt."""

    def step(self, run: Run, pred: Tensor, t: Tensor, latents: Tensor, progress: float) -> Tensor:
        """The prediction `[B, C, h, w]` instead of `pred`.

        Args:
            run: what gives x̂₀ and the prediction that belongs to one (`x0`, `prediction`).
            t, latents: the timestep and x_t.
            progress: i / N.
        """

    def describe(self) -> dict:
        """JSON-able; everything that decides what it does."""


RULES: dict[str, Rule] = {
    rule.name: rule
    for rule in (
        Rule("added", lambda u, c, n, g, omega: added(cfg(u, c, g), n, u, omega)),
        Rule("replaced", lambda u, c, n, g, omega: replaced(n, c, g), uses_omega=False),
        Rule("composable-not", lambda u, c, n, g, omega: composable_not(u, c, n, g), False),
        Rule("perp-neg", perp_neg),
    )
}
"""The rules by name. A `Method` takes one of these names, a rule, or any `Equation`."""


def rule(source: str | Rule | Equation) -> Rule:
    """The rule of that name, the rule itself, or an equation as a rule.

    An equation may say by an attribute `uses_omega = False` that ω has no part in it.

    Raises:
        ValueError: an unknown name.
    """
    if isinstance(source, str):
        if source not in RULES:
            raise unknown("guidance rule", source, RULES)
        return RULES[source]
    if hasattr(source, "step"):
        return source
    kind = source if hasattr(source, "__qualname__") else type(source)
    name = f"{kind.__module__}.{kind.__qualname__}"
    return Rule(name, source, getattr(source, "uses_omega", True))
