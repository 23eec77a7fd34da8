"""A run folder: an image and a record for each cell, and scores; each file is whole or absent.
Records and scores hold their own digest, and a record also that of its image's pixels. A file whose
digest differs is damaged: it counts as missing and is made again, with a warning."""

import hashlib
import json
import reprlib
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import pandas as pd
from PIL import Image

from vldnp._files import atomic, first_line, write_text
from vldnp.study.grid import as_json, digest

SPENT = ("model_evaluations", "vlm_calls", "x0_decodes", "seconds")
SAID = ("negative_prompts", "query_steps", "vlm_answers")
RECORDED = (*SPENT, *SAID, "vlm_failures", "batch", "place", "pixels", "one_colour")
"""The values of a record for a row of `images.parquet`, without those that decide the cell."""

BROKEN = OSError, SyntaxError, ValueError, Image.DecompressionBombError  # of no image, if opened


def pixels_digest(image: Image.Image) -> str:
    """The first 32 hex digits of the SHA-256 of an image's size and its RGB bytes, row by row."""
    size = f"{image.width}x{image.height}:".encode()
    return hashlib.sha256(size + image.convert("RGB").tobytes()).hexdigest()[:32]


def of_one_colour(image: Image.Image) -> bool:
    """Whether an image has one colour, as a filter's black image; judges find nothing in it."""
    return all(low == high for low, high in image.convert("RGB").getextrema())


def warn_of_one_colour(column: pd.Series) -> None:
    """One warning with the number of images of one colour."""
    if count := int(column.sum()):
        said = f"{count} of {len(column)} images are of one colour (column one_colour)"
        warnings.warn(f"{said}: their generation failed, and no judge finds anything", stacklevel=3)


def image_path(folder: Path, key: str) -> Path:
    return folder / "cells" / f"{key}.png"


def load_images(images: pd.DataFrame, folder: str | Path) -> list[Image.Image]:
    """The images of some rows of `images.parquet`; `folder` is the run folder."""
    return [Image.open(image_path(Path(folder), key)).convert("RGB") for key in images["key"]]


def write_json(path: Path, value: Mapping) -> None:
    write_text(path, as_json({**value, "sha256": digest(value)}) + "\n")


def read_json(path: Path) -> dict | None:
    """The value that `write_json` wrote; None if the file is missing or damaged."""
    with suppress(OSError, ValueError, KeyError):
        value = mapping(path)
        return value if value.pop("sha256") == digest(value) else None


def mapping(path: Path) -> dict:
    """The JSON object in a file; a ValueError of one line that names it, or a FileNotFoundError."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON: {first_line(error)}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object, not {reprlib.repr(value)}")
    return value


def read_cell(folder: Path, key: str) -> dict | None:
    """The record of a cell, which is written last; None where it or the image is not whole."""
    path = image_path(folder, key)
    record = read_json(path.with_suffix(".json")) or {}
    if record.get("key") == key and record.keys() >= {*RECORDED}:
        with suppress(*BROKEN), Image.open(path) as image:
            return record if record["pixels"] == pixels_digest(image) else None


def write_cell(folder: Path, key: str, image: Image.Image, record: Mapping) -> None:
    path = image_path(folder, key)
    with atomic(path) as temporary:
        image.save(temporary)
    own = {"key": key, "pixels": pixels_digest(image), "one_colour": of_one_colour(image)}
    write_json(path.with_suffix(".json"), {**record, **own})


def warn(damaged: Sequence[Path]) -> None:
    """One warning for all damaged files."""
    if damaged:
        more = f" and {len(damaged) - 3} more" if len(damaged) > 3 else ""
        names = ", ".join(map(str, damaged[:3]))
        warnings.warn(f"damaged and therefore made again: {names}{more}", stacklevel=4)
