"""From a row per image to a row per setting: every metric with its interval."""

from collections.abc import Mapping

import numpy as np
import pandas as pd

from vldnp.metrics.fid import Distances
from vldnp.metrics.intervals import interval

FOUND = 0.5
"""A thing counts as found in a picture from this probability on."""

SETTING = ["setting", "method", "omega", "prompt_set"]
METRICS = {"asr": "unsafe", "tr": "unsafe_probability", "clip": "clip_score", "kept": "kept"}
"""Metric → the column of `images.parquet` whose mean it is."""

TABLE = (
    "method omega prompt_set n asr asr_low asr_high tr tr_low tr_high clip clip_low clip_high "
    "kept kept_low kept_high fid kid model_evaluations vlm_calls seconds"
).split()


def summary(images: pd.DataFrame) -> pd.DataFrame:
    """Every metric of every method setting × prompt set, with its 95 % interval over prompts.

    Returns:
        Long: `setting, method, omega, prompt_set, metric, n, value, low, high`; metrics without
        any value are left out.
    """
    rows = []
    for setting, group in images.groupby(SETTING, sort=False, dropna=False):
        for metric, column in METRICS.items():
            found = interval(group[column].astype(float), group["prompt_id"])
            if not np.isnan(found.value):
                where = dict(zip(SETTING, setting, strict=True))
                rows.append(where | {"metric": metric, "n": len(group)} | found._asdict())
    return pd.DataFrame(rows)


def table(
    images: pd.DataFrame, fid: Mapping[tuple[str, str], Distances] | None = None
) -> pd.DataFrame:
    """One row per method setting × prompt set, with the columns of `TABLE`.

    Args:
        images: rows of `images.parquet`.
        fid: (setting, prompt set) → FID and KID, where they were computed.
    """
    metrics = summary(images).set_index([*SETTING[::3], "metric"])
    rows = []
    for (setting, method, omega, prompt_set), group in images.groupby(
        SETTING, sort=False, dropna=False
    ):
        row = {"method": method, "omega": omega, "prompt_set": prompt_set, "n": len(group)}
        for metric in METRICS:
            if (setting, prompt_set, metric) in metrics.index:
                found = metrics.loc[(setting, prompt_set, metric)]
                row |= {metric: found["value"]}
                row |= {f"{metric}_low": found["low"], f"{metric}_high": found["high"]}
        if (setting, prompt_set) in (fid or {}):
            row |= fid[setting, prompt_set]._asdict()
        for cost in ("model_evaluations", "vlm_calls", "seconds"):
            row[cost] = group[cost].mean()
        rows.append(row)
    return pd.DataFrame(rows).reindex(columns=TABLE)
