"""Measures images made elsewhere in the same way as those of a study."""

import difflib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from vldnp._finite import naming
from vldnp.metrics.intervals import UNSAFE_THRESHOLD
from vldnp.models import load
from vldnp.study.folder import SPENT, of_one_colour, pixels_digest, warn_of_one_colour
from vldnp.study.grid import digest
from vldnp.study.measure import image_files, measurements, named, open_image, with_scores
from vldnp.study.prompts import load_prompts, read_table, set_name


def score(
    folder: str | Path, prompts: str | Path, judge, clip=None, *, name="", progress: bool = True
) -> pd.DataFrame:
    """Measure the images of a folder, at any depth and of any sizes, as `run` does its own; the
    rows are those of `images.parquet`. A column `image` of the prompts' file (a path in the folder)
    assigns images to prompts, or else the images' names do: `<prompt_id>` or `<prompt_id>_<seed>`.
    `name` is that of the method in tables (by default the folder's)."""
    judge, clip = named(load.load_judge(judge)), named(load.load_clip(clip))
    folder = Path(folder)
    name, rows = name or folder.resolve().name, matched(folder, prompts)
    parts = [rows.iloc[start : start + 32] for start in range(0, len(rows), 32)]
    parts = tqdm(parts, desc=f"{name} scores", unit="batch", disable=not progress)
    rows = pd.concat([_judged(part, folder, judge, clip) for part in parts])
    warn_of_one_colour(rows["one_colour"])
    return rows.assign(method=name, setting=digest([name, sorted(rows["pixels"])])[:12])


def _judged(rows: pd.DataFrame, folder: Path, judge, clip) -> pd.DataFrame:
    images = [open_image(folder / image) for image in rows["image"]]
    with naming([f"{i} ({text!r})" for i, text in zip(rows["image"], rows["prompt"], strict=True)]):
        scores = measurements(images, list(rows["prompt"]), judge, clip)
    pixels = list(map(pixels_digest, images))
    return with_scores(rows, scores, UNSAFE_THRESHOLD).assign(
        **dict.fromkeys(["omega", *SPENT], np.nan),
        pixels=pixels,
        key=[digest[:24] for digest in pixels],
        one_colour=list(map(of_one_colour, images)),
    )


def matched(folder: Path, prompts: str | Path) -> pd.DataFrame:
    """A row per image with its prompt; `image` is its path in the folder."""
    table, path = load_prompts(prompts), Path(prompts)
    files = [file.relative_to(folder).as_posix() for file in image_files(folder)]
    if not files:
        raise FileNotFoundError(f"no images in {folder}: there is no PNG, JPEG or WebP file")
    if path.is_file() and "image" in (raw := read_table(path)):
        if len(raw) != len(table):
            raise ValueError(f"{prompts}: the column image needs a prompt beside each image")
        rows = table.assign(image=list(raw["image"]), own=table["seed"])
    else:
        seeds = dict(zip(table["prompt_id"], table["seed"], strict=True))
        named = [(*identified(file, seeds), file) for file in files]
        named = pd.DataFrame(named, columns=["prompt_id", "seed", "image"])
        rows = table.rename(columns={"seed": "own"}).merge(named, on="prompt_id", how="left")
    wanted = rows["image"].fillna(rows["prompt_id"])
    if lacking := sorted({*wanted[~rows["image"].isin(files)]}):
        some = ", ".join(lacking[:5])
        raise ValueError(f"{folder} lacks {len(lacking)} images of {prompts}, such as {some}")
    if (twice := rows.duplicated(["prompt_id", "seed"], keep=False)).any():
        both = " and ".join(rows["image"][twice].iloc[:2])
        raise ValueError(f"{folder}: {both} are images of the same prompt with the same seed")
    # Numbers in names are seeds where they count on from the prompt's own.
    place = rows.sort_values("seed").groupby("prompt_id").cumcount()
    if (wrong := rows["seed"] != rows["own"] + place).any():
        file, own = rows.loc[wrong.idxmax(), ["image", "own"]]
        raise ValueError(
            f"{file}: its number is not the prompt's seed, {own}, nor counts on from it; where it "
            "counts samples, give the prompts' file a row for each image, with a column image"
        )
    return rows.drop(columns="own").assign(prompt_set=set_name(prompts))


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
