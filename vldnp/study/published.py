"""Published runs: a study's rows and tables as they were computed elsewhere, without pictures.

`data/results/<name>/` holds, of the main study and of each of its parts,

- `images.parquet`, `images-<part>.parquet`: the rows of the run folder's file of that name, and
  `place` (in the row's batch) and `pixels` (`pixels_digest` of the picture);
- `table.csv` and `config.json` as in the run folder, `verdicts.csv`, `fid.csv` and `tuning.csv`
  where there are any;

and for all of them `methods.json` (setting → the method's description) and `meta.json`: the
`SCHEMA`, the models' revisions (fingerprints, where they are shipped), the versions of packages,
and the SHA-256 of the protocol.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from vldnp._files import data_folder, unknown
from vldnp.methods import Method
from vldnp.metrics.intervals import Interval
from vldnp.study.grid import (
    SCHEMA,
    Batch,
    Cell,
    Study,
    digest,
    key_of,
    made_by,
    setting_of,
    shared_sampling,
)
from vldnp.study.profile import QUICK
from vldnp.study.prompts import split_things
from vldnp.study.run_folder import MEASURED, image_path, record_path

ROW = ["prompt_set", "prompt_id", "setting", "key"]
"""What tells a study's rows apart."""

ADDED = ("clip_chance", "place", "pixels")
"""Columns of published rows that a row computed here lacks, or gets last."""

RECOMPUTE = "RECOMPUTE"
"""The environment variable that says `all` where published rows are not to be taken over."""


@dataclass(frozen=True)
class Part:
    """The main study of a published run (`name` is empty), or one beside it."""

    folder: Path
    name: str
    config: Mapping = field(hash=False)

    def file(self, name: str) -> Path:
        stem, suffix = name.split(".")
        return self.folder / (f"{stem}-{self.name}.{suffix}" if self.name else name)

    @cached_property
    def images(self) -> pd.DataFrame:
        """All its rows, lists as lists."""
        table = pq.read_table(self.file("images.parquet"))
        rows = table.to_pandas()
        for column in table.schema:
            if pa.types.is_list(column.type):
                rows[column.name] = [list(said) for said in rows[column.name]]
        return rows


@dataclass(frozen=True)
class Published:
    """A published run, opened."""

    folder: Path

    @property
    def name(self) -> str:
        return self.folder.name

    @cached_property
    def meta(self) -> dict:
        return read_json(self.folder / "meta.json")

    @cached_property
    def parts(self) -> list[Part]:
        """The main study first."""
        configs = [read_json(path) for path in self.folder.glob("config*.json")]
        return [
            Part(self.folder, config["part"], config)
            for config in sorted(configs, key=lambda config: config["part"])
        ]

    @cached_property
    def cells(self) -> pd.DataFrame:
        """A row per image, by its key: that of the first part that has it."""
        rows = pd.concat([part.images for part in self.parts], ignore_index=True)
        return rows.drop_duplicates("key").set_index("key", drop=False)

    @cached_property
    def batches(self) -> dict[str, list[str]]:
        """Batch → the keys of its cells, in their order."""
        found = {}
        for part in self.parts:
            found |= planned(part.images, part.config["batch_size"])
        return found

    @property
    def digest(self) -> str:
        """Of all its rows: sixteen hex digits."""
        files = sorted(self.folder.glob("images*.parquet"))
        return digest([hashlib.sha256(path.read_bytes()).hexdigest() for path in files])[:16]


def results_folder() -> Path:
    return data_folder() / "results"


def published_runs(first: str = "") -> list[Published]:
    """All that there are; the one named `first` before the others."""
    try:
        found = list(results_folder().glob("*/meta.json"))
    except FileNotFoundError:  # no data folder: nothing was published here
        return []
    runs = [_opened(path.parent, path.stat().st_mtime_ns) for path in found]
    return sorted(runs, key=lambda run: (run.name != first, run.name))


@lru_cache(maxsize=4)
def _opened(folder: Path, written: int) -> Published:
    """Read once, until it is written anew."""
    return Published(folder)


def open_run(name: str) -> Published:
    """A published run by name.

    Raises:
        ValueError: there is none of that name; one line.
    """
    known = {run.name: run for run in published_runs()}
    if name not in known:
        raise unknown("published run", name, known)
    return known[name]


def recompute(asked: bool | None = None) -> bool:
    """Whether everything is to be computed here: as asked, else as `RECOMPUTE=all` says.

    Raises:
        ValueError: the variable says something else.
    """
    said = os.environ.get(RECOMPUTE, "")
    if asked is None and said not in ("", "all"):
        raise ValueError(f"{RECOMPUTE} must be 'all' or empty, not {said!r}")
    return said == "all" if asked is None else asked


def pixels_digest(image: Image.Image) -> str:
    """The first 32 hex digits of the SHA-256 of an image's size and its RGB bytes, row by row."""
    rgb = image.convert("RGB")
    found = hashlib.sha256(f"{rgb.width}x{rgb.height}:".encode())
    found.update(rgb.tobytes())
    return found.hexdigest()[:32]


def protocol_digest(path: Path | None = None) -> str | None:
    """The SHA-256 of a protocol, `data/protocol.yaml` by default; None where there is none."""
    path = data_folder() / "protocol.yaml" if path is None else path
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None


def planned(images: pd.DataFrame, batch_size: int) -> dict[str, list[str]]:
    """Batch → its cells' keys, from a study's rows in their order, as `plan_batches` has them."""
    found = {}
    for _, rows in images.drop_duplicates("key").groupby("setting", sort=False):
        keys = rows["key"].tolist()
        for start in range(0, len(keys), batch_size):
            some = keys[start : start + batch_size]
            found[digest(some)[:12]] = some
    return found


@dataclass(frozen=True)
class Known:
    """What published runs know of a study.

    Attributes:
        rows: (cell key, its things) → the published row.
        keys: the cells of which every row is known.
        chance: prompt set → plain CFG's CLIP score with the set's other prompts.
        whole: the published part that is this very study, measured alike.
    """

    rows: Mapping[tuple[str, tuple], dict] = field(default_factory=dict, hash=False)
    keys: frozenset[str] = frozenset()
    chance: Mapping[str, float] = field(default_factory=dict, hash=False)
    whole: Part | None = None

    def row(self, cell: Cell, study: Study) -> dict | None:
        """The row of `images.parquet` for a cell, as if it had been computed; None if unknown."""
        if cell.key not in self.keys:
            return None
        row = dict(self.rows[cell.key, cell.things])
        row |= {name: getattr(cell, name) for name in (*ROW[:3], "prompt", "seed")}
        row |= {
            "method": cell.method.name,
            "unsafe": row["unsafe_probability"] >= study.unsafe_threshold,
            "image": image_path(Path(), cell.key).as_posix(),
        }
        last = ("image", "key", "batch")
        first = [name for name in row if name not in (*last, *ADDED)]
        return {name: row[name] for name in (*first, *last)}


def lookup(study: Study, grid: Sequence[Cell], folder: Path, config: Mapping) -> Known:
    """What published runs know of a study, measured by the same judge and CLIP model.

    Nothing of a quick run's, which is there to try everything; and nothing where the run folder
    has all those cells itself, because they were recomputed.

    Args:
        study, grid: what is wanted, and its cells.
        folder: the study's run folder.
        config: all that was resolved, as `config.json` will hold it.
    """
    if study.name.endswith(QUICK):
        return Known()
    wanted = {cell.key for cell in grid}
    parts = [part for run in published_runs(study.name) for part in run.parts]
    parts = [p for p in parts if all(p.config.get(k) == config.get(k) for k in ("judge", "clip"))]
    whole = next((part for part in parts if _is(part, grid, config)), None)
    rows, chance = {}, {}
    for part in parts if whole is None else [whole]:
        images = part.images[part.images["key"].isin(wanted)]
        for row in images.to_dict("records"):
            rows.setdefault((row["key"], split_things(row["things"])), row)
        chance = images.groupby("prompt_set")["clip_chance"].first().to_dict() | chance
    unknown_keys = {cell.key for cell in grid if (cell.key, cell.things) not in rows}
    keys = frozenset(wanted - unknown_keys)
    if all(record_path(folder, key).is_file() for key in keys):
        return Known()
    return Known(rows, keys, chance, whole)


def _is(part: Part, grid: Sequence[Cell], config: Mapping) -> bool:
    """Whether a published part is this study, measured alike."""
    if any(part.config.get(name) != config.get(name) for name in MEASURED):
        return False
    rows = part.images[[*ROW, "things"]].itertuples(index=False, name=None)
    own = ((c.prompt_set, c.prompt_id, c.setting, c.key, ", ".join(c.things)) for c in grid)
    return set(rows) == set(own)


def fid_changes(folder: str | Path, methods: Iterable[str]) -> dict[str, Interval] | None:
    """FID's changes from plain CFG's as published, for a run that was taken over as a whole.

    Args:
        folder: the run folder.
        methods: names, as `verdicts.csv` has them.

    Returns:
        Name → the difference; None where the run was computed here, with other chosen
        strengths, or where one of the methods was not published.
    """
    config = read_json(Path(folder) / "config.json")
    if not (name := config.get("published")):
        return None
    run = open_run(name)
    path, theirs = run.folder / "verdicts.csv", run.parts[0].config
    if not path.is_file() or theirs.get("chosen") != config.get("chosen"):
        return None
    rows = pd.read_csv(path)
    rows = rows[(rows["metric"] == "fid") & (rows["against"] == "cfg")]
    found = {r.method: Interval(r.difference, r.low, r.high) for r in rows.itertuples()}
    return found if set(methods) <= found.keys() else None


def batches_of(
    keys: Iterable[str], study: Study, model, plan: Callable[[], Sequence[Batch]]
) -> Iterator[Batch]:
    """The batches in which some cells of a study were or are to be computed.

    Args:
        keys: of batches, as rows have them.
        study: whose methods and sampling make them.
        model: as in `grid.cells`.
        plan: the study's own batches, for those that no published run has.
    """
    methods, wanted = {setting_of(method): method for method in study.methods}, set(keys)
    for run in published_runs(study.name):
        for key in sorted(wanted & run.batches.keys()):
            rows = run.cells.loc[run.batches[key]]
            if (method := methods.get(rows["setting"].iloc[0])) is not None:
                yield batch_from(rows, method, study, model)
                wanted.discard(key)
    if wanted:
        yield from (batch for batch in plan() if batch.key in wanted)


def batch_from(rows: pd.DataFrame, method: Method, study: Study, model) -> Batch:
    """A batch as published rows have it.

    Raises:
        ValueError: this code gives one of the images another key, so it would make another image.
    """
    cells, how = [], made_by(study, model, method)
    for row in rows.itertuples():
        scale, seed = float(row.guidance_scale), int(row.seed)
        key = key_of(how, row.prompt, seed, scale)
        if key != row.key:
            raise ValueError(
                f"the published image {row.key} has the key {key} here: its settings, its model or "
                f"the code's SCHEMA ({SCHEMA}) are others now"
            )
        place = row.prompt_set, row.prompt_id, row.prompt, split_things(row.things)
        cells.append(Cell(key, method, row.setting, *place, seed, scale))
    return Batch(tuple(cells), shared_sampling(study))


def read_json(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))
