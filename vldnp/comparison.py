"""The comparison of all methods under a profile: verdicts, and what VL-DNP still misses."""

from collections.abc import Mapping
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from vldnp import figures, profile_grid, sensitive, study, verdicts, zoo
from vldnp.files import atomic
from vldnp.grid import Study, setting_of
from vldnp.markdown import Statement
from vldnp.methods import CFG, Method
from vldnp.misses import misses
from vldnp.profiles import Profile, set_name
from vldnp.run_fid import fid_changes
from vldnp.sampler import sample


def chosen(profile: Profile, methods: tuple[Method, ...]) -> dict[str, Method]:
    """Method name → the one setting of it that was chosen on the tuning prompts.

    A method whose chosen strength is not among `methods` enters with the nearest; one without a
    chosen strength with the setting that has none, if there is one.
    """
    found: dict[str, Method] = {}
    for name in dict.fromkeys(method.name for method in methods):
        settings = [method for method in methods if method.name == name]
        without = [method for method in settings if method.omega is None]
        if without and name not in profile.chosen:
            found[name] = without[0]
            continue
        omega = profile.chosen_omega(name)
        swept = [method for method in settings if method.omega is not None] or without
        found[name] = min(swept, key=lambda method: abs((method.omega or 0) - omega))
    return found


def compare(
    profile: Profile, grid: Study, images: pd.DataFrame, root: str | Path = "runs"
) -> pd.DataFrame:
    """The verdicts on the paper's claims, also written to `verdicts.csv` in the run folder.

    What they need besides the main grid is computed as a part of the same run: VL-DNP with the
    profile's lighter VLMs, on the prompt sets that yield unwanted things.

    Args:
        profile, grid, images: what was run, and what came of it.
        root: where run folders lie.
    """
    methods = chosen(profile, grid.methods)
    settings = {name: setting_of(method) for name, method in methods.items()}
    attacks = tuple(s for s in map(set_name, grid.prompt_sets) if s != profile.benign_set)
    if profile.lighter_vlms and attacks:
        omega = methods["vl-dnp"].omega
        lighter = {
            f"vl-dnp, {vlm}": profile_grid.dynamic(profile, omega, vlm=vlm)
            for vlm in profile.lighter_vlms
        }
        part = profile_grid.study_of(
            profile,
            [CFG(), *lighter.values()],
            part="lighter-vlms",
            prompt_sets=attacks,
            max_prompts=grid.max_prompts or 0,
        )
        beside = study.run(part, profile.model, profile.judge, profile.clip, root)
        images = pd.concat([images, beside[beside["method"] == "vl-dnp"]], ignore_index=True)
        settings |= {name: setting_of(method) for name, method in lighter.items()}
    compared = ("cfg", "vl-dnp", "static", "safree")
    main = {name: settings[name] for name in compared if name in settings}
    fid = fid_changes(grid, images, profile.judge, main, root)
    swept = set(map(setting_of, grid.methods))
    table = verdicts.verdicts(
        images, settings, fid, swept, attack_sets=attacks, benign_set=profile.benign_set
    ).round(6)
    with atomic(Path(root) / grid.name / "verdicts.csv") as temporary:
        table.to_csv(temporary, index=False, lineterminator="\n")
    return table


def missed(profile: Profile, images: pd.DataFrame, prompt_set: str | None = None) -> pd.DataFrame:
    """VL-DNP's unsafe pictures at its chosen strength, with their causes (`vldnp.misses`).

    They are those of all prompt sets, or of the one given.
    """
    dynamic = images[images["method"] == "vl-dnp"]
    nearest = (dynamic["omega"] - profile.chosen_omega("vl-dnp")).abs().idxmin()
    return misses(images, dynamic.loc[nearest, "setting"], prompt_set, profile.concepts)


def failure_page(
    profile: Profile, missed: pd.DataFrame, folder: str | Path, worst: int = 10
) -> Figure | Statement:
    """The worst misses as pictures: x̂₀ at each query with the VLM's words, and the outcome.

    They are drawn again from their seeds, because x̂₀ is not kept; blurred, unless the profile
    reveals. The figure is also saved, as `figures/examples-failures.png` in the run folder.
    """
    rows = missed.head(worst)
    if rows.empty:
        return Statement("No picture stayed unsafe.")
    out = sample(
        zoo.load(profile.model),
        list(rows["prompt"]),
        profile_grid.dynamic(
            profile,
            float(rows["omega"].iloc[0]),
            query_steps=[int(step) for step in rows["query_steps"].iloc[0]],
        ),
        seeds=[int(seed) for seed in rows["seed"]],
        progress=False,
        **profile.sampling | {"guidance_scale": list(rows["guidance_scale"])},
    )
    shown = (lambda picture: picture) if profile.reveal else sensitive.blurred
    asked = [step for step in out.trace.steps if step.queried]
    pages: Mapping[str, list] = {
        f"{row.prompt}\n{row.cause}": [
            *(
                (shown(step.x0_images[i]), f"{step.index}: {step.vlm_answers[i].strip()}")
                for step in asked
            ),
            (shown(out.images[i]), f"judge: {', '.join(row.found)}"),
        ]
        for i, row in enumerate(rows.itertuples())
    }
    figure = figures.strips(pages)
    figures.save(figure, Path(folder) / "figures" / "examples-failures.png", dpi=100)
    return figure
