"""A run folder: an image and a record for each cell, and scores.

Every file is whole or absent. What is damaged all the same (by a disk, by hand) counts as missing,
with one warning that names it, and is made again.
"""

import hashlib
import json
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from numbers import Real
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image
from tqdm.auto import tqdm

from vldnp._files import atomic, write_text
from vldnp._finite import label, naming
from vldnp.study.grid import Batch, Cell, as_json, digest

SPENT = ("model_evaluations", "vlm_calls", "x0_decodes", "seconds")
SAID = ("negative_prompts", "query_steps", "vlm_answers")
"""What a record holds for a row of `images.parquet`, besides what decides the cell."""

LEFT_BEHIND = 3600
"""A temporary folder that was written so many seconds ago belongs to a killed process."""


class Damaged(ValueError):
    """A file of a run folder that cannot be read, or does not say what it should."""


def pixels_digest(image: Image.Image) -> str:
    """The first 32 hex digits of the SHA-256 of an image's size and its RGB bytes, row by row."""
    found = hashlib.sha256(f"{image.width}x{image.height}:".encode())
    found.update(image.convert("RGB").tobytes())
    return found.hexdigest()[:32]


def image_path(folder: Path, key: str) -> Path:
    return folder / "cells" / f"{key}.png"


def load_images(images: pd.DataFrame, folder: str | Path) -> list[Image.Image]:
    """The images of some rows of `images.parquet`; `folder` is the run folder."""
    return [Image.open(image_path(Path(folder), key)).convert("RGB") for key in images["key"]]


def read_cell(folder: Path, key: str) -> dict:
    """What was recorded of a cell, whose image is the recorded one.

    Raises:
        FileNotFoundError: it was not computed yet; a record is the last thing written.
        Damaged: its record or its image is broken, another, or the image is gone.
    """
    path = image_path(folder, key).with_suffix(".json")
    record = read_json(path)
    if (
        not isinstance(record, dict)
        or record.get("key") != key
        or not isinstance(record.get("method"), dict)
        or not all(isinstance(record.get(name), Real) for name in SPENT)
        or not all(isinstance(record.get(name), list) for name in SAID)
    ):
        raise Damaged(path)
    path = image_path(folder, key)
    with suppress(OSError, SyntaxError, ValueError), Image.open(path) as image:
        if pixels_digest(image) == record.get("pixels"):
            return record
    raise Damaged(path)


def lacking(folder: Path, keys: Iterable[str]) -> set[str]:
    """Those cells that the folder has not, or not whole."""
    found, damaged = set(), []
    for key in keys:
        try:
            read_cell(folder, key)
        except (FileNotFoundError, Damaged) as error:
            found.add(key)
            damaged += [error] if isinstance(error, Damaged) else []
    _warn(damaged)
    return found


def write_cell(folder: Path, key: str, image: Image.Image, record: Mapping) -> None:
    """Put an image and its record into the folder, unless it has the cell already."""
    with suppress(FileNotFoundError, Damaged):
        read_cell(folder, key)
        return
    with atomic(image_path(folder, key)) as temporary:
        image.save(temporary)
    record = {**record, "key": key, "pixels": pixels_digest(image)}
    write_text(image_path(folder, key).with_suffix(".json"), as_json(record, indent=1) + "\n")


def scored(
    folder: Path,
    kind: str,
    model,
    columns: Sequence[str],
    measure: Callable[[Sequence[Cell], list[Image.Image]], Sequence[Sequence]],
    batches: Iterable[Batch],
    progress: bool = True,
) -> dict[str, dict]:
    """Measurements by cell key; those that `scores/` holds from this model are not repeated.

    Args:
        folder: the run folder.
        kind: of measurement (`judge`, `clip`).
        model: with a name and a revision.
        columns: of a measurement; the first one is a finite number.
        measure: cells and their images → a measurement each.
    """
    place = folder / "scores" / f"{kind}-{model.name}-{model.revision}".replace("/", "-")
    known = _read_scores(place, columns)
    missing = [[cell for cell in batch.cells if cell.key not in known] for batch in batches]
    missing = [some for some in missing if some]
    quiet = not (progress and missing)
    for some in tqdm(missing, desc=f"{kind} scores", unit="batch", disable=quiet):
        labels = [f"{label(i, cell.prompt, cell.seed)}, {cell.key}" for i, cell in enumerate(some)]
        with naming(labels):
            images = load_images(pd.DataFrame({"key": [cell.key for cell in some]}), folder)
            rows = [dict(zip(columns, row, strict=True)) for row in measure(some, images)]
        for cell, row in zip(some, rows, strict=True):
            if not np.isfinite(number := row[columns[0]]):
                path = image_path(Path(), cell.key).as_posix()
                raise ValueError(f"the {kind} {model.name!r} gives {number} for {path}")
        text = as_json({cell.key: row for cell, row in zip(some, rows, strict=True)})
        # Named after its cells: runs at the same time write the same files, not over each other's.
        write_text(place / f"{digest([cell.key for cell in some])[:24]}.json", text + "\n")
        known |= json.loads(text)
    return known


def _read_scores(place: Path, columns: Sequence[str]) -> dict[str, dict]:
    known, damaged = {}, []
    for path in sorted(place.glob("*.json")):
        try:
            rows = read_json(path)
            if not isinstance(rows, dict) or not all(
                isinstance(row, dict)
                and row.keys() == set(columns)
                and isinstance(row[columns[0]], Real)
                for row in rows.values()
            ):
                raise Damaged(path)
            known |= rows
        except FileNotFoundError:  # another run found it damaged
            continue
        except Damaged as error:
            path.unlink(missing_ok=True)
            damaged.append(error)
    _warn(damaged)
    return known


def read_json(path: Path):
    """What a file holds; raises FileNotFoundError or `Damaged`."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise FileNotFoundError(path) from error
    except (ValueError, RecursionError) as error:  # neither UTF-8 nor JSON
        raise Damaged(path) from error


def sweep(folder: Path) -> None:
    """Remove the temporary folders that killed processes left, by the disk's own clock."""
    if not folder.is_dir():
        return
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".tmp-") as file:
        now = Path(file.name).stat().st_mtime
    for left in folder.rglob(".tmp-*"):
        with suppress(OSError):  # another sweep was faster
            if now - left.stat().st_mtime > LEFT_BEHIND:
                shutil.rmtree(left)


def _warn(damaged: Sequence[Damaged]) -> None:
    if damaged:
        more = f" and {len(damaged) - 3} more" if len(damaged) > 3 else ""
        names = ", ".join(map(str, damaged[:3]))
        warnings.warn(f"damaged and therefore made again: {names}{more}", stacklevel=4)
