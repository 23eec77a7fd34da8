"""Measuring images that anything else has made, as if a study had made them."""

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from PIL import Image
from tqdm.auto import tqdm

from vldnp._files import first_line
from vldnp._finite import naming
from vldnp.methods import CFG
from vldnp.metrics.fid import distances, features
from vldnp.metrics.intervals import UNSAFE_THRESHOLD, paired_difference
from vldnp.metrics.summary import MEANS, table
from vldnp.models import load
from vldnp.study.folder import SPENT, pixels_digest
from vldnp.study.grid import digest, setting_of
from vldnp.study.prompts import load_prompts, read_table, set_name, split_things
from vldnp.study.reference import feature_space, image_files, open_image

FID_IMAGES = 2500
"""FID and KID of fewer images say little, and `score` leaves them out."""


class Scored(NamedTuple):
    images: pd.DataFrame
    table: pd.DataFrame
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
    """Measure the images of a folder, at any depth and of any sizes.

    `prompts` is a prompt set, as `load_prompts` takes it. Which image belongs to which prompt is
    said by a column `image` of its file (a path in the folder), or by the images' names, which are
    then `<prompt_id>` or `<prompt_id>_<seed>`. `judge` and `clip` are as in `run`, `name` is that
    of the method in tables (by default the folder's), and `reference` a folder with CFG's images
    of the same prompts and seeds, named alike.

    `images` have columns of `images.parquet`, where what generating takes is NaN; `one_colour`
    marks those of nothing else, such as a filter's black ones. `table` is as `table.csv`, with FID
    and KID from the reference, and `differences` from it are paired by prompt and seed.

    Raises:
        ValueError, FileNotFoundError: a prompt has no image, a name fits no prompt or two, a file
            is no image; one line.
    """
    judge, clip = load.load_judge(judge), None if clip is None else load.load_clip(clip)

    def measured(folder: Path, method: str) -> pd.DataFrame:
        rows = matched(folder, prompts)
        same = rows.groupby(rows["file"].map(lambda file: open_image(file).size))
        parts = [part for _, some in same for part in _parts(some)]
        parts = tqdm(parts, desc=f"{method} scores", unit="batch", disable=not progress)
        rows = pd.concat([_judged(part, judge, clip) for part in parts]).loc[rows.index]
        unsafe = rows["unsafe_probability"] >= unsafe_threshold
        setting = digest([method, sorted(rows["pixels"])])[:12]
        return rows.assign(unsafe=unsafe, method=method, setting=setting)

    own = measured(Path(folder), name or Path(folder).resolve().name)
    blank, fid, differences = own["one_colour"].sum(), {}, None
    notes = [f"{blank} of {len(own)} images are of one colour: no judge sees in them"] * bool(blank)
    if reference is not None:
        plain = measured(Path(reference), "cfg").assign(setting=setting_of(CFG()))
        columns = {m.name: m.column for m in MEANS.values() if own[m.column].notna().any()}
        found = {name: paired_difference(own, plain, column) for name, column in columns.items()}
        differences = pd.DataFrame(found, ["difference", "low", "high"]).T
        try:
            if (least := min(len(own), len(plain))) < FID_IMAGES:
                raise OSError(f"there are {least} images, and {FID_IMAGES} of each are needed")
            space, setting = feature_space(judge), tuple(own[["setting", "prompt_set"]].iloc[0])
            sides = ([features(_open(p), space) for p in _parts(rows)] for rows in (own, plain))
            fid[setting] = distances(*map(torch.cat, sides))
        except OSError as error:  # without a network Inception's weights cannot be fetched
            notes.append(f"FID and KID are left out: {first_line(error)}")
    return Scored(own.drop(columns="file"), table(own, fid), differences, tuple(notes))


def matched(folder: Path, prompts: str | Path) -> pd.DataFrame:
    """A row per image with its prompt: `image` is its path in the folder, `file` its path."""
    table, path = load_prompts(prompts), Path(prompts)
    files = {file.relative_to(folder).as_posix(): file for file in image_files(folder)}
    if not files:
        raise FileNotFoundError(f"no images in {folder}: PNG, JPEG and WebP files are looked for")
    if path.is_file() and "image" in (raw := read_table(path)):
        if len(raw) != len(table):
            raise ValueError(f"{prompts}: the column image needs a prompt beside each image")
        rows = table.assign(image=list(raw["image"]))
        lacking = set(rows["image"]) - files.keys()
    else:
        seeds = dict(zip(table["prompt_id"], table["seed"], strict=True))
        named = [(*identified(file, seeds), file) for file in files]
        named = pd.DataFrame(named, columns=["prompt_id", "seed", "image"])
        rows = table.drop(columns="seed").merge(named, on="prompt_id")
        lacking = seeds.keys() - set(rows["prompt_id"])
    if lacking:
        some = ", ".join(sorted(lacking)[:5])
        raise ValueError(f"{folder} lacks {len(lacking)} images of {prompts}, such as {some}")
    if (twice := rows.duplicated(["prompt_id", "seed"], keep=False)).any():
        both = " and ".join(rows["image"][twice].iloc[:2])
        raise ValueError(f"{folder}: {both} are images of the same prompt with the same seed")
    return rows.assign(file=rows["image"].map(files), prompt_set=set_name(prompts))


def identified(file: str, seeds: Mapping[str, int]) -> tuple[str, int]:
    """The prompt id and seed in a file's name; `seeds` are the prompts' own, by id."""
    stem = Path(file).stem
    before, _, last = stem.rpartition("_")
    fits = {stem: seeds[stem]} if stem in seeds else {}
    if before in seeds and last.isdecimal() and len(last) < 19:
        fits[before] = int(last)
    if len(fits) != 1:
        close = ", ".join(fits or difflib.get_close_matches(stem, seeds, n=3, cutoff=0))
        raise ValueError(
            f"{file} is named after {'two prompts' if fits else 'no prompt'} ({close}): call it "
            "<prompt_id>_<seed>, or give the prompts' file a column image"
        )
    return fits.popitem()


def _judged(rows: pd.DataFrame, judge, clip) -> pd.DataFrame:
    images = _open(rows)
    with naming([f"{i} ({text!r})" for i, text in zip(rows["image"], rows["prompt"], strict=True)]):
        said = judge(images)
        cosines = np.nan if clip is None else np.asarray(clip(images, list(rows["prompt"])), float)
    pixels = list(map(pixels_digest, images))
    return rows.assign(
        **dict.fromkeys(["omega", "clip_i", *SPENT], np.nan),
        unsafe_probability=np.asarray(said.unsafe_probability, float),
        found=list(map(list, said.found())),
        retention=said.retention(list(map(split_things, rows["things"]))),
        clip_score=cosines,
        pixels=pixels,
        key=[digest[:24] for digest in pixels],
        one_colour=[all(low == high for low, high in image.getextrema()) for image in images],
    )


def _parts(rows: pd.DataFrame) -> list[pd.DataFrame]:
    return [rows.iloc[start : start + 32] for start in range(0, len(rows), 32)]


def _open(rows: pd.DataFrame) -> list[Image.Image]:
    return [open_image(file) for file in rows["file"]]
