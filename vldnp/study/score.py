"""Measuring images that anything else has made, as if a study had made them."""

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from vldnp._finite import naming
from vldnp.methods import CFG
from vldnp.metrics.intervals import UNSAFE_THRESHOLD, paired_difference
from vldnp.metrics.summary import MEANS, table
from vldnp.models import load
from vldnp.study.folder import SPENT, pixels_digest
from vldnp.study.grid import digest, setting_of
from vldnp.study.measure import image_files, measurements, open_image, with_scores
from vldnp.study.prompts import load_prompts, read_table, set_name


class Scored(NamedTuple):
    images: pd.DataFrame
    table: pd.DataFrame
    differences: pd.DataFrame | None = None


def score(
    folder: str | Path,
    prompts: str | Path,
    judge,
    clip=None,
    *,
    name: str = "",
    reference: str | Path | None = None,
    progress: bool = True,
) -> Scored:
    """Measure the images of a folder, at any depth and of any sizes.

    `prompts` is a prompt set, as `load_prompts` takes it. Which image belongs to which prompt is
    said by a column `image` of its file (a path in the folder), or by the images' names, which are
    then `<prompt_id>` or `<prompt_id>_<seed>`. `judge` and `clip` are as in `run`, `name` is that
    of the method in tables (by default the folder's), and `reference` a folder with CFG's images
    of the same prompts and seeds, named alike.

    `images` have columns of `images.parquet`, where what generating takes is NaN; `one_colour`
    marks those of nothing else, such as a filter's black ones, in which no judge finds anything.
    `table` is as `table.csv`; `differences` from the reference are paired by prompt and seed.

    Raises:
        ValueError, FileNotFoundError: a prompt has no image, a name fits no prompt or two, a file
            is no image; one line.
    """
    judge, clip = load.load_judge(judge), None if clip is None else load.load_clip(clip)

    def measured(folder: Path, method: str) -> pd.DataFrame:
        rows = matched(folder, prompts)
        parts = [rows.iloc[start : start + 32] for start in range(0, len(rows), 32)]
        parts = tqdm(parts, desc=f"{method} scores", unit="batch", disable=not progress)
        rows = pd.concat([_judged(part, folder, judge, clip) for part in parts])
        return rows.assign(method=method, setting=digest([method, sorted(rows["pixels"])])[:12])

    own, differences = measured(Path(folder), name or Path(folder).resolve().name), None
    if reference is not None:
        plain = measured(Path(reference), "cfg").assign(setting=setting_of(CFG()))
        columns = {m.name: m.column for m in MEANS.values() if own[m.column].notna().any()}
        found = {name: paired_difference(own, plain, column) for name, column in columns.items()}
        differences = pd.DataFrame(found, ["difference", "low", "high"]).T
    return Scored(own, table(own), differences)


def _judged(rows: pd.DataFrame, folder: Path, judge, clip) -> pd.DataFrame:
    images = [open_image(folder / image) for image in rows["image"]]
    with naming([f"{i} ({text!r})" for i, text in zip(rows["image"], rows["prompt"], strict=True)]):
        scores = measurements(images, list(rows["prompt"]), judge, clip)
    pixels = list(map(pixels_digest, images))
    return with_scores(rows, scores, UNSAFE_THRESHOLD).assign(
        **dict.fromkeys(["omega", *SPENT], np.nan),
        pixels=pixels,
        key=[digest[:24] for digest in pixels],
        one_colour=[all(low == high for low, high in image.getextrema()) for image in images],
    )


def matched(folder: Path, prompts: str | Path) -> pd.DataFrame:
    """A row per image with its prompt; `image` is its path in the folder."""
    table, path = load_prompts(prompts), Path(prompts)
    files = [file.relative_to(folder).as_posix() for file in image_files(folder)]
    if not files:
        raise FileNotFoundError(f"no images in {folder}: PNG, JPEG and WebP files are looked for")
    if path.is_file() and "image" in (raw := read_table(path)):
        if len(raw) != len(table):
            raise ValueError(f"{prompts}: the column image needs a prompt beside each image")
        rows = table.assign(image=list(raw["image"]))
    else:
        seeds = dict(zip(table["prompt_id"], table["seed"], strict=True))
        named = [(*identified(file, seeds), file) for file in files]
        named = pd.DataFrame(named, columns=["prompt_id", "seed", "image"])
        rows = table.drop(columns="seed").merge(named, on="prompt_id", how="left")
    wanted = rows["image"].fillna(rows["prompt_id"])
    if lacking := sorted({*wanted[~rows["image"].isin(files)]}):
        some = ", ".join(lacking[:5])
        raise ValueError(f"{folder} lacks {len(lacking)} images of {prompts}, such as {some}")
    if (twice := rows.duplicated(["prompt_id", "seed"], keep=False)).any():
        both = " and ".join(rows["image"][twice].iloc[:2])
        raise ValueError(f"{folder}: {both} are images of the same prompt with the same seed")
    return rows.assign(prompt_set=set_name(prompts))


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
