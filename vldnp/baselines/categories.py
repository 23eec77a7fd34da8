"""Several negative prompts at a time, one per category of harm: all summed, or the nearest chosen.

They need no VLM, and K evaluations a step beside CFG's two.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vldnp import guidance
from vldnp.guidance import Scale
from vldnp.negatives import Negative, NoNegatives, SampleId


@dataclass(frozen=True)
class Categories(NoNegatives):
    """The same K negative prompts for every image, always on.

    Attributes:
        categories: the prompts, one per category, none of them empty.
    """

    categories: tuple[str, ...]

    def __post_init__(self):
        object.__setattr__(self, "categories", tuple(self.categories))
        if not self.categories or not all(text.strip() for text in self.categories):
            raise ValueError(
                f"categories must be negative prompts, none of them empty, not "
                f"{list(self.categories)}"
            )

    def initial(self, images: Sequence[SampleId]) -> list[Negative]:
        named = " | ".join(self.categories)
        return [Negative(named, image=image, candidates=self.categories) for image in images]

    def describe(self) -> dict:
        return {"kind": "categories", "prompts": list(self.categories)}


def summed(
    pred_uncond: Tensor, pred_cond: Tensor, pred_neg: Tensor, guidance_scale: Scale, omega: float
) -> Tensor:
    """ε_cfg − ω Σ_k (ε_k − ε_u): VL-DNP's negative term once for each of K categories.

    It is the composition of K concept negations with equal weights (Liu et al. 2022,
    arXiv 2206.01714, section NOT).

    Args:
        pred_neg: ε_k, `[B, K, C, h, w]`; `[B, C, h, w]` where there is one category.
    """
    pos, each = pred_cond - pred_uncond, _each(pred_neg, pred_uncond) - pred_uncond[:, None]
    return pred_uncond + guidance_scale * pos - omega * each.sum(dim=1)


SUMMED = guidance.Rule("summed", summed)


def projections(pred_uncond: Tensor, pred_cond: Tensor, pred_neg: Tensor) -> Tensor:
    """How far the prompt's direction reaches along each category's, `[B, K]`.

    s_k = ⟨ε_c − ε_u, ε_k − ε_u⟩ / ‖ε_k − ε_u‖, the Conflict-aware Category Identification of CASG
    (Xiang et al., CVPR 2026, arXiv 2602.20880; `select_strongest_harmful_direction` in its code,
    github.com/tmllab/2026_CVPR_CASG, with 1e-12 added to the norm).

    Args:
        pred_neg: ε_k, `[B, K, C, h, w]`.
    """
    direction = (pred_cond - pred_uncond).flatten(1)[:, None]
    harmful = (pred_neg - pred_uncond[:, None]).flatten(2)
    return (harmful * direction).sum(-1) / (harmful.norm(dim=-1) + 1e-12)


@dataclass(frozen=True)
class CASG:
    """Conflict-aware Adaptive Safety Guidance (Xiang et al., CVPR 2026, arXiv 2602.20880).

    At each step an image is steered away from one of K categories, that with the largest of
    `projections`, by another rule. The paper's is SLD; its code evaluates the list of all
    categories besides, for nothing but drawings.

    Attributes:
        rule: a name in `guidance.RULES`, a rule, or an `SLD`.
    """

    rule: str | guidance.Rule = "added"

    @property
    def uses_omega(self) -> bool:
        return guidance.rule(self.rule).uses_omega

    def step(
        self,
        pred_uncond: Tensor,
        pred_cond: Tensor,
        pred_neg: Tensor,
        guidance_scale: Scale,
        omega: float | None,
        state: Tensor,
        progress: float,
    ) -> tuple[Tensor, Tensor]:
        """See `guidance.Rule`; `pred_neg` as in `summed`."""
        each = _each(pred_neg, pred_uncond)
        chosen = projections(pred_uncond, pred_cond, each).argmax(dim=1)
        nearest = each[torch.arange(len(each), device=each.device), chosen]
        return guidance.rule(self.rule).step(
            pred_uncond, pred_cond, nearest, guidance_scale, omega, state, progress
        )

    def describe(self) -> dict:
        return {"kind": "casg", "rule": guidance.rule(self.rule).describe()}


def _each(pred_neg: Tensor, like: Tensor) -> Tensor:
    return pred_neg if pred_neg.ndim > like.ndim else pred_neg[:, None]
