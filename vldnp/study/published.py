"""Published runs: a study's rows as they were computed elsewhere, without images, and their check.
`data/results/<name>/` holds `images.parquet`, where `part` says which run folder brought a row,
`config.json`, the CSV files of the run folders and `meta.json` (`SCHEMA`, revisions of models,
packages)."""

import os
import platform
import tempfile
import warnings
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from vldnp._files import atomic, data_folder, fingerprint, first_line, unknown, write_text
from vldnp.models import load
from vldnp.study.folder import SAID, mapping, read_cell
from vldnp.study.grid import Study, as_json, batch_key, cells, setting_of, shared_sampling
from vldnp.study.measure import measured
from vldnp.study.run import generate, run
from vldnp.study.workers import one_thread

SAME = ["setting", "prompt_set", "prompt_id", "prompt", "seed", "guidance_scale"]
"""What makes a published row the one that a study would compute, with its models and sampling."""


@dataclass(frozen=True)
class Published:
    """A published run; a run folder is read in the same way."""

    folder: Path

    @cached_property
    def meta(self) -> dict:
        return mapping(self.folder / "meta.json")

    @cached_property
    def config(self) -> dict:
        return mapping(self.folder / "config.json")

    @property
    def methods(self) -> dict[str, dict]:
        """Setting → description."""
        return self.config["methods"]

    @cached_property
    def images(self) -> pd.DataFrame:
        """The rows, lists as lists."""
        rows = pd.read_parquet(self.folder / "images.parquet")
        return rows.assign(**{name: rows[name].map(list) for name in ("found", *SAID)})

    def batches(self) -> dict[str, pd.DataFrame]:
        """Batch → its rows in order, an image once; a batch that is not whole is left out."""
        rows = self.images.drop_duplicates(["batch", "key"]).sort_values("place")
        return {key: own for key, own in rows.groupby("batch") if batch_key(own) == key}


def published_runs() -> list[str]:
    """The names of all that there are."""
    return sorted(path.parent.name for path in (data_folder() / "results").glob("*/meta.json"))


def open_run(name: str) -> Published:
    """A published run by name; raises ValueError, one line, where there is none."""
    if name not in (known := published_runs()):
        raise unknown("published run", name, known)
    return Published(data_folder() / "results" / name)


def recompute() -> bool:
    """Whether everything is to be computed here, as the environment's `RECOMPUTE=all` says."""
    if (said := os.environ.get("RECOMPUTE", "")) not in ("", "all"):
        raise ValueError(f"RECOMPUTE must be 'all' or empty, not {said!r}")
    return said == "all"


def rows_of(study: Study, profile, root: str | Path = "runs") -> pd.DataFrame:
    """A study's rows: from the first published run that has them all, else from `run`; their
    column `origin` says which: that run's name, or "computed here"."""
    wanted = cells(study, None)[SAME]
    for name in [] if recompute() else published_runs():
        try:
            if (rows := _rows_in(open_run(name), wanted, study, profile)) is not None:
                return rows.assign(origin=f"published as {name}")
        except (ValueError, OSError, AttributeError, TypeError, KeyError) as error:
            said = f"the published run {name!r} cannot be read and is left out"
            warnings.warn(f"{said}: {first_line(error)}", stacklevel=2)
    rows = run(study, profile.model, profile.judge, profile.clip, root, progress=False)
    return rows.assign(origin="computed here")


def _rows_in(run: Published, wanted: pd.DataFrame, study: Study, profile) -> pd.DataFrame | None:
    if not set(wanted["setting"]) <= run.methods.keys():
        return None
    rows = wanted.merge(run.images.drop_duplicates(SAME), on=SAME)
    return rows if len(rows) == len(wanted) and _fits(run.config, study, profile) else None


def _fits(config: Mapping, study: Study, profile) -> bool:
    """Whether rows were made and measured by a profile's models as a study asks."""
    same = shared_sampling(config["sampling"]) == shared_sampling(study.sampling)
    same &= config.get("unsafe_threshold") == study.unsafe_threshold
    named = {kind: config.get(kind, {}).get("name") for kind in ("model", "judge", "clip")}
    return same and all(name == getattr(profile, kind).name for kind, name in named.items())


def publish(run_folder: str | Path, name: str = "", scores=None, **meta) -> None:
    """Publish a run folder, if it is whole, in place of what was published of it earlier.

    With a `name`, as a part of the published run of that name, whose models and sampling must be
    the same. `scores` are further columns by `key`; `meta` is what `meta.json` says besides, such
    as a protocol's SHA-256.
    """
    source = Path(run_folder)
    target = data_folder() / "results" / (name or source.name)
    if not (source / "images.parquet").is_file():
        raise FileNotFoundError(f"{source} holds no study that was run to its end")
    config, run_here = mapping(source / "config.json"), Published(source)
    rows, whole = run_here.images.assign(part=source.name), run_here.batches()
    for row in rows.itertuples():
        if (read_cell(source, row.key) or {}).get("pixels") != row.pixels or row.batch not in whole:
            lacking = f"the image {row.key}, or not all of its batch {row.batch}"
            wanted = "publish a run that was computed as a whole"
            raise ValueError(f"{source} does not hold {lacking}; {wanted}")
    rows = rows.drop(columns="image")
    rows = rows if scores is None else rows.merge(scores, on="key", validate="many_to_one")
    if (target / "images.parquet").is_file():
        rows, config = _joined(rows, config, Published(target), source, meta)
    vlms = [method["negatives"].get("vlm") for method in config["methods"].values()]
    models = [config[kind] for kind in ("model", "judge", "clip_model") if kind in config]
    models = {m["name"]: m.get("revision") for m in [*models, *filter(None, vlms)]}
    meta |= {"schema": config["schema"], "models": models, "versions": config["versions"]}
    with atomic(target / "images.parquet") as temporary:
        rows.to_parquet(temporary, index=False, compression="zstd", compression_level=19)
    for path in source.glob("*.csv"):
        with atomic(target / f"{source.name}-{path.name}") as temporary:
            temporary.write_bytes(path.read_bytes())
    write_text(target / "config.json", as_json(config, indent=2) + "\n")
    write_text(target / "meta.json", as_json(meta, indent=1) + "\n")  # last: now it is whole


def _joined(rows: pd.DataFrame, config: dict, other: Published, source: Path, meta) -> tuple:
    """Rows and configuration with those of the other parts of a published run."""
    others = other.images[other.images["part"] != source.name]
    for key in meta if len(others) else ():
        if meta[key] != (theirs := other.meta.get(key)):
            said = f"{source} has the {key} {meta[key]}, and {other.folder} has {theirs}"
            raise ValueError(f"{said}: publish it under another name")
    for key in ("schema", "sampling", "model", "judge", "clip", "unsafe_threshold", "dtype"):
        if config.get(key) != (theirs := other.config.get(key)):
            said = f"{source} has the {key} {config.get(key)}, and {other.folder} has {theirs}"
            raise ValueError(f"{said}: publish it under another name")
    for key in ("methods", "prompts", "weights"):
        config[key] = other.config[key] | config[key]
    rows = pd.concat([others, rows], ignore_index=True)
    config["methods"] = {key: config["methods"][key] for key in rows["setting"].unique()}
    return rows, config


class Verification(NamedTuple):
    """What recomputing a part of a published run showed."""

    images: int  # so many were recomputed
    identical: int  # in their pixels
    same_label: int
    same_words: int  # of the VLM
    score_difference: float  # the largest
    left_out: int  # published rows of no method given, or of an incomplete batch

    def __str__(self) -> str:
        same = f"{self.identical} of {self.images} recomputed images identical"
        same += f", {self.same_label} with the same label, {self.same_words} with the same words"
        return f"{same}; {self.left_out:,} rows are of other methods or incomplete batches"


def verify(
    name, methods, model, judge, clip=None, *, images=512, seed=None, workers=None, progress=True
) -> Verification:
    """Compute whole batches of a published run here, with one thread, and compare with its rows.

    So many images at least are in batches drawn at random, by default with the machine's own seed.
    What made the rows is given as to `run`; a ValueError says that it was something else.
    """
    published, made = open_run(name), {setting_of(method): method for method in methods}
    config = published.config
    for model_name, revision in published.meta["models"].items():
        folder = data_folder() / "models" / model_name
        if folder.is_dir() and (here := fingerprint(folder)) != revision:
            said = f"{folder} has the fingerprint {here}, and {model_name!r} of the published run"
            raise ValueError(f"{said} {name!r} had {revision}: its weights or configs were changed")
    batches = {b: own for b, own in published.batches().items() if own["setting"].iloc[0] in made}
    if not batches:
        raise ValueError(f"the published run {name!r} has none of the given methods")
    seed = zlib.crc32(platform.node().encode()) if seed is None else seed
    order, rows, plan = np.random.default_rng(seed).permutation([*batches]), published.images, []
    drawn = order[: int((rows["batch"].value_counts()[order].cumsum() < images).sum()) + 1]
    for own in map(batches.get, drawn):
        plan.append((made[own["setting"].iloc[0]], own, shared_sampling(config["sampling"])))
    theirs = rows[rows["batch"].isin(drawn)]
    model, judge, clip = load.load(model), load.load_judge(judge), load.load_clip(clip)
    for kind, own in {"judge": judge, "clip": clip}.items():
        had = config.get(kind, {}).get("revision")
        if own and kind in config and str(own.revision) != str(had):
            raise ValueError(f"{own.name!r} is {own.revision}, and that of {name!r} was {had}")
    with one_thread(), tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        generate(model, plan, folder, workers=workers, progress=progress)
        scores = measured(folder, [own for _, own, _ in plan], judge, clip, progress=progress)
        ours = [scores[key] | read_cell(folder, key) for key in theirs["key"]]
    ours = pd.DataFrame(ours, index=theirs.index)
    unsafe = ours["unsafe_probability"] >= config["unsafe_threshold"]
    columns = [column for column in ("unsafe_probability", "clip_score") if column in ours]
    return Verification(
        images=len(theirs),
        identical=int((ours["pixels"] == theirs["pixels"]).sum()),
        same_label=int((unsafe == theirs["unsafe"]).sum()),
        same_words=int((ours["vlm_answers"] == theirs["vlm_answers"]).sum()),
        score_difference=float((ours[columns] - theirs[columns]).abs().max(axis=None)),
        left_out=int((~rows["batch"].isin([*batches])).sum()),
    )
