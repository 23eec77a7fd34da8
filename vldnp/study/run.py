"""Running a study: a grid → images, computed once → measurements → tidy tables in a run folder."""

import json
import platform
import time
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

import pandas as pd
import torch
from tqdm.auto import tqdm

from vldnp._files import atomic, write_text
from vldnp.methods import Method
from vldnp.metrics.summary import table
from vldnp.models import load
from vldnp.models.backbone import Backbone
from vldnp.models.judges import check_threshold
from vldnp.sampler import sample
from vldnp.study import folder as files
from vldnp.study import grid
from vldnp.study.grid import NOISE, SCHEMA, Batch, Study, as_json, batch_key, digest, setting_of
from vldnp.study.measure import fid_of, measured, named, with_scores
from vldnp.study.prompts import set_name
from vldnp.study.workers import finished

GROWS, IRRELEVANT = ("methods", "prompts", "weights"), ("versions", "prompt_sets")
"""Keys of `config.json`: a study may gain entries of the first; the others do not identify it."""


def run(
    study: Study,
    model,
    judge,
    clip=None,
    root: str | Path = "runs",
    *,
    workers: int | None = None,
    backend: str | None = None,
    progress: bool = True,
) -> pd.DataFrame:
    """Compute what is missing of a study, measure it, and write its tables.

    The result is in `root/study.name`: `cells/` (a PNG and a JSON record per image), `scores/`,
    `images.parquet`, `table.csv` and `config.json`. Each file is written whole or not at all, so an
    interrupted run resumes, and several processes may work on one folder.

    Model, judge and CLIP are as `vldnp.load`, `load_judge` and `load_clip` take them; `workers` is
    how many processes make images (by default this one; their number changes no pixel), by a
    `backend` of joblib: "loky", "dask" or "ray". Returns a row per image; `seconds` is the time of
    its batch divided by the batch's images."""
    if "://" in str(root):
        raise ValueError(f"root must be a folder of a mounted file system, not {str(root)!r}")
    model = load.load(model)
    judge, clip = named(load.load_judge(judge)), named(load.load_clip(clip))
    check_threshold(judge, study.unsafe_threshold)
    # A bad size or schedule fails here, not in the middle.
    model.picture_size(study.sampling["height"], study.sampling["width"])
    for method in study.methods:
        method.negatives.query_steps_of(study.sampling["num_inference_steps"])
    weights = grid.live_weights(study, model, judge=judge, clip=clip)
    cells, folder = grid.cells(study, model, weights), Path(root) / study.name
    claim(folder, _config(study, model, judge, clip) | {"weights": weights})
    batches = grid.plan_batches(cells, study)
    generate(model, batches, folder, workers=workers, backend=backend, progress=progress)
    scores = measured(folder, [rows for _, rows, _ in batches], judge, clip, progress=progress)
    images = with_scores(cells, [scores[key] for key in cells["key"]], study.unsafe_threshold)
    images["image"] = [files.image_path(Path(), key).as_posix() for key in cells["key"]]
    records = [files.read_cell(folder, key) for key in cells["key"]]
    for name in files.RECORDED:
        images[name] = [record[name] for record in records]
    images["vlm_failures"] = [sum(map(bool, one)) for one in images["vlm_failures"]]
    files.warn_of_one_colour(images["one_colour"])
    with atomic(folder / "images.parquet") as temporary:
        images.to_parquet(temporary, index=False)
    distances = fid_of(study, images, judge, folder)
    with atomic(folder / "table.csv") as temporary:
        table(images, distances).to_csv(temporary, index=False)
    return images


def expected(study: Study) -> pd.DataFrame:
    """The largest cost of a study, by method: `method, omega, images, evaluations, vlm_calls`.
    Evaluations are the network's, if the VLM names something from its first query on."""
    images, rows = len(grid.cells(study, None)) // len(study.methods), []
    N = study.sampling["num_inference_steps"]
    for method in study.methods:
        said, queries = method.describe(), method.negatives.query_steps_of(N)
        steps = 0 if said["negatives"]["kind"] == "none" else N - min(queries, default=0)
        steps *= len(said["negatives"].get("categories", "x"))
        steps += N * (2 + bool(said["conditioning"].get("re_attention")))
        rows.append((method.name, method.omega, images, images * steps, images * len(queries)))
    return pd.DataFrame(rows, columns=["method", "omega", "images", "evaluations", "vlm_calls"])


def claim(folder: Path, config: Mapping) -> None:
    """Claim the folder for this study by `config.json`; a ValueError if it holds another study."""
    path, before = folder / "config.json", {}
    try:
        before = files.mapping(path)
    except ValueError:
        files.warn([path])
    except OSError:
        if (folder / "images.parquet").exists():
            said = "holds results without a config.json"
            raise ValueError(f"{folder} {said}: give this study another name") from None
    names = sorted(before.keys() - {*IRRELEVANT, *GROWS})
    other = [name for name in names if before[name] != config.get(name)]
    other += [name for name in GROWS if not before.get(name, {}).items() <= config[name].items()]
    if other:
        said = f"holds another study, with other {', '.join(other)}"
        raise ValueError(f"{folder} {said}: give this one another name, or remove the folder")
    write_text(path, as_json(config, indent=2) + "\n")


def generate(
    model, batches: Sequence[Batch], folder: Path, *, workers=None, backend=None, progress=True
) -> None:
    """Compute those batches of which the run folder lacks an image, each as a whole."""
    missing = lacking(folder, [key for _, rows, _ in batches for key in rows["key"]])
    records = [files.image_path(folder, key).with_suffix(".json") for key in sorted(missing)]
    files.warn([path for path in records if path.exists()])
    waiting = [batch for batch in batches if missing & {*batch[1]["key"]}]
    jobs = [(model, *batch, folder.absolute()) for batch in waiting]
    with tqdm(total=len(missing), desc="images", unit="image", disable=not progress) as bar:
        for number in finished(compute_batch, jobs, workers, backend):
            bar.update(len(missing & {*waiting[number][1]["key"]}))


def lacking(folder: Path, keys: Iterable[str]) -> set[str]:
    """The keys of images that are missing or damaged in the folder."""
    return {key for key in keys if files.read_cell(folder, key) is None}


def compute_batch(
    model: Backbone, method: Method, rows: pd.DataFrame, sampling: Mapping, folder: Path
) -> None:
    """Make a batch's images and write those that the run folder lacks, with their records."""
    if not (missing := lacking(folder, rows["key"])):
        return  # another process, or a worker before it died, has made them
    started, noise = time.perf_counter(), rows[NOISE].to_dict("list")
    own = {"seeds": noise["seed"], "guidance_scale": noise["guidance_scale"]}
    out = sample(model, noise["prompt"], method, progress=False, **own, **sampling)
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    shared = {"batch": batch_key(rows), "method": method.describe(), "sampling": dict(sampling)}
    shared |= {"model": model.name, "revision": model.revision}
    shared["seconds"] = (time.perf_counter() - started) / len(rows)
    for i, key in enumerate(rows["key"]):
        queries = [step for step in out.trace.steps if step.vlm_calls[i]]
        record = shared | {name: values[i] for name, values in noise.items()}
        record |= {
            "place": i,
            **{name: getattr(out.trace, name)[i] for name in files.SPENT if name != "seconds"},
            "negative_prompts": [step.negative_prompts[i] for step in out.trace.steps],
            "query_steps": [step.index for step in queries],
            "vlm_answers": [step.vlm_answers[i] for step in queries],
            "vlm_failures": [step.vlm_failures[i] for step in queries],
        }
        if key in missing:
            files.write_cell(folder, key, out.images[i], record)


def _config(study: Study, model: Backbone, judge, clip) -> dict:
    """The content of `config.json`; methods by setting, prompts by set."""
    models = {"model": model, "judge": judge}
    models |= {} if clip is None else {"clip": clip, "clip_model": getattr(clip, "clip", clip)}
    used = {set_name(s): study.prompts(s).astype(str).to_dict("list") for s in study.prompt_sets}
    config = vars(study) | {
        "schema": SCHEMA,
        "prompt_sets": list(map(str, study.prompt_sets)),
        "prompts": {name: digest(rows)[:12] for name, rows in used.items()},
        "methods": {setting_of(method): method.describe() for method in study.methods},
        **{kind: {"name": m.name, "revision": m.revision} for kind, m in models.items()},
        "dtype": str(model.dtype),
        "versions": {p: version(p) for p in ("torch", "diffusers", "transformers")}
        | {"machine": f"{platform.system()} {platform.machine()}"},
    }
    return json.loads(as_json(config))
