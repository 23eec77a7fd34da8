"""What the confirmatory study shows: the protocol's verdicts, from the parts that there are."""

from collections.abc import Iterable
from fnmatch import filter as matching
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from moji.study.protocol import Part, Protocol, methods_of, study_of_part
from vldnp.metrics.intervals import UNSAFE_THRESHOLD, Interval, interval, paired_difference
from vldnp.metrics.summary import summary
from vldnp.show import tables
from vldnp.show.markdown import Statement
from vldnp.study import claims, published
from vldnp.study.grid import Study, setting_of
from vldnp.study.profile import load_profile, set_name

IMAGE = ["setting", "prompt_set", "prompt_id", "seed"]


class Confirmed(NamedTuple):
    """The state of the confirmatory study.

    Attributes:
        verdicts: as of `claims.verdicts`, with the protocol's SHA-256; of the claims of which every
            comparison can be made.
        images: the rows of all parts that compare methods at their chosen settings.
        settings: method → its chosen setting, as in `images`.
        lacking: the parts that are neither published nor computed.
    """

    verdicts: pd.DataFrame
    images: pd.DataFrame
    settings: dict[str, str]
    lacking: list[str]


def confirmed(protocol: Protocol, root: str | Path = "runs") -> Confirmed:
    """The verdicts on the protocol's claims; nothing is computed but statistics.

    Comparisons of whole curves and of their ends are made on the parts that have strengths of
    their own, all others on the others. An image that two parts share counts once.

    Args:
        protocol: what was compared, and what is asked.
        root: where run folders lie, for parts that are not published.
    """
    profile = load_profile(protocol.profile)
    frames: dict[str, pd.DataFrame] = {}
    settings: dict[bool, dict[str, str]] = {False: {}, True: {}}  # at chosen ones, on curves
    fid: dict[str, Interval] = {}
    for name, part in protocol.parts.items():
        run = protocol.run_name(name)
        places = published.results_folder() / run, Path(root) / run
        folder = next((place for place in places if (place / "images.parquet").is_file()), None)
        if folder is None:
            continue
        rows = pd.read_parquet(folder / "images.parquet")
        frames[name] = _with_places(rows, study_of_part(protocol, name))
        methods = methods_of(profile, part).items()
        settings[bool(part.omegas)] |= {method: setting_of(some[0]) for method, some in methods}
        if (folder / "fid.csv").is_file():
            table = pd.read_csv(folder / "fid.csv").itertuples()
            fid |= {row.method: Interval(row.value, row.low, row.high) for row in table}

    def made(curves: bool) -> tuple[pd.DataFrame, pd.DataFrame]:
        parts = {name: p for name, p in protocol.parts.items() if bool(p.omegas) == curves}
        rows = pd.concat([frames[name] for name in parts if name in frames] or [pd.DataFrame()])
        if rows.empty:
            return rows, pd.DataFrame(columns=claims.COLUMNS)
        rows = rows.drop_duplicates(IMAGE)
        asked = [row for row in protocol.comparisons if _of_curves(row) == curves]
        held, there = _held(parts.values()), _held(parts[name] for name in parts if name in frames)
        partial = {row[0] for row in asked if not _wanted(row, protocol, held) <= there}
        whole = [row for row in asked if row[0] not in partial]
        return rows, claims.verdicts(rows, whole, settings[curves], fid, None, protocol.attacks)

    images, at_chosen = made(curves=False)
    _, on_curves = made(curves=True)
    found = pd.concat([at_chosen, on_curves], ignore_index=True).sort_values(
        "claim", kind="stable", ignore_index=True
    )
    lacking = [name for name in protocol.parts if name not in frames]
    return Confirmed(found.assign(protocol=protocol.digest[:12]), images, settings[False], lacking)


def said(found: Confirmed) -> Statement:
    """The verdicts in Markdown, claims first."""
    lacking = f"Not there yet: {', '.join(found.lacking)}." if found.lacking else ""
    if found.verdicts.empty:
        return Statement(f"No claim can be judged yet. {lacking}")
    parts = tables.claims(found.verdicts), lacking, tables.comparisons(found.verdicts)
    return Statement("\n\n".join(str(part) for part in parts if part))


def measured(found: Confirmed) -> pd.DataFrame:
    """What `metrics.summary.summary` makes of each method at its chosen setting."""
    names = {setting: name for name, setting in found.settings.items()}
    shown = summary(found.images.assign(method=found.images["setting"].map(names)))
    places = {name: i for i, name in enumerate(found.settings)}
    return shown.sort_values("method", key=lambda names: names.map(places), kind="stable")


def by_method(found: Confirmed) -> pd.DataFrame:
    """Metrics of each method at its chosen setting, a row for each prompt set."""
    if found.images.empty:
        return pd.DataFrame()
    shown = measured(found)
    shown = shown[shown["metric"].isin(["asr", "retention", "clip", "clip_i"])]
    return shown.pivot_table(index=["prompt_set", "method"], columns="metric", values="value")


def by_both_judges(found: Confirmed, second: pd.DataFrame) -> pd.DataFrame:
    """ASR by the study's judge and by another one, and VL-DNP's less each method's by either.

    Args:
        found: the study.
        second: `key, unsafe_probability` by the other judge; pictures that it was not asked about
            are left out, and prompt sets without any of VL-DNP's.

    Returns:
        A row for each prompt set and method; rates and paired differences with 95 % intervals.
    """
    names = {setting: name for name, setting in found.settings.items()}
    probability = second.set_index("key")["unsafe_probability"]
    first = found.images[found.images["key"].isin(probability.index)]
    first = first.assign(method=first["setting"].map(names))
    first = first[first["prompt_set"].isin(first[first["method"] == "vl-dnp"]["prompt_set"])]
    again = first.assign(unsafe=first["key"].map(probability) >= UNSAFE_THRESHOLD)
    rows = []
    for (prompt_set, method), own in first.groupby(["prompt_set", "method"], sort=False):
        row = {"prompt_set": prompt_set, "method": method, "n": len(own)}
        for judge, images in {"the study's judge": first, "the second": again}.items():
            images = images[images["prompt_set"] == prompt_set]
            theirs, ours = (images[images["method"] == name] for name in (method, "vl-dnp"))
            asr = interval(theirs["unsafe"].astype(float), theirs["prompt_id"])
            row[f"ASR, {judge}"] = "{:.3f} [{:.3f}, {:.3f}]".format(*asr)
            less = "{:+.3f} [{:+.3f}, {:+.3f}]".format(*paired_difference(ours, theirs, "unsafe"))
            row[f"VL-DNP's less, {judge}"] = "" if method == "vl-dnp" else less
        rows.append(row)
    return pd.DataFrame(rows).set_index(["prompt_set", "method"])


def _of_curves(comparison: claims.Comparison) -> bool:
    return comparison[4] == "hypervolume" or comparison[1] in claims.ENDS


def _held(parts: Iterable[Part]) -> set[tuple[str, str]]:
    """(method, prompt set) of all their images."""
    return {(method, name) for part in parts for method in part.methods for name in part.prompts}


def _wanted(
    comparison: claims.Comparison, protocol: Protocol, held: set[tuple[str, str]]
) -> set[tuple[str, str]]:
    """(method, prompt set) of the images that a comparison takes once all parts are there."""
    _, method, against, prompts, *_ = comparison
    sets = protocol.attacks if prompts == "attacks" else (prompts,)
    named = {name for name, _ in held}
    if method in claims.ENDS:
        method = against = "vl-dnp"
    wanted = {(one, name) for m in matching(named, method) for name in sets for one in (m, against)}
    return wanted & held


def _with_places(images: pd.DataFrame, study: Study) -> pd.DataFrame:
    """With the place of each prompt's scene, where its set says one."""
    prompts = pd.concat(
        study.prompts(source).assign(prompt_set=set_name(source)) for source in study.prompt_sets
    )
    places = prompts.set_index(["prompt_set", "prompt_id"])["place"]
    where = pd.MultiIndex.from_frame(images[["prompt_set", "prompt_id"]])
    return images.assign(place=places.reindex(where).replace("", None).to_numpy())
