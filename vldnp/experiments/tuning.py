"""Choosing every method's settings on tuning prompts, with the same number of tries for each.

`python -m vldnp tune` runs it. Prompts that methods are compared on are never looked at here.
Methods are compared at equal cost to harmless prompts: of the tries that keep `KEPT` of plain
CFG's retention on them, the one with the lowest ASR is chosen.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
import yaml

from vldnp._files import atomic
from vldnp.baselines.sld import SLD_STRENGTHS
from vldnp.core.methods import CFG, Method
from vldnp.experiments import profile_methods, run
from vldnp.experiments.grid import setting_of
from vldnp.experiments.profile import Profile, set_name
from vldnp.experiments.reproduce import check_prompts
from vldnp.models.load import load_vlm

BUDGET = 18
"""Tries for each method."""

KEPT = 0.95
"""The share of plain CFG's retention on harmless prompts that a setting must keep."""

STRENGTHS = (2.0, 4.0, 8.0, 11.0, 15.0)
MORE_STRENGTHS = (*STRENGTHS, 20.0)
SCHEDULES = (("front_loaded", 5), ("front_loaded", 10), ("uniform", 10))

SAFREE_GRID = {
    "alpha": (0.005, 0.01, 0.015, 0.03),
    "upper": (10.0, 20.0, 35.0, 50.0),
    "t0": (5.333, 4.0, 2.667),
    "k": (2.5, 1.0, 5.0),
    "mask": ("zero", "drop", "a"),
}
"""SAFREE's hyper-parameters: what tries are drawn from; the first t₀ and k are the paper's."""

SAFREE_SEED = 2611


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

    Static: three wordings, replacing ε_u or added at five strengths. VL-DNP: three schedules at
    six strengths. SAFREE: as published, alone and with the phrases in place of ε_u; the others
    drawn at random (Bergstra and Bengio, JMLR 2012) from `SAFREE_GRID`, two wordings, and no
    negative prompt, one in place of ε_u or one added at a strength of `STRENGTHS`. SLD: its four
    settings and the strongest with more momentum, with three wordings.
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
    for (schedule, queries), omega in product(SCHEDULES, MORE_STRENGTHS):
        add("vl-dnp", {"schedule": schedule, "queries": queries}, omega)
    for options, omega in safree_tries(texts[:2]):
        # Of a profile's settings the first is its own; the second is the one with a strength.
        add("safree", {"safree": options}, omega, number=int(omega is not None))
    for text, strength in product(texts, SLD_STRENGTHS):
        add("sld", {"sld_prompt": text, "sld_strengths": [strength]})
    for text, momentum in product(texts, (0.75, 1.0)):
        options = {"momentum_scale": momentum}
        add("sld", {"sld_prompt": text, "sld_strengths": ["max"], "sld_options": options})
    return found


def safree_tries(texts: Sequence[str]) -> list[tuple[dict, float | None]]:
    """`BUDGET` different arguments of `SAFREE`, each with the strength of an added negative prompt,
    or None."""
    replaced = {"negative_prompt": texts[0], "rule": "replaced"}
    tries = [({"phrases": texts[0]}, None), ({"phrases": texts[0]} | replaced, None)]
    rng = np.random.default_rng(SAFREE_SEED)
    while len(tries) < BUDGET:
        options = {"phrases": texts[rng.integers(len(texts))]}
        options |= {name: values[rng.integers(len(values))] for name, values in SAFREE_GRID.items()}
        kind = ("alone", "replaced", "added")[rng.integers(3)]
        omega = STRENGTHS[rng.integers(len(STRENGTHS))] if kind == "added" else None
        if kind == "replaced":
            options |= {"negative_prompt": options["phrases"], "rule": "replaced"}
        if (options, omega) not in tries:
            tries.append((options, omega))
    return tries


def tune(profile: Profile, root: str | Path = "runs", max_prompts: int = 0) -> pd.DataFrame:
    """Run all candidates on the profile's tuning prompts; resumable like every study.

    Args:
        profile: brings models, settings and `tuning_sets`: attacks, and last a harmless one.
        root: the run folder is `root/<profile>-tuning`.
        max_prompts: of each set; 0 means all.

    Returns:
        The table of `scored`, as written to `tuning.csv` in the run folder.
    """
    if len(profile.tuning_sets) < 2:
        raise ValueError(
            f"profile {profile.name!r} has {len(profile.tuning_sets)} tuning_sets; tuning needs "
            "two or more: some that yield unwanted things, the last one harmless"
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
    found = scored(tried, images, set_name(profile.tuning_sets[-1]))
    with atomic(Path(root) / grid.name / "tuning.csv") as temporary:
        found.to_csv(temporary, index=False, lineterminator="\n")
    return found


def scored(tried: Sequence[Candidate], images: pd.DataFrame, benign_set: str) -> pd.DataFrame:
    """A row per candidate, from its images and plain CFG's.

    Returns:
        `method, settings, omega`; `asr-<set>` for each attack and their mean `asr`; `kept`, the
        retention on harmless prompts relative to plain CFG's, or where no prompt names its things
        the CLIP score above chance relative to plain CFG's; `vlm_calls, model_evaluations`,
        `chosen`.
    """
    harmless = images[images["prompt_set"] == benign_set]
    attacks = images[images["prompt_set"] != benign_set]
    if harmless["retention"].notna().any():
        fidelity = harmless.groupby("setting")["retention"].mean()
    else:
        fidelity = (
            harmless.groupby("setting")["clip_score"].mean() - harmless["clip_chance"].iloc[0]
        )
    plain = setting_of(CFG())
    asr = attacks.pivot_table(index="setting", columns="prompt_set", values="unsafe", sort=False)
    costs = images.groupby("setting")[["vlm_calls", "model_evaluations"]].mean()
    rows = []
    for candidate in tried:
        setting = setting_of(candidate.method)
        settings = yaml.safe_dump(
            candidate.settings, default_flow_style=True, sort_keys=True, width=1000
        )
        rows.append(
            {
                "method": candidate.name,
                "settings": settings.strip(),
                "omega": candidate.omega,
                **{f"asr-{name}": value for name, value in asr.loc[setting].items()},
                "asr": asr.loc[setting].mean(),
                "kept": fidelity[setting] / fidelity[plain],
                **costs.loc[setting].to_dict(),
            }
        )
    table = pd.DataFrame(rows).round(6)
    table["chosen"] = table.index.isin(choices(table))
    return table


def choices(table: pd.DataFrame) -> list[int]:
    """The rows of `scored`'s table that are chosen, one for each method.

    Of the tries that keep enough of harmless prompts the lowest ASR, then what keeps more of them,
    then fewer VLM calls and U-Net evaluations; where none does, the one that keeps most.
    """
    missed = (KEPT - table["kept"]).clip(lower=0)
    order = {"missed": True, "asr": True, "kept": False}
    order |= {"vlm_calls": True, "model_evaluations": True}
    ranked = table.assign(missed=missed).sort_values(
        list(order), ascending=list(order.values()), kind="stable"
    )
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
    shown = ["method", "settings", "omega", "asr", "kept", "chosen"]
    chosen = yaml.safe_dump(as_profile(table), sort_keys=False, width=1000)
    return f"{table[shown].to_string(index=False)}\nfor the profile:\n\n{chosen}"
