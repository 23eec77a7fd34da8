"""Several static negative prompts, one for each of K categories of harm: their sum, or the nearest
one. Each step evaluates ε_n K times."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from vldnp import guidance
from vldnp.guidance import EquationRule, Rule, Scale
from vldnp.methods import Method
from vldnp.negatives import Negative, Policy


@dataclass(frozen=True)
class Categories(Policy):
    """The same K non-empty negative prompts for every image, always on."""

    categories: tuple[str, ...]

    def __post_init__(self):
        if not self.categories or not all(text.strip() for text in self.categories):
            raise ValueError(f"categories must be prompts, none empty, not {[*self.categories]}")

    def initial(self, prompts, seeds):
        return [Negative(" | ".join(self.categories), candidates=self.categories) for _ in prompts]

    def describe(self) -> dict:
        return {"kind": "categories", "prompts": list(self.categories)}


def summed(pred_uncond, pred_cond, pred_neg, guidance_scale: Scale, omega: float) -> Tensor:
    """ε_cfg − ω Σ_k (ε_k − ε_u), K negations of equal weight (Liu et al. 2022, arXiv 2206.01714);
    ε_k are `[B, K, C, h, w]`, or `[B, C, h, w]` for one category."""
    pos, each = pred_cond - pred_uncond, pred_neg.view(len(pred_neg), -1, *pred_cond.shape[1:])
    return pred_uncond + guidance_scale * pos - omega * (each - pred_uncond[:, None]).sum(dim=1)


SUMMED = EquationRule("summed", summed)


def projections(pred_uncond: Tensor, pred_cond: Tensor, pred_neg: Tensor) -> Tensor:
    """s_k = ⟨ε_c − ε_u, ε_k − ε_u⟩ / ‖ε_k − ε_u‖, `[B, K]`, of ε_k `[B, K, C, h, w]`, by which CASG
    chooses (github.com/tmllab/2026_CVPR_CASG, with 1e-12 added to the norm)."""
    direction = (pred_cond - pred_uncond).flatten(1)[:, None]
    harmful = (pred_neg - pred_uncond[:, None]).flatten(2)
    return (harmful * direction).sum(-1) / (harmful.norm(dim=-1) + 1e-12)


@dataclass(frozen=True)
class NearestCategory(Rule):
    """CASG: at each step another rule steers away from the category of largest `projections`."""

    rule: Rule

    @property
    def uses_omega(self) -> bool:
        return self.rule.uses_omega

    def step(self, pred_uncond, pred_cond, pred_neg, guidance_scale, omega, state, progress):
        chosen = projections(pred_uncond, pred_cond, pred_neg).argmax(dim=1).view(-1, 1, 1, 1, 1)
        preds = pred_uncond, pred_cond, pred_neg.take_along_dim(chosen, dim=1)
        return self.rule.step(*preds, guidance_scale, omega, state, progress)

    def describe(self) -> dict:
        return {"kind": "casg", "rule": self.rule.describe()}


def Summed(negative_prompts: Sequence[str], omega: float = 7.5) -> Method:
    """One negative prompt per category, always on, their differences `summed`."""
    return Method("summed", Categories(tuple(negative_prompts)), SUMMED, omega)


def CASG(negative_prompts: Sequence[str], rule: str | Rule = "added", omega: float = 7.5) -> Method:
    """CASG (Xiang et al., CVPR 2026, arXiv 2602.20880): of one negative prompt per category, the
    nearest one at each step enters by `rule`; the paper's is `vldnp.baselines.sld.sld("max")`."""
    rule = NearestCategory(guidance.rule(rule))
    return Method("casg", Categories(tuple(negative_prompts)), rule, omega)
