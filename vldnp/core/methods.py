"""Methods: a way of steering, as plain frozen data, and a constructor for each."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from vldnp._finite import is_finite
from vldnp.core import guidance, negatives
from vldnp.core.concepts import ConceptSet, load_concepts
from vldnp.core.schedules import Schedule, as_schedule, front_loaded
from vldnp.models import vlm as vlms
from vldnp.models.conditioning import AsWritten, Prompting


@dataclass(frozen=True)
class Method:
    """Which negative prompt each image has at each step, and how it enters the prediction.

    Attributes:
        name: as in tables: `cfg`, `static`, `vl-dnp`, `sld-medium`, `safree`, …
        negatives: the policy (`vldnp.core.negatives`).
        rule: a name in `guidance.RULES`, a `guidance.Rule`, an `SLD`, or an equation.
        omega: strength ω ≥ 0 of the negative term; None where no equation has one.
        conditioning: what stands for the user's prompts (`vldnp.models.conditioning`).
        correction: what changes the prediction of all images at last, a `guidance.Correction`.
    """

    name: str
    negatives: negatives.Negatives
    rule: str | guidance.Rule | guidance.Equation = "added"
    omega: float | None = None
    conditioning: Prompting = AsWritten()
    correction: guidance.Correction | None = None

    def __post_init__(self):
        guidance.rule(self.rule)  # an unknown name fails here, not in the middle of a run
        if self.omega is not None and not (is_finite(self.omega) and self.omega >= 0):
            raise ValueError(f"omega must be a finite number, 0 or more, not {self.omega!r}")

    def describe(self) -> dict:
        """JSON-able; everything that decides the method's images, objects by name and revision."""
        return {
            "name": self.name,
            "negatives": self.negatives.describe(),
            "rule": guidance.rule(self.rule).describe(),
            "omega": self.omega,
            "conditioning": self.conditioning.describe(),
            **({} if self.correction is None else {"correction": self.correction.describe()}),
        }


def identified(method: Method) -> Method:
    """The method itself, if its records tell it from every other; studies share images by them.

    Raises:
        ValueError: its VLM has no name or no revision, or its rule no name of its own; one line.
    """
    if (vlm := getattr(method.negatives, "vlm", None)) is not None:
        vlms.identified(vlm)
    name = guidance.rule(method.rule).describe()
    if isinstance(name, str) and "<" in name:  # <lambda>, or <locals> of a function
        raise ValueError(
            f"guidance rule {name!r} needs a name of its own in a study: make it a function of a "
            "module, or give it one with vldnp.core.guidance.Rule"
        )
    return method


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


def VLDNP(
    vlm: Callable,
    concepts: str | Path | ConceptSet,
    omega: float = 7.5,
    query_steps: Schedule | Iterable[int] = front_loaded(5),  # noqa: B008  (frozen data)
    rule: str | guidance.Rule = "added",
    lead: str | None = None,
    update_policy: str | int = "replaced",
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
        update_policy: what becomes of a found concept that the next query does not find: `replaced`
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
        vlm, concept_set, as_schedule(query_steps), update_policy, on_failure, static_prompt
    )
    return Method("vl-dnp", policy, rule, _omega(omega, rule))


def _omega(omega: float, rule: str | guidance.Rule) -> float | None:
    """ω, or None where the rule's equation has none."""
    return omega if guidance.rule(rule).uses_omega else None
