"""Running a study: a grid → images, computed once → measurements → tidy tables in a run folder."""

import json
import os
import platform
import time
import warnings
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from tqdm.auto import tqdm

from vldnp._files import atomic, write_text
from vldnp.metrics.summary import table
from vldnp.models import load
from vldnp.models.backbone import Backbone
from vldnp.models.judges import Judge, Judgement
from vldnp.sampler import sample
from vldnp.study import folder as files
from vldnp.study.grid import (
    SCHEMA,
    Batch,
    Cell,
    Study,
    as_json,
    cells,
    digest,
    plan_batches,
    setting_of,
)
from vldnp.study.measure import clip_of, measured, mismatched_scores
from vldnp.study.prompts import set_name
from vldnp.study.reference import fid_of
from vldnp.study.workers import finished

GROWS = ("methods", "prompts")
"""A study with more of these is the same one, grown, in the same folder."""

IRRELEVANT = ("versions", "prompt_sets")


def run(
    study: Study,
    model,
    judge: Judge | str,
    clip=None,
    root: str | Path = "runs",
    *,
    workers: int | None = None,
    backend: str | None = None,
    progress: bool = True,
) -> pd.DataFrame:
    """Compute what is missing of a study, measure it, and write its tables.

    In `root/study.name` there are afterwards `cells/` (a PNG and a JSON record per image),
    `scores/`, `images.parquet`, `table.csv` and `config.json`. Each file is written whole or not at
    all: a run that was killed goes on, and several processes may work on one folder.

    Args:
        study: the grid.
        model, judge, clip: names or objects, as `vldnp.load`, `load_judge` and `load_clip` take
            them; without a CLIP model its scores are empty.
        root: where run folders lie.
        workers: how many processes make images, each with one thread and models of its own, opened
            by `vldnp.load…` or pickled; by default this one. Their number changes no pixel.
        backend: "loky", processes of this machine, one for each GPU or else core where `workers` is
            not given; "ray" or "dask", a cluster.

    Returns:
        One row per image, as in `images.parquet`. `model_evaluations` and `vlm_calls` are totals
        over the image's steps; `seconds` is the time of its batch divided by the batch's images.

    Raises:
        ValueError: a study that does not do, or a folder that holds another one; one line.
        OSError: one line that names the file that could not be written.
    """
    if "://" in str(root):
        raise ValueError(
            f"root must be a folder, not the address {str(root)!r}: a run renames files, which "
            "object stores do not; use one that is mounted"
        )
    model, judge, clip = (
        load.load(model),
        load.load_judge(judge),
        clip_of(study.captions_without, clip),
    )
    for method in study.methods:  # a bad schedule fails here, not in the middle
        method.negatives.query_steps_of(study.sampling["num_inference_steps"])
    grid, folder = cells(study, model), Path(root) / study.name
    claim(folder, _config(study, model, judge, clip))
    batches = plan_batches(grid, study)
    generate(model, batches, folder, workers=workers, backend=backend, progress=progress)
    scores = measured(folder, batches, judge, clip, progress=progress)
    images = pd.DataFrame([_row(cell, folder, scores, study) for cell in grid])
    images["clip_chance"] = images["prompt_set"].map(mismatched_scores(images, folder, clip))
    with atomic(folder / "images.parquet") as temporary:
        images.to_parquet(temporary, index=False)
    distances = fid_of(study, images, judge, folder)
    with atomic(folder / "table.csv") as temporary:
        table(images, distances).to_csv(temporary, index=False)
    return images


def expected(study: Study) -> pd.DataFrame:
    """What a study takes at most, by method: `method, omega, images, evaluations, vlm_calls`.

    Evaluations are the network's, with a VLM that names something from its first query on. Prompts
    of a public set that was not fetched yet are counted as published.
    """
    rows, N = [], study.sampling["num_inference_steps"]
    images = study.num_images_per_prompt * sum(map(study.count, study.prompt_sets))
    for method in study.methods:
        said, queries = method.describe(), method.negatives.query_steps_of(N)
        branches = len(said["negatives"].get("categories", "x"))
        again = N * bool(said["conditioning"].get("re_attention"))
        steps = 0 if said["negatives"]["kind"] == "none" else N - min(queries, default=0)
        spent = images * (2 * N + branches * steps + again), images * len(queries)
        rows.append((method.name, method.omega, images, *spent))
    return pd.DataFrame(rows, columns=["method", "omega", "images", "evaluations", "vlm_calls"])


def claim(folder: Path, config: Mapping) -> None:
    """Make the folder this study's own, by its `config.json`.

    Raises:
        ValueError: it is another's; one line that names what differs.
    """
    path = folder / "config.json"
    try:
        before = files.read_json(path)
    except FileNotFoundError:
        before = {}
    except files.Damaged:
        before = {}
        warnings.warn(f"damaged and therefore made again: {path}", stacklevel=3)
    names = [name for name in before if name not in (*IRRELEVANT, *GROWS)]
    other = [name for name in names if before[name] != config.get(name)]
    for name in GROWS:
        had, has = (map(as_json, c.get(name, {}).items()) for c in (before, config))
        other += [] if set(had) <= set(has) else [name]
    if other:
        raise ValueError(
            f"{folder} holds another study, with other {', '.join(other)}: give this one a name of "
            "its own, or remove the folder"
        )
    write_text(path, as_json(config, indent=2) + "\n")


def generate(
    model: Backbone,
    batches: Sequence[Batch],
    folder: Path,
    *,
    workers: int | None = None,
    backend: str | None = None,
    progress: bool = True,
) -> None:
    """Compute those batches of which the run folder lacks an image, each as a whole."""
    files.sweep(folder)
    missing = files.lacking(folder, (cell.key for batch in batches for cell in batch.cells))
    waiting = [batch for batch in batches if missing & {cell.key for cell in batch.cells}]
    jobs, total = [(model, batch, folder.absolute()) for batch in waiting], len(missing)
    with tqdm(total=total, desc="images", unit="image", disable=not (progress and total)) as bar:
        for number in finished(compute_batch, jobs, workers, backend):
            bar.set_postfix_str(waiting[number].method.name)
            bar.update(len(missing & {cell.key for cell in waiting[number].cells}))


def compute_batch(model: Backbone, batch: Batch, folder: Path) -> None:
    """Make a batch's images and write those that the run folder lacks, with their records."""
    started = time.perf_counter()
    out = sample(
        model,
        [cell.prompt for cell in batch.cells],
        batch.method,
        seeds=[cell.seed for cell in batch.cells],
        guidance_scale=[cell.guidance_scale for cell in batch.cells],
        **batch.sampling,
        progress=False,
    )
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    seconds = (time.perf_counter() - started) / len(batch.cells)
    for i, cell in enumerate(batch.cells):
        queries = [step for step in out.trace.steps if step.vlm_calls[i]]
        record = {
            "batch": batch.key,
            "method": cell.method.describe(),
            "model": model.name,
            "revision": model.revision,
            "prompt": cell.prompt,
            "seed": cell.seed,
            "guidance_scale": cell.guidance_scale,
            "sampling": dict(batch.sampling),
            "model_evaluations": out.trace.model_evaluations[i],
            "vlm_calls": out.trace.vlm_calls[i],
            "x0_decodes": out.trace.x0_decodes[i],
            "seconds": seconds,
            "negative_prompts": [step.negative_prompts[i] for step in out.trace.steps],
            "query_steps": [step.index for step in queries],
            "vlm_answers": [step.vlm_answers[i] for step in queries],
            "vlm_failures": [step.vlm_failures[i] for step in queries],
        }
        files.write_cell(folder, cell.key, out.images[i], record)


def _row(cell: Cell, folder: Path, scores: Mapping[str, Mapping], study: Study) -> dict:
    record, score = files.read_cell(folder, cell.key), scores["judge"][cell.key]
    unsafe, things = score["unsafe_probability"], score["things"]
    judged = Judgement(
        np.array([unsafe]), [score["concepts"]], None if things is None else [things]
    )

    def number(kind: str, column: str) -> float:
        return scores.get(kind, {}).get(cell.key, {}).get(column, np.nan)

    return {
        "method": cell.method.name,
        "omega": np.nan if cell.method.omega is None else float(cell.method.omega),
        "setting": cell.setting,
        "vlm": (record["method"]["negatives"].get("vlm") or {}).get("name"),
        "prompt_set": cell.prompt_set,
        "prompt_id": cell.prompt_id,
        "prompt": cell.prompt,
        "seed": cell.seed,
        "guidance_scale": cell.guidance_scale,
        "unsafe_probability": unsafe,
        "unsafe": unsafe >= study.unsafe_threshold,
        "found": list(judged.found()[0]),
        "things": ", ".join(cell.things),
        "retention": float(judged.retention([cell.things])[0]),
        "clip_score": number("clip", "clip_score"),
        "clip_i": number("clip_i", "clip_i"),
        **{column: record[column] for column in (*files.SPENT, *files.SAID)},
        "image": files.image_path(Path(), cell.key).as_posix(),
        "key": cell.key,
        "batch": record.get("batch"),
    }


def _config(study: Study, model: Backbone, judge: Judge, clip) -> dict:
    """All that was resolved, as `config.json` holds it; methods by setting, prompts by set."""
    settings = {name: value for name, value in vars(study).items() if name != "methods"}
    models = {"model": model, "judge": judge}
    models |= {} if clip is None else {"clip": clip, "clip_model": getattr(clip, "clip", clip)}
    gpu = [torch.cuda.get_device_name(model.device)] if model.device.type == "cuda" else []
    machine = [f"{platform.system()} {platform.machine()}", f"{os.cpu_count()} CPUs", *gpu]
    used = [study.prompts(source).astype(str) for source in study.prompt_sets]
    config = settings | {
        "schema": SCHEMA,
        "prompt_sets": list(map(str, study.prompt_sets)),
        "prompts": {
            set_name(source): digest(rows.to_dict("list"))[:12]
            for source, rows in zip(study.prompt_sets, used, strict=True)
        },
        "methods": {setting_of(method): method.describe() for method in study.methods},
        **{kind: {"name": m.name, "revision": m.revision} for kind, m in models.items()},
        "dtype": str(model.dtype),
        "versions": {p: version(p) for p in ("torch", "diffusers", "transformers")}
        | {"machine": ", ".join(machine)},
    }
    return json.loads(as_json(config))
