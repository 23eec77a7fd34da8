"""A run folder: images, their records and scores by cell, and a study's tables.

Every file is whole or absent. What turns out to be damaged all the same (by a disk, by hand)
counts as missing, with a warning that names it, and is made again.
"""

import json
import warnings
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import pandas as pd
from PIL import Image

from vldnp._files import atomic, write_text
from vldnp.study.grid import Study, as_json, digest

SPENT = ("model_evaluations", "vlm_calls", "x0_decodes", "seconds")
SAID = ("negative_prompts", "query_steps", "vlm_answers")
"""What a record must hold, besides what decides the cell, for a row of `images.parquet`."""

EARLIER = "earlier"
"""The folder in a run folder for the tables of studies that others have replaced."""

NO_RESULT = ("versions", "batch_size", "chosen", "published")
"""What may change in a study's configuration while its tables stay the same study's."""

MEASURED = ("judge", "clip", "unsafe_threshold", "reference", "reference_sets", "reference_count")
"""What numbers depend on, besides the images."""


class Damaged(ValueError):
    """A file of a run folder that cannot be read."""

    def __init__(self, path: Path):
        super().__init__(f"{path} is damaged; the next run makes it again")
        self.path = path


def image_path(folder: Path, key: str) -> Path:
    return folder / "cells" / f"{key}.png"


def record_path(folder: Path, key: str) -> Path:
    return folder / "cells" / f"{key}.json"


def read_record(folder: Path, key: str) -> dict:
    """What was recorded of a cell.

    Raises:
        FileNotFoundError: the cell was not computed yet; its record is the last thing written.
        Damaged: the record is broken.
    """
    path = record_path(folder, key)
    record = _read_json(path)
    whole = isinstance(record, dict) and record.get("key") == key
    if not whole or not record.keys() >= {"method", *SPENT, *SAID}:
        raise Damaged(path)
    return record


def check_cell(folder: Path, key: str) -> None:
    """Look whether the folder has this cell, whole.

    Raises:
        FileNotFoundError: it was not computed yet.
        Damaged: its record or its image is broken, or the image is gone.
    """
    read_record(folder, key)
    path = image_path(folder, key)
    try:
        with Image.open(path) as image:
            image.verify()  # the checksums of its parts, without decoding
    except (OSError, SyntaxError, ValueError) as error:
        raise Damaged(path) from error


def lacking(folder: Path, keys: Iterable[str]) -> set[str]:
    """Those cells that the folder has not, or not whole; one warning names what is damaged."""
    found, damaged = set(), []
    for key in keys:
        try:
            check_cell(folder, key)
        except FileNotFoundError:
            found.add(key)
        except Damaged as error:
            found.add(key)
            damaged.append(error.path)
    _warn(damaged, "made")
    return found


def write_cell(folder: Path, key: str, image: Image.Image, record: Mapping) -> None:
    """Put an image and its record into the folder, unless it has the cell already."""
    with suppress(FileNotFoundError, Damaged):
        check_cell(folder, key)
        return
    with atomic(image_path(folder, key)) as temporary:
        image.save(temporary)
    # The record comes last: a cell that has one is complete.
    write_text(record_path(folder, key), as_json(record, indent=1) + "\n")


def opened(path: Path) -> Image.Image:
    with Image.open(path) as image:
        return image.convert("RGB")


def open_images(images: pd.DataFrame, folder: str | Path) -> list[Image.Image]:
    """The pictures of some rows of `images.parquet`; `folder` is the run folder."""
    return [opened(Path(folder) / path) for path in images["image"]]


def score_folder(folder: Path, kind: str, model) -> Path:
    """Where the scores of one kind (`judge`, `clip`) by one revision of a model lie."""
    return folder / "scores" / f"{kind}-{model.name}-{model.revision}".replace("/", "-")


def read_scores(scores: Path, columns: Iterable[str]) -> dict[str, dict]:
    """Cell key → its scores with these columns, from all files that any run has written.

    A damaged file is removed, with one warning, so that it is measured again.
    """
    known, damaged = {}, []
    for path in sorted(scores.glob("*.json")):
        try:
            rows = _read_json(path)
            if not isinstance(rows, dict) or any(
                not isinstance(row, dict) or row.keys() != set(columns) for row in rows.values()
            ):
                raise Damaged(path)
        except FileNotFoundError:  # another run found it damaged
            continue
        except Damaged:
            path.unlink(missing_ok=True)
            damaged.append(path)
        else:
            known |= rows
    _warn(damaged, "measured")
    return known


def write_scores(scores: Path, rows: Mapping[str, Mapping]) -> dict[str, dict]:
    """A file of its own for a batch's scores, by cell key; returns them as they will be read.

    It is named after its cells, so that runs at the same time write the same files, not over each
    other's, and there are at most as many as batches.
    """
    text = as_json(rows)
    write_text(scores / f"{digest(list(rows))[:24]}.json", text + "\n")
    return json.loads(text)


def changes(study: Study, folder: Path, config: Mapping, images: pd.DataFrame) -> list[str]:
    """What is other in the tables that lie in a study's run folder, so that they would be lost.

    Args:
        study: what was run.
        folder: its run folder.
        config: all that was resolved, as `config.json` will hold it.
        images: the rows that `images.parquet` will hold.

    Returns:
        Names of settings; empty where there are no tables, and where the new ones hold the old
        ones' rows with the same measurements.
    """
    row = ["prompt_set", "prompt_id", "setting", "key"]
    try:
        before = _read_json(folder / study.file("config.json"))
        old = pd.read_parquet(folder / study.file("images.parquet"), columns=row)
        names = sorted(before.keys() | config.keys())
    except FileNotFoundError:
        return []
    except (OSError, ValueError, AttributeError):  # pyarrow's errors are ValueErrors
        return ["contents, which cannot be read"]
    other = [n for n in names if n not in NO_RESULT and before.get(n) != config.get(n)]
    kept = set(old.itertuples(index=False, name=None)) <= set(
        images[row].itertuples(index=False, name=None)
    )
    return [] if kept and not set(other) & set(MEASURED) else other or ["prompts"]


def set_aside(study: Study, folder: Path, other: Sequence[str]) -> None:
    """Move the tables in a run folder to where those of earlier studies lie, with a warning.

    Args:
        study: whose tables will take their place.
        folder: its run folder.
        other: what is other, from `changes`.
    """
    config = folder / study.file("config.json")
    place = folder / EARLIER / digest(config.read_text(encoding="utf-8", errors="replace"))[:12]
    place.mkdir(parents=True, exist_ok=True)
    names = [study.file(name) for name in ("table.csv", "images.parquet", "config.json")]
    # The verdicts are drawn from the main study's tables. What is looked at first goes last.
    for name in names if study.part else ["verdicts.csv", *names]:
        if (folder / name).is_file():
            (folder / name).replace(place / name)
    warnings.warn(
        f"{folder} held the tables of another study, with other {', '.join(other)}; "
        f"they are in {place} now",
        stacklevel=3,
    )


def _read_json(path: Path):
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except NotADirectoryError as error:  # writing will fail, and say why
        raise FileNotFoundError(path) from error
    except ValueError as error:  # neither UTF-8 nor JSON
        raise Damaged(path) from error


def _warn(damaged: Sequence[Path], again: str) -> None:
    if damaged:
        more = f" and {len(damaged) - 3} more" if len(damaged) > 3 else ""
        names = ", ".join(map(str, damaged[:3]))
        warnings.warn(f"damaged and therefore {again} again: {names}{more}", stacklevel=3)
