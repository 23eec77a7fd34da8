"""The ablations as studies: one setting of VL-DNP varies, everything else is the profile's.

Each gives a `Study`, which shares the cells of the main run folder, and a table of what varies.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import pandas as pd

from vldnp.baselines.controls import AnswersNone, Oracle, RandomConcepts
from vldnp.baselines.sld import sld
from vldnp.core import guidance
from vldnp.core.concepts import load_concepts
from vldnp.core.methods import CFG, Method, Static
from vldnp.core.schedules import SCHEDULES
from vldnp.experiments.grid import Study, setting_of
from vldnp.experiments.profile import Profile, numbers
from vldnp.experiments.profile_methods import dynamic, study_of
from vldnp.metrics.summary import summary
from vldnp.models.load import load_vlm

COUNTS = (0, 1, 2, 3, 5, 10, 25)
RULES = {**{name: name for name in guidance.RULES}, "sld-medium": sld("medium")}
RENEWALS = ("replaced", 2, "accumulated")


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
        """Mean U-Net evaluations, VLM calls and seconds an image, with the factors."""
        costs = ["model_evaluations", "vlm_calls", "seconds"]
        return self._beside(images.groupby(["setting", "prompt_set"])[costs].mean().reset_index())

    def _beside(self, table: pd.DataFrame) -> pd.DataFrame:
        return self.factors.merge(table, on="setting")


def _ablation(
    profile: Profile,
    part: str,
    variants: Sequence[tuple[dict, Method]],
    prompt_sets: Sequence[str],
    max_prompts: int,
) -> Ablation:
    methods = {setting_of(method): method for _, method in variants}
    count = max_prompts or profile.ablation_prompts or 0
    study = study_of(
        profile, tuple(methods.values()), part=part, prompt_sets=prompt_sets, max_prompts=count
    )
    factors = pd.DataFrame(what | {"setting": setting_of(method)} for what, method in variants)
    return Ablation(replace(study, reference=None), factors)


def query_schedule(
    profile: Profile,
    counts: Sequence[int] = COUNTS,
    prompt_sets: Sequence[str] = ("implicit",),
    max_prompts: int = 0,
) -> Ablation:
    """How often the VLM is asked, and when. Factors: `spacing`, `queries`.

    None is plain CFG; a query at every step has no spacing, and stands in every curve.

    Args:
        profile: gives models, strength and the number of steps.
        counts: numbers of queries, as `profile.numbers` reads them; more than the number of
            steps is one at every step.
        prompt_sets, max_prompts: as in `vldnp.profile_study`.
    """
    steps, vlm = profile.num_inference_steps, load_vlm(profile.vlm)
    variants: list[tuple[dict, Method]] = []
    for spacing in SCHEDULES:
        for n in sorted({min(int(n), steps) for n in numbers(counts, "counts")}):
            if n == 0:
                method = CFG()
            elif n == steps:
                method = dynamic(profile, vlm=vlm, query_steps=range(steps))
            else:
                method = dynamic(profile, vlm=vlm, schedule=spacing, queries=n)
            variants.append(({"spacing": spacing, "queries": n}, method))
    return _ablation(profile, "query-schedule", variants, prompt_sets, max_prompts)


def plain(
    profile: Profile,
    prompt_sets: Sequence[str] = ("implicit", "benign"),
    max_prompts: int = 0,
) -> Study:
    """Plain CFG alone on an ablation's prompts: what the oracle of `vlm_size` has to know.

    Args:
        profile, prompt_sets, max_prompts: as in `query_schedule`.
    """
    return _ablation(profile, "plain", [({}, CFG())], prompt_sets, max_prompts).study


def vlm_size(
    profile: Profile,
    oracle: Oracle,
    prompt_sets: Sequence[str] = ("implicit", "benign"),
    max_prompts: int = 0,
) -> Ablation:
    """The profile's VLM, its lighter ones, and the controls. Factor: `guide`.

    The controls: a VLM that sees nothing (plain CFG), one that names as many wrong things, and
    the oracle, which knows what the judge sees in plain CFG's picture.

    Args:
        profile, prompt_sets, max_prompts: as in `query_schedule`.
        oracle: knows the images of `plain`, run with the same arguments. One whose judge has no
            names for the concept set's terms, as NudeNet's classifier, is left out.
    """
    vlm = load_vlm(profile.vlm)
    guides = {name: load_vlm(name) for name in profile.lighter_vlms}
    guides |= {profile.vlm: vlm, "random": RandomConcepts(vlm, profile.concepts)}
    if _is_understood(oracle, profile.concepts):
        guides["oracle"] = oracle
    guides["none"] = AnswersNone()
    variants = [({"guide": name}, dynamic(profile, vlm=guide)) for name, guide in guides.items()]
    return _ablation(
        profile, "vlm-size", [({"guide": "cfg"}, CFG()), *variants], prompt_sets, max_prompts
    )


def _is_understood(oracle: Oracle, concepts: str) -> bool:
    """Whether the concept set has words for what the oracle's judge named."""
    named = {thing for things in oracle.seen.values() for thing in things}
    return not named or bool(named & set(load_concepts(concepts).vocabulary))


def guidance_rule(
    profile: Profile,
    prompt_sets: Sequence[str] = ("implicit", "benign"),
    max_prompts: int = 0,
) -> Ablation:
    """How the negative prompt enters, and what becomes of it at the next query.

    Factors: `negatives` (static or dynamic), `rule`, `renewal`.
    """
    vlm, omega = load_vlm(profile.vlm), profile.chosen_omega("vl-dnp")
    variants: list[tuple[dict, Method]] = []
    for name, rule in RULES.items():
        what = {"rule": name, "renewal": ""}
        static = Static(profile.static_prompt, omega, rule)
        variants.append(({"negatives": "static"} | what, static))
    for name, rule in RULES.items():
        what = {"negatives": "dynamic", "rule": name, "renewal": RENEWALS[0]}
        variants.append((what, dynamic(profile, vlm=vlm, rule=rule)))
    for renewal in RENEWALS[1:]:
        what = {"negatives": "dynamic", "rule": next(iter(RULES)), "renewal": str(renewal)}
        variants.append((what, dynamic(profile, vlm=vlm, renewal=renewal)))
    return _ablation(profile, "guidance-rule", variants, prompt_sets, max_prompts)
