"""Ablations: some settings of VL-DNP vary, everything else is the profile's.

A sweep is a `Study`, which shares the cells of the main run folder, and a table of what varies.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from itertools import product
from pathlib import Path

import pandas as pd

from vldnp._files import unknown
from vldnp.baselines.controls import AnswersNone, Judged, Oracle, RandomConcepts, closed_loop
from vldnp.baselines.nag import NAG
from vldnp.baselines.sld import SLD_STRENGTHS
from vldnp.concepts import load_concepts
from vldnp.guidance import RULES
from vldnp.levers import AdaptiveGuidance, Gate
from vldnp.methods import CFG, LEVERS, Method, Static
from vldnp.metrics.summary import summary
from vldnp.models import vlm as vlms
from vldnp.models.hub import ModelSpec
from vldnp.models.load import load_preview, load_vlm
from vldnp.schedules import SCHEDULES
from vldnp.study.grid import Study, setting_of
from vldnp.study.profile import Profile, numbers
from vldnp.study.profile_methods import dynamic, study_of


@dataclass(frozen=True)
class Ablation:
    """A study and what varies in it.

    Attributes:
        study: to run.
        factors: a row per variant: its `setting`, and what makes it, a column each.
    """

    study: Study
    factors: pd.DataFrame

    def summary(self, images: pd.DataFrame) -> pd.DataFrame:
        """`vldnp.metrics.summary.summary` with the factors beside each number."""
        return self._beside(summary(images).drop(columns=["method", "omega"]))

    def costs(self, images: pd.DataFrame) -> pd.DataFrame:
        """Mean U-Net evaluations, VLM calls and decoded x̂₀ of an image, with the factors.

        And the median of its `seconds`, as a busy machine delays some batches; where plain CFG is
        among the variants, `relative` is that in units of its.
        """
        costs = ["model_evaluations", "vlm_calls", "x0_decodes"]
        by_variant = images.groupby(["setting", "prompt_set"])
        means = by_variant[costs].mean().assign(seconds=by_variant["seconds"].median())
        if (plain := setting_of(CFG())) in means.index:
            base = means.loc[plain, "seconds"]
            means["relative"] = means["seconds"].div(base, level="prompt_set")
        return self._beside(means.reset_index())

    def _beside(self, table: pd.DataFrame) -> pd.DataFrame:
        return self.factors.merge(table, on="setting")


def sweep(
    profile: Profile,
    part: str,
    *grids: Mapping[str, Sequence],
    prompt_sets: Sequence[str | Path] = (),
    max_prompts: int = 0,
) -> Ablation:
    """Every combination of a grid's values; a further grid adds those that are not there yet.

    Args:
        profile: gives all that does not vary: on an axis that a grid lacks, a variant is dynamic,
            added, replaced, and otherwise as the profile has it.
        part: the study's name beside the main one, and its tables'.
        grids: axis → values.
            `negatives`: `static` (the profile's, on which only `rule` and `omega` act), `dynamic`.
            `rule`: names in `guidance.RULES`, or `sld-weak`, … for Safe Latent Diffusion, or `nag`.
            `update_policy`: as in `vldnp.VLDNP`.
            `spacing`: names in `schedules.SCHEDULES`.
            `queries`: how many; none is plain CFG, and as many as steps, or more, is every step.
            `guide`: VLMs, by name or themselves, an `Oracle`, or `cfg` (plain CFG), `random` (as
            many wrong things as the profile's VLM names) or `none` (a VLM that sees nothing). An
            oracle is left out where the concept set has no word for anything that its judge named.
            `Judged`, and what has it for its `vlm`, is shown where plain CFG would end.
            `omega`: strengths.
            `adaptive`, `reuse`, `omega_schedule`, `gate`, `lag`, `preview`: the options of
            `vldnp.methods.Method` that spend less, where None is off; for short a number for
            `AdaptiveGuidance(start)` and `Gate(threshold)`, and a name for `load_preview`. Plain
            CFG has `adaptive` only. With one of them, what a variant is called is in a column
            `variant` besides.
        prompt_sets: none given means the profile's.
        max_prompts: of each set; 0 means the profile's number for ablations.

    Raises:
        ValueError: an unknown axis or value; one line.
    """
    omega, vlm = profile.chosen_omega("vl-dnp"), load_vlm(profile.vlm)
    usual = {
        "negatives": ("dynamic", "dynamic"),
        "rule": ("added", "added"),
        "update_policy": ("replaced", "replaced"),
        "spacing": (profile.schedule, profile.schedule),
        "queries": (profile.queries, None),
        "guide": (_label(profile.vlm), vlm),
        "omega": (omega, omega),
        **{lever: (_called(off), off) for lever, off in OFF.items()},
    }
    if strange := {axis for grid in grids for axis in grid} - usual.keys():
        raise unknown("axis of a sweep", min(strange), usual)
    named = [axis for axis in usual if any(axis in grid for grid in grids)]
    variants: dict[tuple, tuple[dict, Method]] = {}
    for grid in grids:
        values = [_values(axis, given, profile, vlm).items() for axis, given in grid.items()]
        for chosen in product(*values):
            both = usual | dict(zip(grid, chosen, strict=True))
            labels = {axis: both[axis][0] for axis in named}
            if both["negatives"][0] == "static":
                labels |= {axis: "" for axis in named if axis not in ("negatives", "rule", "omega")}
            method = _method(profile, **{axis: value for axis, (_, value) in both.items()})
            if set(named) & OFF.keys():
                on = [f"{lever} {both[lever][0]}" for lever in method.levers()]
                labels["variant"] = ", ".join([method.name, *on])
            variants.setdefault(tuple(labels.values()), (labels, method))
    methods = {setting_of(method): method for _, method in variants.values()}
    study = study_of(
        profile,
        tuple(methods.values()),
        part=part,
        prompt_sets=prompt_sets,
        max_prompts=max_prompts or profile.ablation_prompts or 0,
    )
    rows = [labels | {"setting": setting_of(method)} for labels, method in variants.values()]
    return Ablation(replace(study, reference=None), pd.DataFrame(rows))


def _values(axis: str, given: Sequence, profile: Profile, vlm) -> dict:
    """What a value of an axis is called in tables → what `_method` takes."""
    if axis == "omega":
        return {omega: omega for omega in map(float, numbers(given, axis))}
    if axis == "queries":
        counts = (min(int(n), profile.num_inference_steps) for n in numbers(given, axis))
        return {n: n for n in counts}
    if axis == "update_policy":
        return {str(update_policy): update_policy for update_policy in given}
    if axis in OFF:
        return {
            _called(value): SHORT.get((axis, type(value)), lambda v: v)(value) for value in given
        }
    if axis == "guide":
        controls = {"cfg": None, "none": AnswersNone(), _label(profile.vlm): vlm}
        controls["random"] = RandomConcepts(vlm, profile.concepts)
        names = {_label(guide): guide for guide in given if _is_understood(guide, profile.concepts)}
        return {
            name: controls[name] if name in controls else load_vlm(guide)
            for name, guide in names.items()
        }
    classes = {f"sld-{strength}": rule for strength, rule in SLD_STRENGTHS.items()}
    classes["nag"] = NAG()
    known = {
        "negatives": {"static": "static", "dynamic": "dynamic"},
        "rule": {name: name for name in RULES} | classes,
        "spacing": {name: name for name in SCHEDULES},
    }[axis]
    if strange := [name for name in given if name not in known]:
        raise unknown(axis, str(strange[0]), known)
    return {name: known[name] for name in given}


def _method(
    profile: Profile, *, negatives, rule, update_policy, spacing, queries, guide, omega, **levers
) -> Method:
    if negatives == "static":
        return Static(profile.static_prompt, omega, rule)
    if guide is None or queries == 0:
        return CFG(adaptive=levers["adaptive"])
    options = {"vlm": guide, "rule": rule, "update_policy": update_policy, **levers}
    if queries == profile.num_inference_steps:
        options["query_steps"] = range(queries)
    method = dynamic(profile, omega, schedule=spacing, queries=queries or 0, **options)
    return closed_loop(method) if isinstance(getattr(guide, "vlm", guide), Judged) else method


OFF = {lever: getattr(Method, lever) for lever in LEVERS}
"""What each lever is where it is off."""

SHORT = {
    ("adaptive", float): AdaptiveGuidance,
    ("adaptive", int): AdaptiveGuidance,
    ("gate", float): Gate,
    ("preview", str): load_preview,
    ("preview", ModelSpec): load_preview,
}
"""What stands for a lever's value, by the type of what is given."""


def _called(option: object) -> str:
    """A lever's value in tables: a number, a model's name, or what is set to no default."""
    if option is None:
        return "off"
    if isinstance(option, ModelSpec) or not is_dataclass(option):
        return str(getattr(option, "name", option))
    own = {f.name: getattr(option, f.name) for f in fields(option)}
    set_to = [f"{f.name}={own[f.name]}" for f in fields(option) if own[f.name] != f.default]
    return f"{type(option).__name__}({', '.join(set_to)})"


def _label(guide: str | ModelSpec | Callable) -> str:
    return str(guide) if isinstance(guide, str | ModelSpec) else vlms.describe(guide)["name"]


def _is_understood(guide: str | Callable, concepts: str) -> bool:
    """Whether the concept set has words for what an oracle's judge named; true of other guides."""
    seen = guide.seen.values() if isinstance(guide, Oracle) else ()
    named = {thing for things in seen for thing in things}
    return not named or bool(named & set(load_concepts(concepts).vocabulary))
