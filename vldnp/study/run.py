"""Running a study: a grid → images, computed once → measurements → tidy tables in a run folder."""

import json
import os
import platform
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from PIL import Image
from tqdm.auto import tqdm

from vldnp._files import atomic, sweep, write_text
from vldnp._finite import label, naming
from vldnp.concepts import load_concepts
from vldnp.metrics.summary import table
from vldnp.models import load
from vldnp.models.backbone import Backbone
from vldnp.models.clip import CLIPScore
from vldnp.models.judges import Judge, Judgement
from vldnp.sampler import sample
from vldnp.study import published, run_clip
from vldnp.study.captions import CaptionsWithout
from vldnp.study.grid import SCHEMA, Batch, Cell, Study, as_json, cells, plan_batches
from vldnp.study.run_fid import Draw, run_distances
from vldnp.study.run_folder import (
    SAID,
    SPENT,
    changes,
    image_path,
    lacking,
    open_images,
    opened,
    read_record,
    read_scores,
    score_folder,
    set_aside,
    write_cell,
    write_scores,
)
from vldnp.study.workers import finished

PROGRESS = "progress.json"


def run(
    study: Study,
    model,
    judge: Judge | str,
    clip: CLIPScore | str | None = None,
    root: str | Path = "runs",
    *,
    progress: bool = True,
    recompute: bool | None = None,
    workers: int | None = None,
    backend: str | None = None,
) -> pd.DataFrame:
    """Compute what is missing of a study, measure it, and write its tables.

    Images that a published run holds (`experiments.published`) are neither made nor measured, but
    for those of plain CFG beside which CLIP-I measures new ones; their rows are taken over, and so
    is the table where it holds the whole study.

    In `root/study.name` there are afterwards `cells/` (a PNG and a JSON record per image),
    `scores/` (measurements), `images.parquet`, `table.csv` and `config.json` (all that was
    resolved). Each file is written whole or not at all. Tables of another study that lie there
    are moved to `earlier/` first, with a warning, unless the new ones hold all their rows.

    Args:
        study: the grid.
        model, judge, clip: names or objects, as `vldnp.load`, `load_judge` and `load_clip` take
            them; without a CLIP model its score is empty.
        root: where run folders lie.
        progress: show bars.
        recompute: take over no published rows; None means what the environment variable
            `RECOMPUTE` says, `all` or nothing.
        workers: how many processes make images, each with one thread and models of its own. Models
            and VLMs that `vldnp.load` and `load_vlm` opened by name, folder or address are opened
            once in each; other callables are pickled; a model that exists in this process only
            needs `workers` and `backend` left out, and images are then made here. Nothing but the
            number of threads of a process decides how images are rounded, not the workers' number.
        backend: "loky", processes of this machine; "ray" or "dask", a cluster. Without `workers`,
            one for each GPU, or for each core where there is none.

    Returns:
        One row per image, as in `images.parquet`. `model_evaluations` and `vlm_calls` are totals
        over the image's steps; `seconds` is the time of its batch divided by the batch's images.

    Raises:
        ValueError: a study or a folder that does not do.
        OSError: one line that names the file that could not be written.
    """
    if "://" in str(root):
        raise ValueError(
            f"root must be a folder, not the address {str(root)!r}: a run renames and locks files, "
            "which object stores do not; use one that is mounted"
        )
    model, judge = load.load(model), load.load_judge(judge)
    clip = clip_of(study, clip)
    for method in study.methods:  # a bad schedule fails here, not in the middle
        method.negatives.query_steps_of(study.num_inference_steps)
    grid = cells(study, model)
    folder, config = Path(root) / study.name, _config(study, model, judge, clip)
    anew = published.recompute(recompute)
    known = published.Known() if anew else published.lookup(study, grid, folder, config)
    batches = [
        batch
        for batch in plan_batches(grid, study)
        if not known.keys.issuperset(cell.key for cell in batch.cells)
    ]
    generate(model, batches, folder, progress=progress, workers=workers, backend=backend)

    scores = scored(folder, judge, clip, batches, progress=progress)
    images = pd.DataFrame([known.row(c, study) or _row(c, folder, scores, study) for c in grid])
    chance, fid = known.chance, {}
    if known.whole is None:  # these need pictures
        draw = drawing(study, model, root, progress=progress)
        chance = chance | run_clip.chance(images[~images["prompt_set"].isin(chance)], draw, clip)
        made = images[~images["key"].isin(known.keys)]
        images.loc[made.index, "clip_i"] = run_clip.clip_i(made, images, draw, clip, folder)
        fid = run_distances(study, images, draw, judge)
    else:
        config["published"] = known.whole.folder.name
    images["clip_chance"] = images["prompt_set"].map(chance)
    if other := changes(study, folder, config, images):
        set_aside(study, folder, other)
    with atomic(folder / study.file("images.parquet")) as temporary:
        images.to_parquet(temporary, index=False)
    with atomic(folder / study.file("table.csv")) as temporary:
        if known.whole is None:
            table(images, fid).to_csv(temporary, index=False)
        else:  # FID and KID in there are of pictures that are not here
            shutil.copyfile(known.whole.file("table.csv"), temporary)
    write_text(folder / study.file("config.json"), as_json(config, indent=2) + "\n")
    return images


def clip_of(study: Study, clip: CLIPScore | str | None) -> CLIPScore | CaptionsWithout | None:
    """What scores a study's alignment: the CLIP model, with the study's captions."""
    if clip is None:
        return None
    clip = load.load_clip(clip)
    if study.captions_without is None:
        return clip
    return CaptionsWithout(clip, load_concepts(study.captions_without))


def generate(
    model: Backbone,
    batches: Iterable[Batch],
    folder: Path,
    *,
    progress: bool = True,
    workers: int | None = None,
    backend: str | None = None,
) -> None:
    """Compute those batches of which the run folder lacks an image.

    A batch is computed as a whole, also where some of its images are there, which are not written
    again: so a run that was killed ends in the same pixels. `progress.json` in the run folder says
    how far it is, to whoever looks from outside.
    """
    sweep(folder)
    missing = lacking(folder, (cell.key for batch in batches for cell in batch.cells))
    waiting = [batch for batch in batches if missing & {cell.key for cell in batch.cells}]
    if not waiting:
        return
    total, done = sum(len(batch.cells) for batch in waiting), 0
    with tqdm(total=total, desc="images", unit="image", disable=not progress) as bar:

        def show(batch: Batch) -> None:
            method = batch.method
            label = method.name if method.omega is None else f"{method.name} ω={method.omega:g}"
            write_text(folder / PROGRESS, as_json({"done": done, "total": total, "method": label}))
            bar.set_postfix_str(label)

        show(waiting[0])  # fails before hours of work, if it must
        for batch in finished(compute_batch, model, waiting, folder, workers, backend):
            done += len(batch.cells)
            bar.update(len(batch.cells))
            show(batch)
    sweep(folder)  # after workers that were killed


def drawing(study: Study, model, root: str | Path = "runs", *, progress: bool = True) -> Draw:
    """What gives the pictures of a study's rows, and makes those that its run folder lacks.

    Each is made in the batch that its row names, which is made whole, so that the pixels agree.

    Args:
        study, model, root, progress: as in `run`.

    Returns:
        Rows of what `run` returned → their pictures, in order. It raises ValueError where a row's
        batch is one that neither the study nor a published run has.
    """
    folder = Path(root) / study.name

    def own() -> list[Batch]:
        return plan_batches(cells(study, load.load(model)), study)

    def draw(rows: pd.DataFrame) -> list[Image.Image]:
        absent = rows[[not image_path(folder, key).is_file() for key in rows["key"]]]
        if len(absent):
            opened = load.load(model)
            batches = list(published.batches_of(absent["batch"], study, opened, own))
            generate(opened, batches, folder, progress=progress)
            made = {cell.key for batch in batches for cell in batch.cells}
            if lost := [row for row in absent.itertuples() if row.key not in made]:
                raise ValueError(
                    f"{image_path(folder, lost[0].key)} is missing, and neither study "
                    f"{study.name!r} nor a published run has its batch {lost[0].batch}"
                )
        return open_images(rows, folder)

    return draw


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
    steps = out.trace.steps
    for i, cell in enumerate(batch.cells):
        queries = [step for step in steps if step.asked(i)]
        record = {
            "key": cell.key,
            "batch": batch.key,
            "method": cell.method.describe(),
            "model": model.name,
            "revision": model.revision,
            "prompt": cell.prompt,
            "seed": cell.seed,
            "num_inference_steps": batch.sampling["num_inference_steps"],
            "guidance_scale": cell.guidance_scale,
            "scheduler": batch.sampling["scheduler"],
            "model_evaluations": out.trace.model_evaluations[i],
            "vlm_calls": out.trace.vlm_calls[i],
            "x0_decodes": out.trace.x0_decodes[i],
            "seconds": seconds,
            "negative_prompts": [step.negative_prompts[i] for step in steps],
            "query_steps": [step.index for step in queries],
            "vlm_answers": [step.vlm_answers[i] for step in queries],
            "vlm_failures": [step.vlm_failures[i] for step in queries],
        }
        write_cell(folder, cell.key, out.images[i], record)


def scored(
    folder: Path,
    judge: Judge,
    clip: CLIPScore | None,
    batches: Sequence[Batch],
    *,
    progress: bool = True,
) -> dict[str, dict[str, dict]]:
    """`judge` and `clip` → cell key → its measurements; what the batches lack is measured now."""
    scores = {"judge": _judged(folder, judge, batches, progress)}
    if clip is not None:
        scores["clip"] = _clip_scored(folder, clip, batches, progress)
    return scores


def _judged(
    folder: Path, judge: Judge, batches: Sequence[Batch], progress: bool
) -> dict[str, dict]:
    def measure(some: Sequence[Cell], images: list[Image.Image]) -> list[dict]:
        judgement = judge(images)
        things = judgement.things or [None] * len(some)
        return [
            {"unsafe_probability": float(p), "concepts": c, "things": t}
            for p, c, t in zip(
                judgement.unsafe_probability, judgement.concepts, things, strict=True
            )
        ]

    columns = ("unsafe_probability", "concepts", "things")
    return _scored(folder, "judge", judge, columns, measure, batches, progress)


def _clip_scored(
    folder: Path, clip: CLIPScore, batches: Sequence[Batch], progress: bool
) -> dict[str, dict]:
    def measure(some: Sequence[Cell], images: list[Image.Image]) -> list[dict]:
        cosines = clip(images, [cell.prompt for cell in some])
        return [{"clip_score": float(cosine)} for cosine in cosines]

    return _scored(folder, "clip", clip, ("clip_score",), measure, batches, progress)


def _scored(
    folder: Path,
    kind: str,
    model: Judge | CLIPScore,
    columns: Sequence[str],
    measure: Callable,
    batches: Sequence[Batch],
    progress: bool,
) -> dict[str, dict]:
    """Measurements by cell key; those that `scores/` holds from this model are not repeated."""
    scores = score_folder(folder, kind, model)
    known = read_scores(scores, columns)
    missing = [[cell for cell in batch.cells if cell.key not in known] for batch in batches]
    missing = [some for some in missing if some]
    quiet = not (progress and missing)
    for some in tqdm(missing, desc=f"{kind} scores", unit="batch", disable=quiet):
        labels = [f"{label(i, cell.prompt, cell.seed)}, {cell.key}" for i, cell in enumerate(some)]
        with naming(labels):
            rows = measure(some, [opened(image_path(folder, cell.key)) for cell in some])
        for cell, row in zip(some, rows, strict=True):
            if not np.isfinite(number := row[columns[0]]):
                path = image_path(Path(), cell.key).as_posix()
                raise ValueError(f"the {kind} {model.name!r} gives {number} for {path}")
        known |= write_scores(scores, {cell.key: row for cell, row in zip(some, rows, strict=True)})
    return known


def _row(cell: Cell, folder: Path, scores: Mapping[str, Mapping], study: Study) -> dict:
    record, score = read_record(folder, cell.key), scores["judge"][cell.key]
    unsafe, things = score["unsafe_probability"], score["things"]
    judged = Judgement(
        np.array([unsafe]), [score["concepts"]], None if things is None else [things]
    )
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
        "clip_score": scores["clip"][cell.key]["clip_score"] if "clip" in scores else np.nan,
        "clip_i": np.nan,
        **{column: record[column] for column in (*SPENT, *SAID)},
        "image": image_path(Path(), cell.key).as_posix(),
        "key": cell.key,
        "batch": record.get("batch"),
    }


def _config(study: Study, model: Backbone, judge: Judge, clip: CLIPScore | None) -> dict:
    """All that was resolved, as it will be read from `config.json`."""
    settings = {key: value for key, value in vars(study).items() if key != "methods"}
    settings["prompt_sets"] = [str(source) for source in study.prompt_sets]
    measured = {"judge": judge}
    if clip is not None:
        measured |= {"clip": clip, "clip_model": getattr(clip, "clip", clip)}
    config = {
        "schema": SCHEMA,
        **settings,
        "methods": [method.describe() for method in study.methods],
        "model": {"name": model.name, "revision": model.revision, "dtype": str(model.dtype)},
        **{k: {"name": m.name, "revision": m.revision} for k, m in measured.items()},
        "versions": {p: version(p) for p in ("torch", "diffusers", "transformers")}
        | {"machine": _machine(model.device)},
    }
    return json.loads(as_json(config))


def _machine(device: torch.device) -> str:
    """In words; with the GPU, if the images are made there."""
    gpu = [torch.cuda.get_device_name(device)] if device.type == "cuda" else []
    parts = [f"{platform.system()} {platform.machine()}", f"{os.cpu_count()} CPUs", *gpu]
    return ", ".join(parts)
