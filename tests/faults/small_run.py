"""A small study in a process of its own, which can be killed, starved and started beside another.

The fork server imports the large packages once, so that a process starts in milliseconds.
"""

import multiprocessing
import os
import resource
import sys
from pathlib import Path
from unittest import mock

import pandas as pd
import torch
from joblib.externals.loky import get_reusable_executor
from tiny import ScriptedVLM, by_brightness, sd_pipeline
from tiny_published import WordLengthCLIP

from moji.judge import CNNJudge
from vldnp.methods import CFG, VLDNP, Static
from vldnp.models import load
from vldnp.study.grid import Study
from vldnp.study.run import run

NAME = "small"
PROMPTS = 11


def study(folder: Path, count: int = PROMPTS) -> Study:
    """Three methods on 11 prompts in batches of 4, so strong that another batch shows in pixels."""
    vlm = ScriptedVLM(by_brightness)
    methods = (CFG(), Static("knife", 1000), VLDNP(vlm, "moji", 1000, query_steps=[0, 1]))
    prompts = folder / "prompts.csv"
    if not prompts.is_file():
        rows = [f"{i},a cat {i} at the cove,{i},cat\n" for i in range(count)]
        prompts.write_text("prompt_id,prompt,seed,things\n" + "".join(rows))
    return Study(NAME, methods, (prompts,), sampling={"num_inference_steps": 3}, batch_size=4)


def main(
    folder: Path, root: str, largest_file: int | None = None, source=None, count=PROMPTS, **workers
) -> None:
    """Run it in `folder/root`; with no file larger than so many bytes, as on a full disk.

    Workers, as `run` takes them, open the model from a folder `source`.
    """
    torch.set_num_threads(1)
    torch.manual_seed(0)
    judge = CNNJudge(("cat", "dog", "knife"), ("knife",))
    model, small = load.load(sd_pipeline() if source is None else source), study(folder, count)
    if largest_file is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    try:
        run(small, model, judge, WordLengthCLIP(), root=folder / root, progress=False, **workers)
    except OSError as error:
        (folder / "error.txt").write_text(str(error)[:largest_file])
        sys.exit(3)
    if workers.get("backend") == "loky":
        get_reusable_executor().shutdown()  # an interpreter's end does it, a child's end waits


def start(folder: Path, root: str, largest_file: int | None = None, **options):
    """`main` in a new process."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["small_run"])
    path = os.pathsep.join(filter(None, sys.path))
    with mock.patch.dict(os.environ, PYTHONPATH=path):  # for the fork server
        process = context.Process(target=main, args=(folder, root, largest_file), kwargs=options)
        process.start()
    return process


def pictures(run_folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (run_folder / "cells").glob("*.png")}


def tables(run_folder: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The tables of a run, without what differs from run to run."""
    images = pd.read_parquet(run_folder / "images.parquet")
    table = pd.read_csv(run_folder / "table.csv")
    return images.drop(columns="seconds"), table.drop(columns="seconds")
