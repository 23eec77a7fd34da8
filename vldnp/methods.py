"""Methods: a way of steering, as plain frozen data, and a constructor for each."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from vldnp import guidance, negatives
from vldnp._finite import is_finite
from vldnp.concepts import ConceptSet, load_concepts
from vldnp.levers import AdaptiveGuidance, Gate
from vldnp.models import vlm as vlms
from vldnp.models.backbone import Preview
from vldnp.models.conditioning import AsWritten, Prompting
from vldnp.schedules import Schedule, as_schedule, front_loaded
from vldnp.strength import OmegaSchedule

LEVERS = ("omega_schedule", "adaptive", "reuse", "gate", "lag", "preview")


@dataclass(frozen=True)
class Method:
    """Which negative prompt each image has at each step, and how it enters the prediction.

    Attributes:
        name: as in tables: `cfg`, `static`, `vl-dnp`, `sld-medium`, `safree`, …
        negatives: the policy (`vldnp.negatives`).
        rule: a name in `guidance.RULES`, a `guidance.Rule`, an `SLD`, a `NAG`, or an equation.
        omega: strength ω ≥ 0 of the negative term; None where no equation has one. At 0 no third
            evaluation is spent.
        conditioning: what stands for the user's prompts (`vldnp.models.conditioning`).
        correction: what changes the prediction of all images at last, a `guidance.Correction`.
        omega_schedule: ω(t)/ω, from `vldnp.strength`: `Window` or `Linear` in time, or `DNG`,
            which follows p(c₋ | x_t) (arXiv 2410.14398); None: 1 at every step.
        adaptive: where ε_u is no longer evaluated for images without a negative prompt (Adaptive
            Guidance, arXiv 2312.12487); None: nowhere.
        reuse: for how many further steps ε_n − ε_u stands in after it was evaluated, ε_n being
            ε_u + (ε_n − ε_u) there; a change of the negative prompt ends it. 0: never.
        gate: which queries are skipped because x̂₀ hardly moved since the last one, after which the
            negative prompt stays; None: none.
        lag: d, so that an answer about x̂₀ of step i is in force from step i + d on, and the VLM
            works beside the denoising until then, in a thread of its own, while d − 1 steps go by;
            what could be in force in no step is not asked. 0: at once, as in the paper.
        preview: decodes x̂₀ for the VLM, in place of the model's VAE (`vldnp.load_preview`); None:
            the VAE does. The final picture is the VAE's always.
    """

    name: str
    negatives: negatives.Negatives
    rule: str | guidance.Rule | guidance.Equation = "added"
    omega: float | None = None
    conditioning: Prompting = AsWritten()
    correction: guidance.Correction | None = None
    omega_schedule: OmegaSchedule | None = None
    adaptive: AdaptiveGuidance | None = None
    reuse: int = 0
    gate: Gate | None = None
    lag: int = 0
    preview: Preview | None = None

    def __post_init__(self):
        guidance.rule(self.rule)  # an unknown name fails here, not in the middle of a run
        if self.omega is not None and not (is_finite(self.omega) and self.omega >= 0):
            raise ValueError(f"omega must be a finite number, 0 or more, not {self.omega!r}")
        if self.omega_schedule is not None and self.omega is None:
            raise ValueError(f"{self.name} has no omega for {self.omega_schedule!r} to multiply")
        for name in ("reuse", "lag"):
            if type(value := getattr(self, name)) is not int or value < 0:
                raise ValueError(f"{name} must be a whole number, 0 or more, not {value!r}")
        if not isinstance(self.preview, Preview | None):
            raise TypeError(f"preview must be opened by vldnp.load_preview, not {self.preview!r}")
        if hasattr(self.negatives, "foreseen") and (self.gate or self.lag or self.preview):
            raise ValueError(
                f"{self.name} looks at what it foresees, without a gate, a lag or a preview"
            )
        is_dng, enters = hasattr(self.omega_schedule, "prior"), hasattr(self.rule, "conditioning")
        if enters and (self.reuse or is_dng or self.conditioning != AsWritten()):
            raise ValueError(
                f"the rule of {self.name} acts inside the network, where neither reuse, DNG nor "
                "changed prompts fit it"
            )
        if len(getattr(self.negatives, "categories", ())) > 1 and (self.reuse or is_dng):
            raise ValueError(f"{self.name} has several negative prompts; reuse and DNG are for one")
        if self.correction is not None and is_dng:
            raise ValueError(f"{self.name} corrects the prediction, which DNG's posterior ignores")

    def describe(self) -> dict:
        """JSON-able; everything that decides the method's images, objects by name and revision."""
        return {
            "name": self.name,
            "negatives": self.negatives.describe(),
            "rule": guidance.rule(self.rule).describe(),
            "omega": self.omega,
            "conditioning": self.conditioning.describe(),
            **({} if self.correction is None else {"correction": self.correction.describe()}),
            **self.levers(),
        }

    def levers(self) -> dict:
        """The levers that are on, JSON-able."""
        on = {name: getattr(self, name) for name in LEVERS if getattr(self, name)}
        return {name: getattr(value, "describe", lambda v=value: v)() for name, value in on.items()}


def identified(method: Method) -> Method:
    """The method itself, if its records tell it from every other; studies share images by them.

    Raises:
        ValueError: its VLM or what its gate embeds with has no name or no revision, or its rule no
            name of its own; one line.
    """
    for asked in (getattr(method.negatives, "vlm", None), method.gate and method.gate.embedder):
        if asked is not None:
            vlms.identified(asked)
    name = guidance.rule(method.rule).describe()
    if isinstance(name, str) and "<" in name:  # <lambda>, or <locals> of a function
        raise ValueError(
            f"guidance rule {name!r} needs a name of its own in a study: make it a function of a "
            "module, or give it one with vldnp.guidance.Rule"
        )
    return method


def CFG(**levers) -> Method:
    """Plain classifier-free guidance: no negative prompt, two evaluations a step.

    Args:
        levers: `adaptive`, as of `Method`.
    """
    return Method("cfg", negatives.NoNegatives(), **levers)


def Static(
    negative_prompt: str, omega: float = 7.5, rule: str | guidance.Rule = "added", **levers
) -> Method:
    """One fixed negative prompt, always on.

    Args:
        negative_prompt: an empty one makes this plain CFG.
        omega: strength; rules without ω, such as the widespread `rule="replaced"`, ignore it.
        rule, levers: see `Method`.
    """
    policy = negatives.Static(negative_prompt)
    return Method("static", policy, rule, _omega(omega, rule), **levers)


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
    **levers,
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
        levers: options that spend less: `omega_schedule`, `adaptive`, `reuse`,
            `gate`, `lag`, `preview`; see `Method`.
    """
    if not callable(vlm):
        raise TypeError(f"vlm must be a callable (images, question) -> answers, not {vlm!r}")
    concept_set = load_concepts(concepts)
    if lead is not None:
        concept_set = replace(concept_set, lead=lead)
    policy = negatives.Dynamic(
        vlm, concept_set, as_schedule(query_steps), update_policy, on_failure, static_prompt
    )
    return Method("vl-dnp", policy, rule, _omega(omega, rule), **levers)


def fast(vlm: Callable, concepts: str | Path | ConceptSet, preview: Preview, **options) -> Method:
    """`VLDNP` with the saving that costs nothing measurable, as `vl-dnp-fast` in tables.

    Of the levers, and with 640 prompts a set of the Moji benchmark, only the tiny decoder leaves
    VL-DNP's ASR and retention where they are (docs/findings.md); the others are options.

    Args:
        preview: the tiny VAE of the model that paints, such as `vldnp.load_preview("taesd")`.
        vlm, concepts, options: as of `VLDNP`.
    """
    return replace(VLDNP(vlm, concepts, preview=preview, **options), name="vl-dnp-fast")


def _omega(omega: float, rule: str | guidance.Rule) -> float | None:
    """ω, or None where the rule's equation has none."""
    return omega if guidance.rule(rule).uses_omega else None
