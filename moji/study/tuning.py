"""Choosing every method's settings on tuning prompts, with the same number of tries for each.

`python -m vldnp tune` runs it. Prompts that methods are compared on are never looked at here.
Methods are compared at equal cost to harmless prompts: of the tries that keep `KEPT` of plain
CFG's retention on them, the one with the lowest ASR is chosen.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pandas as pd
import yaml

from vldnp._files import atomic, unknown
from vldnp.methods import CFG, Method
from vldnp.models.load import load, load_vlm
from vldnp.study import profile_methods, publishing, run
from vldnp.study.grid import Study, setting_of
from vldnp.study.profile import Profile, set_name
from vldnp.study.published import results_folder
from vldnp.study.reproduce import check_prompts

BUDGET = 18
"""Tries for each method."""

FIRST = 12
"""Of these came first. Static, VL-DNP and SAFREE had them before the others were tried; as one
choice lay at the end of its strengths, every method then got the rest."""

KEPT = 0.95
"""The share of plain CFG's retention on harmless prompts that a setting must keep."""

STRENGTHS = 3.0, 15.0
"""ω from and to, in equal ratios; a term that sums up several, or is only part of one, has
strengths of its own below."""

STRONG = 18.0, 40.0
"""ω from and to of the second round, for the last wording, which costs least."""

SCHEDULES = (("front_loaded", 5), ("front_loaded", 10), ("uniform", 10))

FINER = 11.0, 16.4, 25.0
"""ω of VL-DNP's second round, with its two schedules of most queries."""

SAFREE_GRID = {
    "alpha": (0.005, 0.01, 0.015, 0.03),
    "upper": (10.0, 20.0, 35.0, 50.0),
    "t0": (5.333, 4.0, 2.667),
    "k": (2.5, 1.0, 5.0),
    "mask": ("zero", "drop", "a"),
}
"""SAFREE's hyper-parameters: what tries are drawn from; the first t₀ and k are the paper's."""

SAFREE_BEST = {"alpha": 0.015, "upper": 20.0, "t0": 5.333, "k": 1.0, "mask": "zero"}
"""The choice of SAFREE's first round, from which its second goes on."""

NAGS = (
    *((omega, alpha) for alpha in (0.25, 0.5) for omega in (10.0, 4.0)),
    *((omega, alpha) for alpha in (0.25, 0.5) for omega in (16.0, 7.0, 2.0)),
    *((omega, 1.0) for omega in (10.0, 4.0, 16.0, 7.0, 2.0)),
    *((omega, 0.75) for omega in (10.0, 4.0, 16.0)),
)
"""φ and α of Normalized Attention Guidance; each wording's share of tries is so many of the first.
The authors' example is φ = 4 with α = 0.25, for four steps of a distilled model."""

BANK_GRID = {
    "strength": (0.33, 1.0, 2.0, 4.0, 8.0),
    "sigma": (0.25, 0.5, 1.0, 3.15),
    "until": (0.24, 0.5, 1.0),
    "kernel": ("gaussian", "laplacian"),
}
"""Safe Denoiser's; the first try is its authors' code's."""

SLDS = (
    *((strength, {}) for strength in ("max", "strong", "medium")),
    ("max", {"momentum_scale": 1.0}),
    *(
        (strength, {"momentum_scale": scale})
        for strength in ("strong", "medium")
        for scale in (1, 0.75)
    ),
    *((strength, {"warmup": 0}) for strength in ("strong", "medium")),
    ("max", {"momentum_scale": 0.75}),
    ("weak", {}),
    *((strength, {"momentum_scale": 0.9}) for strength in ("max", "strong", "medium")),
    ("weak", {"warmup": 0}),
    *(("weak", {"momentum_scale": scale, "momentum_beta": 0.7}) for scale in (0.75, 1)),
)
"""SLD's settings and changes of them; each wording's share of tries is so many of the first."""

DRAWN = 2611
"""Seed of what is drawn at random (Bergstra and Bengio, JMLR 2012)."""


@dataclass(frozen=True)
class Candidate:
    """One try.

    Attributes:
        name: of the method: `static`, `vl-dnp`, `safree`, `sld`, or one of `BASELINES`.
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

    The profile's wordings share a method's tries evenly, and what is left over goes to the first.
    Static: replacing ε_u, then added at a grid of strengths; Perp-Neg: a grid; both of them then at
    larger ones for the last wording. NAG: `NAGS`. VL-DNP: three schedules, then `FINER`. Summed and
    CASG: one negative prompt for each part of the wording `categories` (the first wording, where
    there is none); CASG by the added rule and by SLD's settings. SLD: `SLDS`. SAFREE: as published,
    alone and with the phrases in place of ε_u, then drawn at random, then the best of these with
    negative prompts of its own added. Safe Denoiser, where the profile has a bank: as published,
    then drawn at random.
    """
    # Opened once for all tries.
    profile = replace(profile, model=load(profile.model), vlm=load_vlm(profile.vlm))
    wordings = profile.wordings or {"list": profile.static_prompt}
    texts = list(wordings.values())
    parts = [part.strip() for part in wordings.get("categories", texts[0]).split(",")]
    found: list[Candidate] = []

    def add(name: str, settings: dict, omega: float | None = None, number: int = 0) -> None:
        changed = replace(profile, **settings)
        omegas = [] if omega is None else [omega]
        built = profile_methods.profile_methods(changed, omegas, names=[name])
        found.append(Candidate(name, settings, omega, built[number]))

    def add_baseline(name: str, options: dict) -> None:
        method = profile_methods.baseline(profile, name, options)
        found.append(Candidate(name, {"baselines": {name: options}}, method.omega, method))

    strong = strengths(BUDGET - FIRST, *STRONG)
    for text, share in shares(texts, FIRST):
        add("static", {"static_prompt": text, "static_rule": "replaced"})
        for omega in strengths(share - 1):
            add("static", {"static_prompt": text, "static_rule": "added"}, omega)
    for omega in strong:
        add("static", {"static_prompt": texts[-1], "static_rule": "added"}, omega)
    for schedule, queries in SCHEDULES:
        for omega in strengths(FIRST // len(SCHEDULES), 6, 20):
            add("vl-dnp", {"schedule": schedule, "queries": queries}, omega)
    for schedule, queries in SCHEDULES[1:]:
        for omega in FINER:
            add("vl-dnp", {"schedule": schedule, "queries": queries}, omega)
    for options, omega in safree_tries(texts):
        # Of a profile's settings the first is its own; the second is the one with a strength.
        add("safree", {"safree": options}, omega, number=int(omega is not None))
    for text, share in shares(texts, BUDGET):
        for strength, options in SLDS[:share]:
            add("sld", {"sld_prompt": text, "sld_strengths": [strength], "sld_options": options})
    for text, share in shares(texts, FIRST):
        for omega in strengths(share):
            add_baseline("perp-neg", {"negative_prompt": text, "omega": omega})
    for omega in strong:
        add_baseline("perp-neg", {"negative_prompt": texts[-1], "omega": omega})
    for text, share in shares(texts, BUDGET):
        for omega, alpha in NAGS[:share]:
            add_baseline("nag", {"negative_prompt": text, "omega": omega, "alpha": alpha})
    for omega in strengths(BUDGET, 1, 15):
        add_baseline("summed", {"negative_prompts": parts, "omega": omega})
    for omega in strengths(BUDGET - 3):
        add_baseline("casg", {"negative_prompts": parts, "omega": omega})
    for strength in ("medium", "strong", "max"):
        add_baseline("casg", {"negative_prompts": parts, "rule": f"sld-{strength}"})
    for options in bank_tries(profile.bank):
        add_baseline("safe-denoiser", options)
    return found


def shares(texts: Sequence[str], tries: int) -> list[tuple[str, int]]:
    """Each wording's share of so many tries."""
    rest = [(text, tries // len(texts)) for text in texts[1:]]
    return [(texts[0], tries - sum(share for _, share in rest)), *rest]


def strengths(count: int, least: float = STRENGTHS[0], most: float = STRENGTHS[1]) -> list[float]:
    """So many values of ω in equal ratios, in tenths."""
    return [round(float(omega), 1) for omega in np.geomspace(least, most, count)]


def safree_tries(texts: Sequence[str]) -> list[tuple[dict, float | None]]:
    """`BUDGET` different arguments of `SAFREE`, each with the strength of an added negative prompt,
    or None.

    Args:
        texts: the wordings; the first two give the phrases, the last the negative prompts of the
            second round, which also adds its phrases.
    """
    *_, last = texts
    texts = texts[:2]
    replaced = {"negative_prompt": texts[0], "rule": "replaced"}
    tries = [({"phrases": texts[0]}, None), ({"phrases": texts[0]} | replaced, None)]
    rng = np.random.default_rng(DRAWN)
    omegas = strengths(5)
    while len(tries) < FIRST:
        options = {"phrases": texts[rng.integers(len(texts))]}
        options |= {name: values[rng.integers(len(values))] for name, values in SAFREE_GRID.items()}
        kind = ("alone", "replaced", "added")[rng.integers(3)]
        omega = omegas[rng.integers(len(omegas))] if kind == "added" else None
        if kind == "replaced":
            options |= {"negative_prompt": options["phrases"], "rule": "replaced"}
        if (options, omega) not in tries:
            tries.append((options, omega))
    best = {"phrases": texts[-1]} | SAFREE_BEST
    tries += [(best | {"negative_prompt": last}, omega) for omega in (6.7, 15.0, 21.0, 30.0)]
    return [*tries, (best, 4.0), (best | {"phrases": texts[0]}, 5.0)]


def bank_tries(bank: str | None) -> list[dict]:
    """`BUDGET` different arguments of `Repelled`; none without a bank."""
    if bank is None:
        return []
    tries = [{"strength": 0.33, "sigma": 3.15, "until": 0.24, "kernel": "laplacian"}]
    rng = np.random.default_rng(DRAWN)
    while len(tries) < BUDGET:
        options = {name: values[rng.integers(len(values))] for name, values in BANK_GRID.items()}
        if options not in tries:
            tries.append(options)
    return tries


def tune(
    profile: Profile,
    root: str | Path = "runs",
    max_prompts: int = 0,
    names: Sequence[str] = (),
    workers: int | None = None,
    backend: str | None = None,
    publish: str = "",
) -> pd.DataFrame:
    """Run all candidates on the profile's tuning prompts; resumable like every study.

    Harmless prompts come first. A try that keeps too little of them is not tried on attacks: it
    cannot be chosen, unless none of its method's keeps more.

    Args:
        profile: brings models, settings and `tuning_sets`: attacks, and last a harmless one.
        root: the run folder is `root/<profile>-tuning`.
        max_prompts: of each set; 0 means all.
        names: of the methods to tune; none given means all.
        workers, backend: as in `vldnp.run`.
        publish: the name of a published run that this becomes, such as `<profile>-tuning`, so that
            a later one takes its images over; empty means none.

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
    if strange := set(names) - {candidate.name for candidate in tried}:
        raise unknown("method to tune", min(strange), {candidate.name for candidate in tried})
    tried = [candidate for candidate in tried if not names or candidate.name in names]
    *attacks, harmless = profile.tuning_sets

    def images_of(some: Sequence[Candidate], sets: Sequence[str], part: str) -> pd.DataFrame:
        grid = study_of_tries(profile, some, sets, part, max_prompts)
        models = profile.model, profile.judge, profile.clip
        # What is published here needs pictures of its own.
        how = {"workers": workers, "backend": backend, "recompute": bool(publish) or None}
        return run.run(grid, *models, root, **how)

    benign_set = set_name(harmless)
    images = images_of(tried, [harmless], "harmless")
    going_on = eligible(scored(tried, images, benign_set))
    on_attacks = images_of([tried[row] for row in going_on], attacks, "attacks")
    found = scored(tried, pd.concat([images, on_attacks], ignore_index=True), benign_set)
    folder = Path(root) / f"{profile.name}-tuning"
    with atomic(folder / "tuning.csv") as temporary:
        found.to_csv(temporary, index=False, lineterminator="\n")
    if publish:
        publishing.write(folder, results_folder() / publish, folder / "tuning.csv")
    return found


def study_of_tries(
    profile: Profile,
    some: Sequence[Candidate],
    sets: Sequence[str],
    part: str,
    max_prompts: int = 0,
) -> Study:
    """Some tries, and plain CFG, on some of the tuning sets."""
    grid = profile_methods.study_of(
        replace(profile, name=f"{profile.name}-tuning", max_prompts=None),
        [CFG(), *(candidate.method for candidate in some)],
        part=part,
        prompt_sets=sets,
        max_prompts=max_prompts,
    )
    return replace(grid, reference=None)


def eligible(table: pd.DataFrame) -> list[int]:
    """The rows that may be chosen: those that keep enough, or what keeps most of its method's."""
    most = table.groupby("method")["kept"].transform("max")
    return table.index[table["kept"] >= np.minimum(KEPT, most)].tolist()


def scored(tried: Sequence[Candidate], images: pd.DataFrame, benign_set: str) -> pd.DataFrame:
    """A row per candidate, from its images and plain CFG's.

    Returns:
        `method, settings, omega`; `asr-<set>` for each attack and their mean `asr`, empty where
        there are no images of attacks; `kept`, the
        retention on harmless prompts relative to plain CFG's, or where no prompt names its things
        the CLIP score above chance relative to plain CFG's; `vlm_calls, model_evaluations`,
        `chosen`.
    """
    harmless = images[images["prompt_set"] == benign_set]
    attacks = images[images["prompt_set"] != benign_set]
    of_attacks = attacks.pivot_table(
        index="setting", columns="prompt_set", values="unsafe", sort=False
    )
    if harmless["retention"].notna().any():
        fidelity = harmless.groupby("setting")["retention"].mean()
    else:
        fidelity = (
            harmless.groupby("setting")["clip_score"].mean() - harmless["clip_chance"].iloc[0]
        )
    plain = setting_of(CFG())
    costs = images.groupby("setting")[["vlm_calls", "model_evaluations"]].mean()
    rows = []
    for candidate in tried:
        setting = setting_of(candidate.method)
        asr = of_attacks.reindex([setting]).loc[setting]
        settings = yaml.safe_dump(
            candidate.settings, default_flow_style=True, sort_keys=True, width=1000
        )
        rows.append(
            {
                "method": candidate.name,
                "settings": settings.strip(),
                "omega": candidate.omega,
                **{f"asr-{name}": value for name, value in asr.items()},
                "asr": asr.mean(),
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
    fields: dict = {"chosen": {}, "baselines": {}}
    for row in table[table["chosen"]].itertuples():
        settings = yaml.safe_load(row.settings)
        fields["baselines"] |= settings.pop("baselines", {})
        fields |= settings
        if pd.notna(row.omega):
            fields["chosen"][row.method] = float(row.omega)
    return fields


def as_text(table: pd.DataFrame) -> str:
    """`tune`'s table for a terminal, and what is chosen for the profile's file."""
    shown = ["method", "settings", "omega", "asr", "kept", "chosen"]
    chosen = yaml.safe_dump(as_profile(table), sort_keys=False, width=1000)
    return f"{table[shown].to_string(index=False)}\nfor the profile:\n\n{chosen}"
