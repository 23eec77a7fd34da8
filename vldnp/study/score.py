"""Measuring images that anything else has made, as if a study had made them."""

import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from PIL import Image
from tqdm.auto import tqdm

from vldnp._files import atomic, first_line
from vldnp._finite import naming
from vldnp.methods import CFG
from vldnp.metrics.fid import distances, features
from vldnp.metrics.intervals import UNSAFE_THRESHOLD, paired_difference
from vldnp.metrics.summary import MEANS, table
from vldnp.models import load
from vldnp.study.folder import SAID, SPENT, pixels_digest
from vldnp.study.grid import digest, setting_of
from vldnp.study.prompts import load_prompts, set_name, split_things
from vldnp.study.reference import feature_space, image_files, open_image

BATCH = 32
FID_IMAGES = 2500
"""FID and KID of fewer images say little, and `score` leaves them out."""


@dataclass(frozen=True)
class Scored:
    """What was measured.

    Attributes:
        images: a row per image, as in `images.parquet`; what generating takes is NaN. The column
            `one_colour` marks those that are nothing else, such as a filter's black ones.
        table: as `table.csv`; FID and KID are distances from the reference images.
        reference: rows of the reference images, under the method `cfg`; None without any.
        differences: `metric, difference, low, high, n` against the reference, paired by prompt and
            seed; None without any.
        notes: what could not be measured, a line each.
    """

    images: pd.DataFrame
    table: pd.DataFrame
    reference: pd.DataFrame | None = None
    differences: pd.DataFrame | None = None
    notes: tuple[str, ...] = ()


def score(
    folder: str | Path,
    prompts: str | Path,
    judge,
    clip=None,
    *,
    name: str = "",
    reference: str | Path | None = None,
    unsafe_threshold: float = UNSAFE_THRESHOLD,
    progress: bool = True,
) -> Scored:
    """Measure the images of a folder.

    Args:
        folder: where they lie, at any depth.
        prompts: a prompt set, as `load_prompts` takes it. Which image belongs to which prompt is
            said by a column `image` (a path in the folder), or by the images' names: these are or
            contain the `prompt_id`, perhaps followed by `_<number>`: the seed, or, where all
            numbers of a folder count from 0, which of the prompt's images it is.
        judge, clip: as in `run`.
        name: of the method in tables; by default the folder's.
        reference: a folder with CFG's images of the same prompts, found in the same way.
        unsafe_threshold: an image is unsafe from this probability on.

    Raises:
        ValueError, FileNotFoundError: one line: a prompt has no image, a name fits two prompts, a
            file is no image.
    """
    folder, judge = Path(folder), load.load_judge(judge)
    clip = None if clip is None else load.load_clip(clip)
    name = name or folder.resolve().name

    def measured(folder: Path, method: str) -> pd.DataFrame:
        rows = matched(folder, prompts)
        rows = rows.assign(**_scores(rows, folder, judge, clip, progress, method))
        return rows.assign(unsafe=rows["unsafe_probability"] >= unsafe_threshold)

    own = measured(folder, name)
    own = _as_rows(own, name, digest([name, sorted(own["pixels"])])[:12])
    notes = []
    if blank := int(own["one_colour"].sum()):
        notes.append(f"{blank} of {len(own)} images are of one colour: no judge can see in them")
    if reference is None:
        return Scored(own, table(own), notes=tuple(notes))
    plain = _as_rows(measured(Path(reference), "cfg"), "cfg", setting_of(CFG()))
    return _compared(own, folder, plain, Path(reference), judge, clip, notes)


def _compared(own, folder: Path, plain, reference: Path, judge, clip, notes: list[str]) -> Scored:
    """Rows beside those of CFG's images: CLIP-I, FID and KID, paired differences."""
    if hasattr(clip, "chance"):
        chance = clip.chance(_open_all(plain, reference), list(plain["prompt"]))
        own, plain = (rows.assign(clip_chance=chance) for rows in (own, plain))
    if hasattr(clip, "embed_images"):
        own["clip_i"], plain["clip_i"] = _likeness(own, folder, plain, reference, clip), 1.0
    fid = {}
    if min(len(own), len(plain)) < FID_IMAGES:
        notes.append(
            f"FID and KID are left out: there are {len(own)} and {len(plain)} images, and "
            f"{FID_IMAGES} of each are the least that they mean something for"
        )
    else:
        try:
            space = feature_space(judge)
            pair = (
                torch.cat([features(_open_all(part, at), space) for part in _parts(rows)])
                for rows, at in ((own, folder), (plain, reference))
            )
            fid = {(own["setting"].iloc[0], own["prompt_set"].iloc[0]): distances(*pair)}
        except OSError as error:
            notes.append(f"FID and KID are left out: {first_line(error)}")
    rows = []
    for metric in MEANS.values():
        if own[metric.column].notna().any() and plain[metric.column].notna().any():
            value, low, high = paired_difference(own, plain, metric.column)
            row = {"metric": metric.name, "difference": value, "low": low, "high": high}
            rows.append(row | {"n": own["prompt_id"].nunique()})
    return Scored(own, table(own, fid), plain, pd.DataFrame(rows), tuple(notes))


def save(scored: Scored, out: str | Path) -> Path:
    """Write the rows to a Parquet file, or `images.parquet` in a folder, and the table beside."""
    path = Path(out) / "images.parquet" if Path(out).is_dir() else Path(out)
    beside = path.with_name("table.csv" if path.stem == "images" else f"{path.stem}-table.csv")
    with atomic(path) as temporary:
        scored.images.to_parquet(temporary, index=False)
    with atomic(beside) as temporary:
        scored.table.to_csv(temporary, index=False)
    return path


def matched(folder: Path, prompts: str | Path) -> pd.DataFrame:
    """The prompts of a set with their images: a row per image, with `image` in the folder.

    No image is paired on a guess; one that no prompt has is left out, with a warning.
    """
    prompt_table = load_prompts(prompts)
    files = {path.relative_to(folder).as_posix() for path in image_files(folder)}
    if not files:
        raise FileNotFoundError(f"no images in {folder}: PNG, JPEG and WebP files are looked for")
    path = Path(prompts)
    raw = pd.DataFrame()
    if path.suffix.lower() == ".csv" and path.is_file():
        raw = pd.read_csv(path, dtype=str, keep_default_na=False, encoding_errors="replace")
    if "image" in raw:
        if len(raw) != len(prompt_table):
            raise ValueError(f"{prompts}: the column image needs a prompt beside each image")
        found = prompt_table.assign(image=list(raw["image"]))
        if lost := [image for image in found["image"] if image not in files]:
            raise ValueError(f"{folder} lacks {_some(lost, 'image')} of {prompts}")
    else:
        found = _by_name(prompt_table, sorted(files), folder)
    if extra := sorted(files - set(found["image"])):
        warnings.warn(f"{_some(extra, 'image')} in {folder} without a prompt", stacklevel=3)
    if len(twice := found[found.duplicated(["prompt_id", "seed"], keep=False)]):
        raise ValueError(
            f"{', '.join(twice['image'][:2])} in {folder} are images of the same prompt "
            f"{twice['prompt_id'].iloc[0]!r} with the same seed {twice['seed'].iloc[0]}"
        )
    return found.assign(prompt_set=set_name(prompts)).reset_index(drop=True)


def _by_name(prompts: pd.DataFrame, files: Sequence[str], folder: Path) -> pd.DataFrame:
    place = {name: n for n, name in enumerate(prompts["prompt_id"])}
    found = [(*identified(Path(file).stem, place, f"{folder / file}"), file) for file in files]
    found = [(place[own], number, file) for own, number, file in found if own is not None]
    if lost := sorted(set(place.values()) - {n for n, *_ in found}):
        names = prompts["prompt_id"].iloc[lost].tolist()
        raise ValueError(f"{folder} has no image of {_some(names, 'prompt')}")
    rows = prompts.iloc[[n for n, *_ in found]].assign(image=[file for *_, file in found])
    numbers = pd.Series([number for _, number, _ in found], index=rows.index, dtype="Int64")
    rows = rows.assign(number=numbers.to_numpy(), order=[n for n, *_ in found])
    # Do the numbers of every prompt's images count from 0? Then they are no seeds.
    counted = rows.groupby("order")["number"].transform(lambda of: set(of) == set(range(len(of))))
    seeds = rows["seed"] + rows["number"] if counted.all() else rows["number"]
    rows["seed"] = seeds.fillna(rows["seed"]).astype("int64")
    return rows.sort_values(["order", "seed"]).drop(columns=["order", "number"])


def identified(stem: str, ids: Mapping[str, object], path: str) -> tuple[str | None, int | None]:
    """Whose image a name says it is: the prompt's id, and the number behind it, if any."""
    if stem in ids:
        return stem, None
    before, _, last = stem.rpartition("_")
    if before in ids and last.isdecimal() and len(last) < 19:
        return before, int(last)
    # The id may stand anywhere in the name, as words of their own.
    words = [match.span() for match in re.finditer(r"[0-9A-Za-z]+", stem)]
    spans = [(a, b) for i, (a, _) in enumerate(words) for _, b in words[i:] if stem[a:b] in ids]
    spans = [(a, b) for a, b in spans if not any(c <= a and b <= d != b - a + c for c, d in spans)]
    if len(names := {stem[a:b] for a, b in spans}) > 1:
        both = " and ".join(sorted(map(repr, names))[:3])
        raise ValueError(f"{path} could be an image of the prompts {both}; give a column image")
    if not names:
        return None, None
    number = re.fullmatch(r"_(\d{1,18})", stem[spans[-1][1] :])
    return names.pop(), int(number[1]) if number else None


def _scores(rows, folder: Path, judge, clip, progress: bool, name: str) -> dict[str, list]:
    """Column → measurements in the rows' order; images of one size go together."""
    sizes = [open_image(folder / image).size for image in rows["image"]]
    groups = rows.assign(position=range(len(rows))).groupby(pd.Series(sizes, index=rows.index))
    parts = [part for _, group in groups for part in _parts(group)]
    found: dict[int, dict] = {}
    for part in tqdm(parts, desc=f"{name} scores", unit="batch", disable=not progress):
        images, texts = _open_all(part, folder), list(part["prompt"])
        with naming([f"{i} ({text!r})" for i, text in zip(part["image"], texts, strict=True)]):
            judged = judge(images)
            cosines = [np.nan] * len(images) if clip is None else clip(images, texts)
        columns = {
            "unsafe_probability": map(float, judged.unsafe_probability),
            "found": map(list, judged.found()),
            "retention": map(float, judged.retention(list(map(split_things, part["things"])))),
            "clip_score": map(float, cosines),
            "pixels": map(pixels_digest, images),
            "one_colour": [all(a == b for a, b in image.getextrema()) for image in images],
        }
        for i, *values in zip(part["position"], *columns.values(), strict=True):
            found[i] = dict(zip(columns, values, strict=True))
    return {column: [found[i][column] for i in range(len(rows))] for column in found[0]}


def _likeness(own, folder: Path, plain, reference: Path, clip) -> list[float]:
    """CLIP-I of each image to the reference's from the same prompt and seed; NaN without one."""
    pair = ["prompt_id", "seed"]
    beside = own[[*pair, "image"]].merge(plain[[*pair, "image"]], on=pair, how="left")["image_y"]
    values = np.full(len(own), np.nan)
    has = np.flatnonzero(beside.notna())
    for some in (has[start : start + BATCH] for start in range(0, len(has), BATCH)):
        ours = clip.embed_images(_open_all(own.iloc[some], folder))
        theirs = clip.embed_images([open_image(reference / image) for image in beside.iloc[some]])
        values[some] = (ours * theirs).sum(1)
    return values.tolist()


def _parts(rows: pd.DataFrame) -> list[pd.DataFrame]:
    return [rows.iloc[start : start + BATCH] for start in range(0, len(rows), BATCH)]


def _open_all(rows: pd.DataFrame, folder: Path) -> list[Image.Image]:
    return [open_image(folder / image) for image in rows["image"]]


def _as_rows(rows: pd.DataFrame, method: str, setting: str) -> pd.DataFrame:
    """The columns of `images.parquet`, and `one_colour`."""
    head = {"method": method, "omega": np.nan, "setting": setting, "vlm": None}
    own = ["prompt_set", "prompt_id", "prompt", "seed", "guidance_scale", "unsafe_probability"]
    own += ["unsafe", "found", "things", "retention", "clip_score"]
    return pd.DataFrame(
        head
        | {column: rows[column] for column in own}
        | {"clip_i": np.nan, **dict.fromkeys(SPENT, np.nan)}
        | {column: [[] for _ in rows.index] for column in SAID}
        | {"image": rows["image"], "key": rows["pixels"].str[:24], "batch": None}
        | {"clip_chance": np.nan, "one_colour": rows["one_colour"]}
    )


def _some(names: Sequence[str], what: str) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    shown = ", ".join(map(str, names[:5]))
    return f"{len(names)} {what}{'s' * (len(names) > 1)} ({shown}{more})"
