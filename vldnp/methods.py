"""Methods: a way of steering, as plain frozen data, and a constructor for each."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from vldnp import guidance, negatives
from vldnp.concepts import ConceptSet, load_concepts
from vldnp.schedules import Schedule, as_schedule, front_loaded


@dataclass(frozen=True)
class Method:
    """Which negative prompt each image has at each step, and how it enters the prediction.

    Attributes:
        name: as in tables: `cfg`, `static`, `vl-dnp`, …
        negatives: the policy (`vldnp.negatives`).
        rule: a name in `guidance.RULES`, or a callable with their signature.
        omega: strength ω ≥ 0 of the negative term; None where no equation has one.
    """

    name: str
    negatives: negatives.Negatives
    rule: str | guidance.Rule = "added"
    omega: float | None = None

    def __post_init__(self):
        guidance.rule(self.rule)  # an unknown name fails here, not in the middle of a run
        if self.omega is not None and not (math.isfinite(self.omega) and self.omega >= 0):
            raise ValueError(f"omega must be a finite number, 0 or more, not {self.omega}")

    def describe(self) -> dict:
        """JSON-able; everything that decides the method's images, objects by name and revision."""
        named = self.rule if isinstance(self.rule, str) else None
        return {
            "name": self.name,
            "negatives": self.negatives.describe(),
            "rule": named or f"{self.rule.__module__}.{self.rule.__qualname__}",
            "omega": self.omega,
        }


def CFG() -> Method:
    """Plain classifier-free guidance: no negative prompt, two evaluations a step."""
    return Method("cfg", negatives.NoNegatives())


def Static(negative_prompt: str, omega: float = 7.5, rule: str | guidance.Rule = "added") -> Method:
    """One fixed negative prompt, always on.

    Args:
        negative_prompt: an empty one makes this plain CFG.
        omega: strength; `rule="replaced"`, the widespread variant, has none (there g is it).
        rule: see `Method`.
    """
    return Method(
        "static", negatives.Static(negative_prompt), rule, None if rule == "replaced" else omega
    )


def VLDNP(
    vlm: Callable,
    concepts: str | Path | ConceptSet = "moji",
    omega: float = 7.5,
    query_steps: Schedule | Iterable[int] = front_loaded(5),  # noqa: B008  (frozen data)
    rule: str | guidance.Rule = "added",
    lead: str | None = None,
) -> Method:
    """Dynamic VLM-guided negative prompting (Chang, Kim, Choi; arXiv 2510.26052).

    Args:
        vlm: any callable `(images, question) -> answers`; see `vldnp.load_vlm`.
        concepts: what to look for: a name in `data/concepts`, a YAML file, or a `ConceptSet`.
        omega: strength ω of the negative term.
        query_steps: `front_loaded(n)`, `uniform(n)` or step indices.
        rule: see `Method`.
        lead: words put before the found concepts, instead of the concept set's own.
    """
    if not callable(vlm):
        raise TypeError(f"vlm must be a callable (images, question) -> answers, not {vlm!r}")
    concept_set = load_concepts(concepts)
    if lead is not None:
        concept_set = replace(concept_set, lead=lead)
    policy = negatives.Dynamic(vlm, concept_set, as_schedule(query_steps))
    return Method("vl-dnp", policy, rule, None if rule == "replaced" else omega)
