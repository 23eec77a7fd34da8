"""Tables for reading: numbers with their 95 % intervals, as data frames of text."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from vldnp.metrics.intervals import paired_difference
from vldnp.metrics.summary import COSTS, METRICS


def results(table: pd.DataFrame, metrics: Sequence[str] = tuple(METRICS)) -> pd.DataFrame:
    """`table.csv` with a row per setting and prompt set; metrics without values have no column."""
    shown = [METRICS[name] for name in metrics if table[name].notna().any()]
    rows = table[["method", "omega", "prompt_set", "n"]].rename(columns={"omega": "ω"})
    rows["ω"] = rows["ω"].map(lambda omega: "" if pd.isna(omega) else f"{omega:g}")
    for metric in (*shown, COSTS["model_evaluations"], COSTS["vlm_calls"]):
        columns = [f"{metric.name}{end}" for end in ("", "_low", "_high")]
        cells = table.reindex(columns=columns).to_numpy()
        rows[metric.label] = [_number(metric.format, *cell) for cell in cells]
    spaces = ", ".join(table["fid_features"].dropna().unique()) if "fid_features" in table else ""
    named = {"FID": f"FID ({spaces})"} if spaces else {}
    return rows.rename(columns=named).set_index(["prompt_set", "method", "ω"])


def paired(
    images: pd.DataFrame, prompt_set: str, pairs: Mapping[str, tuple[str, str]]
) -> pd.DataFrame:
    """One setting less another, paired by prompt and seed, in ASR, retention and CLIP score, from
    rows of `images.parquet`; `pairs` are label → the two settings."""
    images = images[images["prompt_set"] == prompt_set]
    rows = dict(iter(images.groupby("setting")))
    found = pd.DataFrame(index=list(pairs))
    for metric in (METRICS["asr"], METRICS["retention"], METRICS["clip"]):
        if images[metric.column].notna().any():
            sides = [(rows[first], rows[second]) for first, second in pairs.values()]
            intervals = [paired_difference(*pair, metric.column) for pair in sides]
            found[metric.label] = [_number("+.3f", *one) for one in intervals]
    return found


def _number(form: str, value: float, low: float = np.nan, high: float = np.nan) -> str:
    ends = "" if pd.isna(low) else f" [{low:{form}}, {high:{form}}]"
    return "" if pd.isna(value) else f"{value:{form}}{ends}"
