"""Writing a published run from a run folder (`published` says what it holds)."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from vldnp._files import atomic
from vldnp.study.grid import SCHEMA, as_json, digest
from vldnp.study.published import Part, pixels_digest, planned, protocol_digest, read_json
from vldnp.study.run_folder import image_path, opened


def write(run: str | Path, target: str | Path, tuning: str | Path | None = None) -> list[Path]:
    """Publish a run folder, in place of what was published of it earlier.

    Args:
        run: the folder, with the pictures of all its rows.
        target: such as `data/results/moji`.
        tuning: its `tuning.csv`; an earlier one stays where none is given.

    Returns:
        The files written.

    Raises:
        FileNotFoundError, ValueError: as `prepared`; nothing has changed then.
    """
    return put(prepared(run, tuning), Path(target))


def put(files: Mapping[str, bytes], target: Path) -> list[Path]:
    """Write what `prepared` gave; `meta.json` comes last, and a folder that has it is whole."""
    parts = [path for path in target.glob("*-*.*") if path.name not in files]
    for old in (target / "meta.json", *parts):
        old.unlink(missing_ok=True)
    for name, content in files.items():
        with atomic(target / name) as temporary:
            temporary.write_bytes(content)
    return [target / name for name in files]


def prepared(run: str | Path, tuning: str | Path | None = None) -> dict[str, bytes]:
    """The files of a published run by name, from a run folder; nothing is written.

    Args:
        run, tuning: as in `write`.

    Raises:
        FileNotFoundError, ValueError: one line: nothing was run there, a picture is missing, or
            a row comes from a published run or from a batch that no study of the run plans.
    """
    run = Path(run)
    configs = sorted(map(read_json, run.glob("config*.json")), key=lambda config: config["part"])
    parts = [Part(run, config["part"], config) for config in configs]
    if not parts:
        raise FileNotFoundError(f"{run} holds no study: there is no config.json")
    if taken := [part for part in parts if part.config.get("published")]:
        raise ValueError(
            f"{taken[0].file('config.json')} was taken from the published run "
            f"{taken[0].config['published']!r}; only what was computed can be published"
        )
    plans: dict[str, list[str]] = {}
    for part in parts:
        plans |= planned(part.images, part.config["batch_size"])
    places = {(batch, key): i for batch, keys in plans.items() for i, key in enumerate(keys)}
    files: dict[str, bytes] = {}
    hashes: dict[str, str] = {}
    for part in parts:
        rows = _with_pixels(part, run, places, hashes)
        files[part.file("images.parquet").name] = _as_parquet(rows)
        for name in ("table.csv", "config.json"):
            files[part.file(name).name] = part.file(name).read_bytes()
    for source in (run / "verdicts.csv", run / "fid.csv", tuning):
        if source is not None and Path(source).is_file():
            files[Path(source).name] = Path(source).read_bytes()
    methods = {digest(m)[:12]: m for config in configs for m in config["methods"]}
    files["methods.json"] = (as_json(methods, indent=1) + "\n").encode()
    files["meta.json"] = (as_json(_meta(configs), indent=1) + "\n").encode()
    return files


def _with_pixels(part: Part, run: Path, places: Mapping, hashes: dict[str, str]) -> pd.DataFrame:
    rows = part.images
    where = list(zip(rows["batch"], rows["key"], strict=True))
    if lost := [at for at in where if at not in places]:
        raise ValueError(
            f"the image {lost[0][1]} was computed in the batch {lost[0][0]}, which no study of "
            f"{run} plans; publish a run that was computed as a whole, with one batch_size"
        )
    for key in rows["key"]:
        if key not in hashes:
            hashes[key] = pixels_digest(opened(image_path(run, key)))
    new = {"place": [places[at] for at in where], "pixels": rows["key"].map(hashes)}
    return rows.drop(columns="image").assign(**new)


def _as_parquet(rows: pd.DataFrame) -> bytes:
    sink = pa.BufferOutputStream()
    table = pa.Table.from_pandas(rows, preserve_index=False)
    pq.write_table(table, sink, compression="zstd", compression_level=19)
    return sink.getvalue().to_pybytes()


def _meta(configs: Sequence[Mapping]) -> dict:
    kinds = "model", "judge", "clip_model"
    named = [config[kind] for config in configs for kind in kinds if kind in config]
    vlms = [method["negatives"].get("vlm") for config in configs for method in config["methods"]]
    return {
        "schema": SCHEMA,
        "models": {m["name"]: m.get("revision") for m in [*named, *filter(None, vlms)]},
        "versions": configs[0]["versions"],
        "protocol": protocol_digest(),
    }
