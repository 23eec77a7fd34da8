"""Published runs: a study's rows as they were computed elsewhere, without images.

`data/results/<name>/` holds `images.parquet` (a run folder's, with `place` in the row's batch and
`pixels`, the digest of its image), `config.json` and all CSV files of the run folder,
`methods.json` (setting → description) and `meta.json` (`SCHEMA`, revisions of models, packages).
Runs of version 2 hold parts besides, `images-<part>.parquet` and so on.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from vldnp._files import atomic, data_folder, unknown, write_text
from vldnp.study.folder import read_cell
from vldnp.study.grid import SCHEMA, as_json, digest


@dataclass(frozen=True)
class Part:
    """The rows of a published run, or (`name`) of a part of it."""

    folder: Path
    name: str
    config: Mapping = field(hash=False)

    def file(self, name: str) -> Path:
        stem, suffix = name.split(".")
        return self.folder / (f"{stem}-{self.name}.{suffix}" if self.name else name)

    @cached_property
    def images(self) -> pd.DataFrame:
        """All its rows, lists as lists."""
        found = pq.read_table(self.file("images.parquet"))
        rows = found.to_pandas()
        for column in found.schema:
            if pa.types.is_list(column.type):
                rows[column.name] = [list(said) for said in rows[column.name]]
        return rows

    def batches(self) -> dict[str, pd.DataFrame]:
        """Batch → its rows in order, as `grid.plan_batches` has them."""
        found, size = {}, self.config["batch_size"]
        for _, rows in self.images.drop_duplicates("key").groupby("setting", sort=False):
            for start in range(0, len(rows), size):
                some = rows.iloc[start : start + size]
                found[digest(some["key"].tolist())[:12]] = some
        return found


@dataclass(frozen=True)
class Published:
    """A published run, opened; its main study is the first of its parts."""

    folder: Path

    @property
    def name(self) -> str:
        return self.folder.name

    @cached_property
    def meta(self) -> dict:
        return read_json(self.folder / "meta.json")

    @cached_property
    def methods(self) -> dict[str, dict]:
        return read_json(self.folder / "methods.json")

    @cached_property
    def parts(self) -> list[Part]:
        names = sorted(path.stem[7:] for path in self.folder.glob("config*.json"))
        configs = (f"config-{name}.json" if name else "config.json" for name in names)
        parts = zip(names, configs, strict=True)
        return [Part(self.folder, name, read_json(self.folder / config)) for name, config in parts]

    @property
    def images(self) -> pd.DataFrame:
        return self.parts[0].images

    @property
    def digest(self) -> str:
        """Of all its rows: sixteen hex digits."""
        files = sorted(self.folder.glob("images*.parquet"))
        return digest([hashlib.sha256(path.read_bytes()).hexdigest() for path in files])[:16]


def read_json(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def results_folder() -> Path:
    return data_folder() / "results"


def published_runs() -> list[str]:
    """The names of all that there are."""
    return sorted(path.parent.name for path in results_folder().glob("*/meta.json"))


def open_run(name: str) -> Published:
    """A published run by name; raises ValueError, one line, where there is none."""
    if name not in (known := published_runs()):
        raise unknown("published run", name, known)
    return Published(results_folder() / name)


def recompute() -> bool:
    """Whether everything is to be computed here, as the environment's `RECOMPUTE=all` says."""
    if (said := os.environ.get("RECOMPUTE", "")) not in ("", "all"):
        raise ValueError(f"RECOMPUTE must be 'all' or empty, not {said!r}")
    return said == "all"


def publish(run_folder: str | Path, target: str | Path | None = None, **meta) -> list[Path]:
    """Publish a run folder, in place of what was published of it earlier.

    Args:
        run_folder: with the images of all its rows.
        target: by default `data/results/<its name>`.
        meta: what `meta.json` says besides, such as a protocol's SHA-256.

    Returns:
        The files written.

    Raises:
        FileNotFoundError, ValueError: nothing was run there, an image is missing, or a row is from
            a batch that the study does not plan; one line, and nothing has changed then.
    """
    source = Path(run_folder)
    target = results_folder() / source.name if target is None else Path(target)
    if not (source / "images.parquet").is_file():
        raise FileNotFoundError(f"{source} holds no study that was run to its end")
    config = read_json(source / "config.json")
    part = Part(source, "", config)
    plans = part.batches().items()
    place = {(batch, key): i for batch, some in plans for i, key in enumerate(some["key"])}
    where = list(zip(part.images["batch"], part.images["key"], strict=True))
    if lost := [at for at in where if at not in place]:
        raise ValueError(
            f"the image {lost[0][1]} was computed in the batch {lost[0][0]}, which the study of "
            f"{source} does not plan; publish a run that was computed as a whole"
        )
    rows = part.images.drop(columns="image").assign(
        place=[place[at] for at in where],
        pixels=[read_cell(source, key)["pixels"] for _, key in where],
    )
    vlms = [method["negatives"].get("vlm") for method in config["methods"].values()]
    models = [config[kind] for kind in ("model", "judge", "clip_model") if kind in config]
    models = {m["name"]: m.get("revision") for m in [*models, *filter(None, vlms)]}
    meta |= {"schema": SCHEMA, "models": models, "versions": config["versions"]}
    for old in sorted(target.glob("*.*"), reverse=True):
        old.unlink()
    with atomic(target / "images.parquet") as temporary:
        rows.to_parquet(temporary, index=False, compression="zstd", compression_level=19)
    for path in (source / "config.json", *source.glob("*.csv")):
        with atomic(target / path.name) as temporary:
            temporary.write_bytes(path.read_bytes())
    write_text(target / "methods.json", as_json(config["methods"], indent=1) + "\n")
    write_text(target / "meta.json", as_json(meta, indent=1) + "\n")  # last: now it is whole
    return sorted(target.iterdir())
