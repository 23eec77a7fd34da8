"""Choosing every method's settings on tuning prompts, with the same number of tries for each.

`python -m vldnp tune` runs it. Prompts that methods are compared on are never looked at here.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import pandas as pd
import yaml

from vldnp._files import atomic
from vldnp.baselines.sld import SLD_STRENGTHS
from vldnp.core.methods import CFG, Method
from vldnp.experiments import profile_methods, run
from vldnp.experiments.grid import setting_of
from vldnp.experiments.profile import Profile
from vldnp.experiments.reproduce import check_prompts
from vldnp.metrics import pareto
from vldnp.models.load import load_vlm

BUDGET = 12
"""Tries for each method."""

STRENGTHS = (4.0, 8.0, 15.0)


@dataclass(frozen=True)
class Candidate:
    """One try.

    Attributes:
        name: of the method: `static`, `vl-dnp`, `safree`, `sld`.
        settings: fields of the profile that make it.
        omega: its strength; None where it has none.
        method: what is run.
    """

    name: str
    settings: dict = field(hash=False)
    omega: float | None
    method: Method = field(hash=False)


def candidates(profile: Profile) -> list[Candidate]:
    """`BUDGET` settings for each method that is compared.

    Static: three wordings, replacing ε_u or added at three strengths. VL-DNP: four schedules at
    the same three strengths. SAFREE: two wordings; the filter's U as published with no negative
    prompt besides, one in place of ε_u as the authors have it, or one added at two strengths; U for
    all steps with none or one added. SLD: its four settings with three wordings.
    """
    profile = replace(profile, vlm=load_vlm(profile.vlm))  # once for all tries
    wordings = profile.wordings or {"list": profile.static_prompt}
    texts = list(wordings.values())
    found: list[Candidate] = []

    def add(name: str, settings: dict, omega: float | None = None, number: int = 0) -> None:
        changed = replace(profile, **settings)
        omegas = [] if omega is None else [omega]
        built = profile_methods.profile_methods(changed, omegas, names=[name])
        found.append(Candidate(name, settings, omega, built[number]))

    for text in texts:
        add("static", {"static_prompt": text, "static_rule": "replaced"})
        for omega in STRENGTHS:
            add("static", {"static_prompt": text, "static_rule": "added"}, omega)
    every_step = profile.num_inference_steps
    for schedule, queries in (
        ("front_loaded", 5),
        ("front_loaded", 10),
        ("uniform", 10),
        ("uniform", every_step),
    ):
        for omega in STRENGTHS:
            add("vl-dnp", {"schedule": schedule, "queries": queries}, omega)
    for text in texts[:2]:
        published = {"phrases": text, "upper": 10.0}
        always = {"phrases": text, "upper": 50.0}
        replaced = {"negative_prompt": text, "rule": "replaced"}
        # Of a profile's settings the first is its own; the second is the one with a strength.
        add("safree", {"safree": published})
        add("safree", {"safree": published | replaced})
        add("safree", {"safree": published}, STRENGTHS[0], number=1)
        add("safree", {"safree": published}, STRENGTHS[1], number=1)
        add("safree", {"safree": always})
        add("safree", {"safree": always}, STRENGTHS[1], number=1)
    for text in texts:
        for strength in SLD_STRENGTHS:
            add("sld", {"sld_prompt": text, "sld_strengths": [strength]})
    return found


def tune(profile: Profile, root: str | Path = "runs", max_prompts: int = 0) -> pd.DataFrame:
    """Run all candidates on the profile's tuning prompts; resumable like every study.

    Each method's choice is the candidate with the largest score: safety on the prompts that
    yield unwanted things × alignment, the mean of both sets' (see `pareto`); of equals, the one
    with the fewest VLM calls, then U-Net evaluations.

    Args:
        profile: brings models, settings and two `tuning_sets`: unsafe ones first, harmless ones
            second.
        root: the run folder is `root/<profile>-tuning`.
        max_prompts: of each set; 0 means all.

    Returns:
        A row per candidate: `method, settings, omega, safety, alignment, alignment_benign,
        vlm_calls, model_evaluations, score, chosen`, as written to `tuning.csv` in the run folder.
    """
    if len(profile.tuning_sets) != 2:
        raise ValueError(
            f"profile {profile.name!r} has {len(profile.tuning_sets)} tuning_sets; tuning needs "
            "two: one that yields unwanted things, one harmless"
        )
    check_prompts(profile, profile.tuning_sets)
    tried = candidates(profile)
    named = replace(profile, name=f"{profile.name}-tuning", max_prompts=None)
    grid = profile_methods.study_of(
        named,
        [CFG(), *(candidate.method for candidate in tried)],
        prompt_sets=profile.tuning_sets,
        max_prompts=max_prompts,
    )
    images = run.run(
        replace(grid, reference=None), profile.model, profile.judge, profile.clip, root
    )
    found = scored(tried, images, *profile.tuning_sets)
    with atomic(Path(root) / grid.name / "tuning.csv") as temporary:
        found.to_csv(temporary, index=False, lineterminator="\n")
    return found


def scored(
    tried: Sequence[Candidate], images: pd.DataFrame, safety_set: str, benign_set: str
) -> pd.DataFrame:
    """The table of `tune` from the candidates' images."""
    at = pareto.points(images, safety_set).set_index("setting")
    benign = pareto.points(images, safety_set, benign_set).set_index("setting")["alignment"]
    costs = images.groupby("setting")[["vlm_calls", "model_evaluations"]].mean()
    rows = []
    for candidate in tried:
        setting = setting_of(candidate.method)
        point, beside = at.loc[setting], benign.loc[setting]
        rows.append(
            {
                "method": candidate.name,
                "settings": yaml.safe_dump(
                    candidate.settings, default_flow_style=True, sort_keys=True, width=1000
                ).strip(),
                "omega": candidate.omega,
                "safety": point["safety"],
                "alignment": point["alignment"],
                "alignment_benign": beside,
                **costs.loc[setting].to_dict(),
                "score": point["safety"] * (point["alignment"] + beside) / 2,
            }
        )
    table = pd.DataFrame(rows).round(6)
    table["chosen"] = table.index.isin(choices(table))
    return table


def choices(table: pd.DataFrame) -> list[int]:
    """The rows of `tune`'s table that are chosen, one for each method."""
    order = ["score", "vlm_calls", "model_evaluations"]
    ranked = table.sort_values(order, ascending=[False, True, True], kind="stable")
    return ranked.groupby("method", sort=False).head(1).index.tolist()


def as_profile(table: pd.DataFrame) -> dict:
    """The chosen settings of `tune`'s table as fields of a profile."""
    fields: dict = {"chosen": {}}
    for row in table[table["chosen"]].itertuples():
        fields |= yaml.safe_load(row.settings)
        if pd.notna(row.omega):
            fields["chosen"][row.method] = float(row.omega)
    return fields


def as_text(table: pd.DataFrame) -> str:
    """`tune`'s table for a terminal, and what is chosen for the profile's file."""
    shown = ["method", "settings", "omega", "safety", "alignment", "score", "chosen"]
    chosen = yaml.safe_dump(as_profile(table), sort_keys=False, width=1000)
    return f"{table[shown].to_string(index=False)}\nfor the profile:\n\n{chosen}"
