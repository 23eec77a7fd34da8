"""From a row per image to a row per setting: every metric with its interval."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd

from vldnp.metrics.fid import Distances
from vldnp.metrics.intervals import interval


@dataclass(frozen=True)
class Metric:
    """A number that is reported for a setting.

    Attributes:
        name: its column in `table.csv`, and what it is called in code.
        column: of `images.parquet`, whose mean it is; None where it is no mean over images.
        label: its heading in tables.
        better: 1 where larger is better, −1 where smaller is.
        format: of its values.
        gain: what it is called where it is turned so that larger is better.
    """

    name: str
    column: str | None
    label: str
    better: int
    format: str
    gain: str = ""


METRICS = {
    metric.name: metric
    for metric in (
        Metric("asr", "unsafe", "ASR", -1, ".2f", "Safety, 1 − ASR"),
        Metric("tr", "unsafe_probability", "TR", -1, ".2f", "1 − toxic rate"),
        Metric("clip", "clip_score", "CLIP", 1, ".3f", "CLIP score"),
        Metric("retention", "retention", "retention", 1, ".2f", "Retention"),
        Metric("clip_i", "clip_i", "CLIP-I", 1, ".2f", "CLIP-I to plain CFG"),
        Metric("fid", None, "FID", -1, ".3g"),
        Metric("kid", None, "KID", -1, ".3g"),
    )
}
"""What is measured in the pictures; tables and figures show it in this order."""

MEANS = {name: metric for name, metric in METRICS.items() if metric.column}
"""Those that are means over images, and so have an interval over prompts."""

COSTS = {
    cost.name: cost
    for cost in (
        Metric("model_evaluations", "model_evaluations", "U-Net evaluations", -1, ".1f"),
        Metric("vlm_calls", "vlm_calls", "VLM calls", -1, ".1f"),
        Metric("seconds", "seconds", "time", -1, ".2f"),
    )
}
"""What an image takes. The time is a busy machine's; `experiments.timing` measures it aside."""

SETTING = ["setting", "method", "omega", "prompt_set"]
TABLE = ["method", "omega", "prompt_set", "n"]
TABLE += [f"{name}{end}" for name in MEANS for end in ("", "_low", "_high")]
TABLE += [*(name for name in METRICS if name not in MEANS), *COSTS]


def summary(images: pd.DataFrame) -> pd.DataFrame:
    """Every metric of every method setting × prompt set, with its 95 % interval over prompts.

    Returns:
        Long: `setting, method, omega, prompt_set, metric, n, value, low, high`; metrics without
        any value are left out.
    """
    rows = []
    for setting, group in images.groupby(SETTING, sort=False, dropna=False):
        for name, metric in MEANS.items():
            if metric.column not in group:  # in rows published before it was measured
                continue
            found = interval(group[metric.column].astype(float), group["prompt_id"])
            if not np.isnan(found.value):
                where = dict(zip(SETTING, setting, strict=True))
                rows.append(where | {"metric": name, "n": len(group)} | found._asdict())
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
        for metric in MEANS:
            if (setting, prompt_set, metric) in metrics.index:
                found = metrics.loc[(setting, prompt_set, metric)]
                row |= {metric: found["value"]}
                row |= {f"{metric}_low": found["low"], f"{metric}_high": found["high"]}
        if (setting, prompt_set) in (fid or {}):
            row |= fid[setting, prompt_set]._asdict()
        for cost in COSTS:
            row[cost] = group[cost].mean()
        rows.append(row)
    return pd.DataFrame(rows).reindex(columns=TABLE)
