"""Each judge's scores of a run's images, beside those by either."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pandas as pd

from vldnp.models.load import load_judge
from vldnp.study.folder import load_images

BATCH = 256


def each_judge(images: pd.DataFrame, folder: Path, names: Iterable[str]) -> pd.DataFrame:
    """`key`, and the probability that an image is unsafe (float32) in a column for each judge of
    these names; `images` are the rows of the run in `folder`."""
    keys = images[["key"]].drop_duplicates(ignore_index=True)
    judges = {name: load_judge(name) for name in names}
    scores: dict[str, list] = {name: [] for name in judges}
    for start in range(0, len(keys), BATCH):
        batch = load_images(keys[start : start + BATCH], folder)
        for name, judge in judges.items():
            scores[name].append(judge(batch).unsafe_probability)
    columns = {name: np.concatenate(found).astype(np.float32) for name, found in scores.items()}
    return keys.assign(**columns)
