"""Methods: a way of steering, as plain frozen data, and a constructor for each."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from vldnp import guidance, negatives
from vldnp.concepts import ConceptSet, load_concepts
from vldnp.conditioning import AsWritten, Prompting
from vldnp.safree import Safree
from vldnp.schedules import Schedule, as_schedule, front_loaded
from vldnp.sld import sld


@dataclass(frozen=True)
class Method:
    """Which negative prompt each image has at each step, and how it enters the prediction.

    Attributes:
        name: as in tables: `cfg`, `static`, `vl-dnp`, `sld-medium`, `safree`, …
        negatives: the policy (`vldnp.negatives`).
        rule: a name in `guidance.RULES`, a `guidance.Rule`, an `SLD`, or an equation.
        omega: strength ω ≥ 0 of the negative term; None where no equation has one.
        conditioning: what stands for the user's prompts (`vldnp.conditioning`).
    """

    name: str
    negatives: negatives.Negatives
    rule: str | guidance.Rule | guidance.Equation = "added"
    omega: float | None = None
    conditioning: Prompting = AsWritten()

    def __post_init__(self):
        guidance.rule(self.rule)  # an unknown name fails here, not in the middle of a run
        if self.omega is not None and not (math.isfinite(self.omega) and self.omega >= 0):
            raise ValueError(f"omega must be a finite number, 0 or more, not {self.omega}")

    def describe(self) -> dict:
        """JSON-able; everything that decides the method's images, objects by name and revision."""
        return {
            "name": self.name,
            "negatives": self.negatives.describe(),
            "rule": guidance.rule(self.rule).describe(),
            "omega": self.omega,
            "conditioning": self.conditioning.describe(),
        }


def CFG() -> Method:
    """Plain classifier-free guidance: no negative prompt, two evaluations a step."""
    return Method("cfg", negatives.NoNegatives())


def Static(negative_prompt: str, omega: float = 7.5, rule: str | guidance.Rule = "added") -> Method:
    """One fixed negative prompt, always on.

    Args:
        negative_prompt: an empty one makes this plain CFG.
        omega: strength; rules without ω, such as the widespread `rule="replaced"`, ignore it.
        rule: see `Method`.
    """
    return Method("static", negatives.Static(negative_prompt), rule, _omega(omega, rule))


def SLD(negative_prompt: str, strength: str = "medium", **changes: float) -> Method:
    """Safe Latent Diffusion (Schramowski et al., CVPR 2023, arXiv 2211.05105).

    Args:
        negative_prompt: the safety concept S, always on.
        strength: `weak`, `medium`, `strong` or `max`, the paper's settings.
        changes: hyper-parameters of `vldnp.sld.SLD` instead of the setting's; with `scale=0` this
            is plain CFG, on which no third evaluation is spent.
    """
    rule = sld(strength, **changes)
    policy = negatives.Static(negative_prompt) if rule.scale else negatives.NoNegatives()
    return Method(f"sld-{strength}", policy, rule)


def SAFREE(
    phrases: str | Sequence[str],
    negative_prompt: str = "",
    rule: str | guidance.Rule = "replaced",
    omega: float = 7.5,
    **options,
) -> Method:
    """SAFREE (Yoon et al., ICLR 2025, arXiv 2410.12761).

    Args:
        phrases: the unsafe phrases; one text is taken apart at its commas.
        negative_prompt: a fixed negative prompt besides. The authors' script gives the phrases,
            joined by commas, in place of ε_u; empty means none.
        rule, omega: how it enters; see `Method`.
        options: of `vldnp.safree.Safree`, such as `re_attention=False`.
    """
    phrases = phrases.split(",") if isinstance(phrases, str) else phrases
    policy = negatives.Static(negative_prompt) if negative_prompt else negatives.NoNegatives()
    strength = _omega(omega, rule) if negative_prompt else None
    return Method("safree", policy, rule, strength, Safree(tuple(phrases), **options))


def VLDNP(
    vlm: Callable,
    concepts: str | Path | ConceptSet = "moji",
    omega: float = 7.5,
    query_steps: Schedule | Iterable[int] = front_loaded(5),  # noqa: B008  (frozen data)
    rule: str | guidance.Rule = "added",
    lead: str | None = None,
    renewal: str | int = "replaced",
    on_failure: str = "raise",
    static_prompt: str | None = None,
) -> Method:
    """Dynamic VLM-guided negative prompting (Chang, Kim, Choi; arXiv 2510.26052).

    Args:
        vlm: any callable `(images, question) -> answers`; see `vldnp.load_vlm`.
        concepts: what to look for: a name in `data/concepts`, a YAML file, or a `ConceptSet`.
        omega: strength ω of the negative term.
        query_steps: `front_loaded(n)`, `uniform(n)` or step indices.
        rule: see `Method`.
        lead: words put before the found concepts, instead of the concept set's own.
        renewal: what becomes of a found concept that the next query does not find: `replaced`
            (the paper: it goes), `accumulated` (it stays), or it stays for so many more queries.
        on_failure, static_prompt: what to do when the VLM fails to answer: `raise`, `keep` the
            last negative prompt, or use the `static` one; see `negatives.Dynamic`.
    """
    if not callable(vlm):
        raise TypeError(f"vlm must be a callable (images, question) -> answers, not {vlm!r}")
    concept_set = load_concepts(concepts)
    if lead is not None:
        concept_set = replace(concept_set, lead=lead)
    policy = negatives.Dynamic(
        vlm, concept_set, as_schedule(query_steps), renewal, on_failure, static_prompt
    )
    return Method("vl-dnp", policy, rule, _omega(omega, rule))


def _omega(omega: float, rule: str | guidance.Rule) -> float | None:
    """ω, or None where the rule's equation has none."""
    return omega if guidance.rule(rule).uses_omega else None
