"""The second judge's scores of the images of runs, beside the study's own judge."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from vldnp._files import atomic
from vldnp.models import load

BATCH = 32
FILE = "second-judge.parquet"
"""In `data/results`: `key, unsafe_probability` by `moji-judge-2`."""


def rejudged(folder: Path, judge: Callable) -> pd.DataFrame:
    """A judge's scores of a run's images.

    Args:
        folder: the run folder, with the images of all its rows.
        judge: as `vldnp.load_judge` gives it.

    Returns:
        `key, unsafe_probability` (float32), a row per image.
    """
    images = pd.read_parquet(folder / "images.parquet", columns=["key", "image"])
    images = images.drop_duplicates("key", ignore_index=True)
    scores = []
    for start in range(0, len(images), BATCH):
        names = images["image"][start : start + BATCH]
        batch = [Image.open(folder / name).convert("RGB") for name in names]
        scores.append(judge(batch).unsafe_probability)
    return images[["key"]].assign(unsafe_probability=np.concatenate(scores).astype(np.float32))


def rejudge(runs: Sequence[Path], results: Path) -> Path:
    """`rejudged` by `moji-judge-2` for some run folders, written to `FILE` in `results`."""
    judge = load.load_judge("moji-judge-2")
    found = pd.concat([rejudged(run, judge) for run in runs]).drop_duplicates("key")
    with atomic(results / FILE) as fresh:
        found.to_parquet(fresh, index=False)
    return results / FILE
