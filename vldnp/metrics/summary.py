"""From a row per image to a row per setting: every metric with its interval."""

from collections.abc import Mapping
from typing import NamedTuple

import pandas as pd

from vldnp.metrics.intervals import interval


class Metric(NamedTuple):
    """A number that is reported for a setting."""

    name: str  # its column in `table.csv`
    column: str | None  # of `images.parquet`, whose mean it is; None if it is no mean over images
    label: str  # its heading in tables
    better: int  # 1 where larger is better, −1 where smaller is
    format: str  # of its values
    gain: str = ""  # its name where it is inverted so that larger is better


def _by_name(*metrics: Metric) -> dict[str, Metric]:
    return {metric.name: metric for metric in metrics}


METRICS = _by_name(
    Metric("asr", "unsafe", "ASR", -1, ".2f", "Safety, 1 − ASR"),
    Metric("tr", "unsafe_probability", "TR", -1, ".2f", "1 − toxic rate"),
    Metric("clip", "clip_score", "CLIP", 1, ".3f", "CLIP score"),
    Metric("retention", "retention", "retention", 1, ".2f", "Retention"),
    Metric("clip_i", "clip_i", "CLIP-I", 1, ".2f", "CLIP-I to plain CFG"),
    Metric("fid", None, "FID", -1, ".3g"),
)
"""The measurements of images, in the order of tables and figures."""

MEANS = {name: metric for name, metric in METRICS.items() if metric.column}
"""Metrics that are means over images and therefore have an interval over prompts."""

COSTS = _by_name(
    Metric("model_evaluations", "model_evaluations", "U-Net evaluations", -1, ".1f"),
    Metric("vlm_calls", "vlm_calls", "VLM calls", -1, ".1f"),
    Metric("seconds", "seconds", "time", -1, ".2f"),
)
"""The cost of an image; the time depends on machine load."""

SETTING = ["setting", "method", "omega", "prompt_set"]
TABLE = ["method", "omega", "prompt_set", "n"]
TABLE += [f"{name}{end}" for name in MEANS for end in ("", "_low", "_high")]
TABLE += [*(name for name in METRICS if name not in MEANS), "fid_features", *COSTS]


def summary(images: pd.DataFrame) -> pd.DataFrame:
    """Every metric of every method setting × prompt set, with its 95 % interval over prompts:
    `setting, method, omega, prompt_set, metric, n, value, low, high`, where there is a value."""
    rows, measured = [], {n: m.column for n, m in MEANS.items() if m.column in images}
    for setting, group in images.groupby(SETTING, sort=False, dropna=False):
        where = dict(zip(SETTING, setting, strict=True)) | {"n": len(group)}
        for name, column in measured.items():
            found = interval(group[column].astype(float), group["prompt_id"])
            rows.append(where | {"metric": name} | found._asdict())
    return pd.DataFrame(rows).dropna(subset="value", ignore_index=True)


def table(
    images: pd.DataFrame, fid: Mapping[tuple[str, str], tuple[float, str]] | None = None
) -> pd.DataFrame:
    """One row per method setting × prompt set, with the columns of `TABLE`; `fid` is (setting,
    prompt set) → FID and its features' name, where it was computed."""
    where, values = ["setting", "prompt_set"], ["value", "low", "high"]
    wide = summary(images).pivot(index=where, columns="metric", values=values)
    wide.columns = [f"{metric}_{end}".removesuffix("_value") for end, metric in wide.columns]
    groups = images.groupby(SETTING, sort=False, dropna=False)
    rows = groups[list(COSTS)].mean().assign(n=groups.size()).reset_index().join(wide, on=where)
    for (setting, prompt_set), found in (fid or {}).items():
        own = (rows["setting"] == setting) & (rows["prompt_set"] == prompt_set)
        rows.loc[own, ["fid", "fid_features"]] = list(found)
    return rows.reindex(columns=TABLE)
