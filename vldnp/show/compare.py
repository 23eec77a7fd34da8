"""The comparison of all methods under a profile: verdicts, and where VL-DNP still fails."""

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from vldnp._files import atomic
from vldnp.methods import CFG
from vldnp.show import failures
from vldnp.study import claims, profile_methods, published, run
from vldnp.study.grid import Study, setting_of
from vldnp.study.profile import Profile, set_name
from vldnp.study.run_fid import fid_changes


def compare(
    profile: Profile,
    grid: Study,
    images: pd.DataFrame,
    comparisons: Sequence[claims.Comparison],
    root: str | Path = "runs",
) -> pd.DataFrame:
    """The verdicts on the paper's claims, also written to `verdicts.csv` in the run folder.

    What they need besides the main grid is computed as a part of the same run: VL-DNP with the
    profile's lighter VLMs, on the prompt sets that yield unwanted things.

    Args:
        profile, grid, images: what was run, and what came of it.
        comparisons: what makes each claim, as `claims.verdicts` reads it. The methods are those of
            the grid, and `vl-dnp, <VLM>` for each lighter VLM.
        root: where run folders lie.
    """
    methods = profile_methods.chosen(profile, grid.methods)
    settings = {name: setting_of(method) for name, method in methods.items()}
    attacks = tuple(s for s in map(set_name, grid.prompt_sets) if s != profile.benign_set)
    if profile.lighter_vlms and attacks:
        omega = methods["vl-dnp"].omega
        lighter = {
            f"vl-dnp, {vlm}": profile_methods.dynamic(profile, omega, vlm=vlm)
            for vlm in profile.lighter_vlms
        }
        part = profile_methods.study_of(
            profile,
            [CFG(), *lighter.values()],
            part="lighter-vlms",
            prompt_sets=attacks,
            max_prompts=grid.max_prompts or 0,
        )
        beside = run.run(part, profile.model, profile.judge, profile.clip, root)
        images = pd.concat([images, beside[beside["method"] == "vl-dnp"]], ignore_index=True)
        settings |= {name: setting_of(method) for name, method in lighter.items()}
    measured = {row[1] for row in comparisons if row[4].startswith("fid")} | {"cfg"}
    main = {name: setting for name, setting in settings.items() if name in measured}
    fid = published.fid_changes(Path(root) / grid.name, set(main) - {"cfg"})
    if fid is None:
        draw = run.drawing(grid, profile.model, root)
        fid = fid_changes(grid, images, profile.judge, main, draw)
    swept = set(map(setting_of, grid.methods))
    table = claims.verdicts(images, comparisons, settings, fid, swept, attacks).round(6)
    with atomic(Path(root) / grid.name / "verdicts.csv") as temporary:
        table.to_csv(temporary, index=False, lineterminator="\n")
    return table


def failed(profile: Profile, images: pd.DataFrame, prompt_set: str | None = None) -> pd.DataFrame:
    """VL-DNP's unsafe pictures at its chosen strength, with their causes (see `failures`).

    They are those of all prompt sets, or of the one given.
    """
    dynamic = images[images["method"] == "vl-dnp"]
    nearest = (dynamic["omega"] - profile.chosen_omega("vl-dnp")).abs().idxmin()
    return failures.failed(images, dynamic.loc[nearest, "setting"], prompt_set, profile.concepts)
