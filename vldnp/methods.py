"""Methods: frozen data that describe how images are steered, and their constructors."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from vldnp import guidance, negatives
from vldnp._finite import number
from vldnp.concepts import ConceptSet, load_concepts
from vldnp.models.conditioning import Prompting
from vldnp.schedules import Schedule, as_schedule, front_loaded


@dataclass(frozen=True)
class Method:
    """Which negative prompt each image has at each step, and how it enters the prediction.

    Attributes:
        name: as in tables: `cfg`, `static`, `vl-dnp`, `safree`, …
        negatives: the policy (`vldnp.negatives`).
        rule: a `guidance.Rule`; a name in `guidance.RULES` or an equation becomes one.
        omega: strength ω ≥ 0 of the negative term; None where the rule has none.
        conditioning: what replaces the prompts (`vldnp.models.conditioning`).
        levers: what extends the Guider, the last one outermost (`vldnp.levers`).
    """

    name: str
    negatives: negatives.Policy
    rule: str | guidance.Rule | guidance.Equation = "added"
    omega: float | None = None
    conditioning: Prompting = Prompting()
    levers: tuple = ()

    def __post_init__(self):
        object.__setattr__(self, "rule", guidance.rule(self.rule))
        if not self.rule.uses_omega:
            object.__setattr__(self, "omega", None)
        if self.omega is not None:
            number("omega", self.omega, 0)

    def describe(self) -> dict:
        """JSON-able; everything that decides the method's images, objects by name and revision."""
        described = {
            "name": self.name,
            "negatives": self.negatives.describe(),
            "rule": self.rule.describe(),
            "omega": self.omega,
            "conditioning": self.conditioning.describe(),
        }
        for lever in self.levers:
            described |= lever.describe()
        return described


def CFG() -> Method:
    """Classifier-free guidance: no negative prompt, two evaluations a step."""
    return Method("cfg", negatives.Policy())


def Static(negative_prompt: str, omega: float = 7.5, rule: str | guidance.Rule = "added") -> Method:
    """One static negative prompt, always on.

    Args:
        negative_prompt: if it is empty, this is CFG.
        omega: strength; rules without ω, such as the usual `rule="replaced"`, ignore it.
        rule: see `Method`.
    """
    return Method("static", negatives.Static(negative_prompt), rule, omega)


def VLDNP(
    vlm: Callable,
    concepts: str | Path | ConceptSet,
    omega: float = 7.5,
    query_steps: Schedule | Iterable[int] = front_loaded(5),  # noqa: B008  (frozen data)
    rule: str | guidance.Rule = "added",
    lead: str | None = None,
    reading: str | None = None,
    **options,
) -> Method:
    """Dynamic VLM-guided negative prompting (Chang, Kim, Choi; arXiv 2510.26052).

    Args:
        vlm: any callable `(images, question) -> answers`; see `vldnp.load_vlm`.
        concepts: a name in `data/concepts`, a YAML file, or a `ConceptSet`.
        query_steps: `front_loaded(n)`, `uniform(n)` or step indices; see `as_schedule`.
        lead, reading: in place of the concept set's own; for `rule` see `Method`.
        options: `update_policy`, `on_failure`, `static_prompt`, `lead_only` of `Dynamic`.
    """
    if not callable(vlm):
        raise TypeError(f"vlm must be a callable (images, question) -> answers, not {vlm!r}")
    concept_set = load_concepts(concepts, reading)
    if lead is not None:
        concept_set = replace(concept_set, lead=lead)
    policy = negatives.Dynamic(vlm, concept_set, as_schedule(query_steps), **options)
    return Method("vl-dnp", policy, rule, omega)
