"""Measuring pictures that anything else has made, as if a study had made them.

The rows are those of `images.parquet`, so that `pd.concat([ours, theirs])` brings them into tables,
Pareto figures and claims as one more method.
"""

import re
import warnings
from collections.abc import Iterator, Sequence
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
from vldnp.metrics.fid import Inception, distances, features
from vldnp.metrics.intervals import UNSAFE_THRESHOLD, paired_difference
from vldnp.metrics.summary import MEANS, table
from vldnp.models import load
from vldnp.models.clip import CLIPScore
from vldnp.models.judges import Judge
from vldnp.study.grid import digest, setting_of
from vldnp.study.profile import set_name
from vldnp.study.prompts import load_prompts, split_things
from vldnp.study.published import pixels_digest
from vldnp.study.reference import picture_files
from vldnp.study.run_clip import clip_i
from vldnp.study.run_folder import SAID, SPENT, opened

BATCH = 32

FID_IMAGES = 2500
"""FID and KID of fewer pictures say little (the README says how little), and are left out."""

SHOWN = 5
"""So many names are given of what is missing or too much."""


@dataclass(frozen=True)
class Scored:
    """What was measured.

    Attributes:
        images: a row per picture, as in `images.parquet`; `omega` and what an image takes are NaN.
        table: as `table.csv`; FID and KID are distances from the reference pictures.
        reference: rows of the reference pictures, under the method `cfg`; None without any.
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
    judge: Judge | str,
    clip: CLIPScore | str | None = None,
    *,
    name: str = "",
    reference: str | Path | None = None,
    unsafe_threshold: float = UNSAFE_THRESHOLD,
    progress: bool = True,
) -> Scored:
    """Measure the pictures of a folder.

    Args:
        folder: where they lie, at any depth.
        prompts: a prompt set, as `load_prompts` takes it. Which picture belongs to which prompt is
            said by a column `image` (a path in the folder), or by the pictures' names: these are or
            contain the `prompt_id`, perhaps followed by `_<seed>`.
        judge, clip: as in `run`.
        name: of the method in tables; by default the folder's.
        reference: a folder with plain pictures of the same prompts, found in the same way.
        unsafe_threshold: an image is unsafe from this probability on.
        progress: show bars.

    Raises:
        ValueError, FileNotFoundError: one line: a prompt has no picture, a name fits two prompts,
            a file is no picture.
    """
    folder, judge = Path(folder), load.load_judge(judge)
    clip = None if clip is None else load.load_clip(clip)
    name = name or folder.resolve().name

    def measured(folder: Path, method: str) -> pd.DataFrame:
        found = matched(folder, prompts)
        rows = found.assign(**_scores(found, folder, judge, clip, progress, method))
        rows["unsafe"] = rows["unsafe_probability"] >= unsafe_threshold
        return rows

    own, notes = measured(folder, name), []
    own = _as_rows(own, name, digest([name, sorted(own["pixels"])])[:12])
    if reference is None:
        return Scored(own, table(own))
    plain = _as_rows(measured(Path(reference), "cfg"), "cfg", setting_of(CFG()))
    if hasattr(clip, "chance"):
        chance = clip.chance(_pictures(plain, reference), list(plain["prompt"]))
        own, plain = (rows.assign(clip_chance=chance) for rows in (own, plain))
    places = {own["setting"].iloc[0]: folder, plain["setting"].iloc[0]: reference}

    def draw(rows: pd.DataFrame) -> list[Image.Image]:
        return _pictures(rows, places[rows["setting"].iloc[0]])

    own, plain = (rows.assign(clip_i=clip_i(rows, plain, draw, clip)) for rows in (own, plain))
    fid = {}
    if min(len(own), len(plain)) < FID_IMAGES:
        notes.append(
            f"FID and KID are left out: there are {len(own)} and {len(plain)} pictures, and "
            f"{FID_IMAGES} of each are the least that they mean something for"
        )
    else:
        try:
            space = judge if hasattr(judge, "features") else Inception(device=load.default_device())
        except OSError as error:
            notes.append(f"FID and KID are left out: {first_line(error)}")
        else:
            pair = (_features(rows, at, space) for rows, at in ((own, folder), (plain, reference)))
            where = own["setting"].iloc[0], own["prompt_set"].iloc[0]
            fid = {where: distances(*pair)}
    rows = []
    for metric in MEANS.values():
        if own[metric.column].notna().any() and plain[metric.column].notna().any():
            found = paired_difference(own, plain, metric.column)
            ends = {"difference": found.value, "low": found.low, "high": found.high}
            rows.append({"metric": metric.name, **ends, "n": own["prompt_id"].nunique()})
    return Scored(own, table(own, fid), plain, pd.DataFrame(rows), tuple(notes))


def save(scored: Scored, out: str | Path) -> Path:
    """Write the rows to a Parquet file, and the table beside it as CSV; returns the former's path.

    Args:
        scored: what was measured.
        out: the file, or a folder for `images.parquet` and `table.csv`.
    """
    path = Path(out)
    path = path / "images.parquet" if path.is_dir() else path
    beside = path.with_name("table.csv" if path.stem == "images" else f"{path.stem}-table.csv")
    with atomic(path) as temporary:
        scored.images.to_parquet(temporary, index=False)
    with atomic(beside) as temporary:
        scored.table.to_csv(temporary, index=False)
    return path


def matched(folder: Path, prompts: str | Path) -> pd.DataFrame:
    """The prompts of a set with their pictures: a row per picture, with `image` in the folder.

    A picture that no prompt has is left out, with a warning that names it.
    """
    table = load_prompts(prompts)
    files = {path.relative_to(folder).as_posix() for path in picture_files(folder)}
    if not files:
        raise FileNotFoundError(f"no pictures in {folder}: PNG, JPEG and WebP files are looked for")
    named = _image_column(prompts)
    if named is not None:
        if len(named) != len(table):
            raise ValueError(
                f"{prompts} has {len(named)} lines, and {len(table)} of them a prompt: its column "
                "image needs a prompt beside each picture"
            )
        found = table.assign(image=list(named))
        if lost := [image for image in found["image"] if image not in files]:
            raise ValueError(f"{folder} lacks {_some(lost, 'picture')} of {prompts}")
    else:
        found = _by_name(table, sorted(files), folder)
    if extra := sorted(files - set(found["image"])):
        warnings.warn(f"{_some(extra, 'picture')} in {folder} without a prompt", stacklevel=3)
    twice = found[found.duplicated(["prompt_id", "seed"], keep=False)]
    if len(twice):
        raise ValueError(
            f"{', '.join(twice['image'][:2])} in {folder} are pictures of the same prompt "
            f"{twice['prompt_id'].iloc[0]!r} with the same seed {twice['seed'].iloc[0]}"
        )
    return found.assign(prompt_set=set_name(prompts)).reset_index(drop=True)


def _by_name(table: pd.DataFrame, files: Sequence[str], folder: Path) -> pd.DataFrame:
    ids, rows = {str(i): n for n, i in enumerate(table["prompt_id"])}, []
    for file in files:
        stem = Path(file).stem
        own, seed = _identified(stem, ids, f"{folder / file}")
        if own is not None:
            row = table.iloc[ids[own]].to_dict() | {"image": file}
            rows.append(row if seed is None else row | {"seed": seed})
    found = pd.DataFrame(rows, columns=[*table, "image"])
    if lost := [i for i in ids if i not in set(found["prompt_id"])]:
        raise ValueError(f"{folder} has no picture of {_some(lost, 'prompt')}")
    order = found["prompt_id"].map(ids)
    return found.iloc[np.lexsort([found["seed"].astype("int64"), order])]


def _identified(stem: str, ids: dict[str, int], path: str) -> tuple[str | None, int | None]:
    """Whose picture a name says it is: the prompt's id, and the seed where it names one."""
    if stem in ids:
        return stem, None
    before, _, last = stem.rpartition("_")
    if before in ids and last.isdecimal():
        return before, int(last)
    # The id may stand anywhere in the name, as a word of its own; `_<seed>` may follow it.
    words = [m for i in ids for m in _word(i, stem)]
    longest = max((len(m[1]) for m in words), default=0)
    best = [m for m in words if len(m[1]) == longest]
    if len({m[1] for m in best}) > 1:
        both = " and ".join(sorted(repr(m[1]) for m in best)[:2])
        raise ValueError(f"{path} could be a picture of the prompts {both}; give a column image")
    if not best:
        return None, None
    return best[0][1], int(best[0][2]) if best[0][2] else None


def _word(name: str, stem: str) -> list[re.Match]:
    found = re.search(rf"(?<![0-9A-Za-z])({re.escape(name)})(?:_(\d+)$|(?![0-9A-Za-z]))", stem)
    return [found] if found and name else []


def _image_column(prompts: str | Path) -> pd.Series | None:
    path = Path(prompts)
    if path.suffix.lower() != ".csv" or not path.is_file():
        return None
    raw = pd.read_csv(path, dtype=str, keep_default_na=False, encoding="utf-8-sig")
    return raw["image"] if "image" in raw else None


def _scores(
    rows: pd.DataFrame,
    folder: Path,
    judge: Judge,
    clip: CLIPScore | None,
    progress: bool,
    name: str,
) -> dict[str, list]:
    """Column → measurements in the rows' order; pictures of one size go together."""
    sizes = [_picture(folder / image).size for image in rows["image"]]
    batches = list(_of_one_size(sizes))
    found: dict[int, dict] = {}
    for batch in tqdm(batches, desc=f"{name} scores", unit="batch", disable=not progress):
        some = rows.iloc[batch]
        images = _pictures(some, folder)
        things = [split_things(said) for said in some["things"]]
        texts = list(some["prompt"])
        with naming([f"{some['image'].iloc[i]} ({text!r})" for i, text in enumerate(texts)]):
            judged = judge(images)
            cosines = [np.nan] * len(images) if clip is None else clip(images, texts)
        columns = {
            "unsafe_probability": map(float, judged.unsafe_probability),
            "found": map(list, judged.found()),
            "retention": map(float, judged.retention(things)),
            "clip_score": map(float, cosines),
            "pixels": map(pixels_digest, images),
        }
        for i, *values in zip(batch, *columns.values(), strict=True):
            found[i] = dict(zip(columns, values, strict=True))
    return {column: [found[i][column] for i in range(len(rows))] for column in found[0]}


def _of_one_size(sizes: Sequence[tuple[int, int]]) -> Iterator[list[int]]:
    for size in dict.fromkeys(sizes):
        same = [i for i, other in enumerate(sizes) if other == size]
        yield from (same[start : start + BATCH] for start in range(0, len(same), BATCH))


def _pictures(rows: pd.DataFrame, folder: str | Path) -> list[Image.Image]:
    return [_picture(Path(folder) / image) for image in rows["image"]]


def _picture(path: Path) -> Image.Image:
    try:
        return opened(path)
    except OSError as error:
        raise ValueError(f"{path} is no picture: {first_line(error)}") from error


def _features(rows: pd.DataFrame, folder: str | Path, space) -> torch.Tensor:
    parts = range(0, len(rows), BATCH)
    return torch.cat([features(_pictures(rows.iloc[i : i + BATCH], folder), space) for i in parts])


def _as_rows(rows: pd.DataFrame, method: str, setting: str) -> pd.DataFrame:
    """The columns of `images.parquet`."""
    return pd.DataFrame(
        {
            "method": method,
            "omega": np.nan,
            "setting": setting,
            "vlm": None,
            **{c: rows[c] for c in ("prompt_set", "prompt_id", "prompt", "seed", "guidance_scale")},
            **{c: rows[c] for c in ("unsafe_probability", "unsafe", "found", "things")},
            **{c: rows[c] for c in ("retention", "clip_score")},
            "clip_i": np.nan,
            **dict.fromkeys(SPENT, np.nan),
            **{column: [[] for _ in rows.index] for column in SAID},
            "image": rows["image"],
            "key": rows["pixels"].str[:24],
            "batch": None,
            "clip_chance": np.nan,
        }
    )


def _some(names: Sequence[str], what: str) -> str:
    shown = ", ".join(map(str, names[:SHOWN]))
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"{len(names)} {what}{'s' * (len(names) > 1)} ({shown}{more})"
