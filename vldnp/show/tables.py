"""Tables for reading: numbers with their 95 % intervals, as data frames of text."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from vldnp.metrics.intervals import paired_difference
from vldnp.metrics.summary import COSTS, METRICS

PAIRED = ("asr", "retention", "clip")
"""What `paired` and `against` compare."""


def results(table: pd.DataFrame, metrics: Sequence[str] = tuple(METRICS)) -> pd.DataFrame:
    """`table.csv` with a row per setting and prompt set; what was not measured has no column."""
    shown = [METRICS[name] for name in metrics if table[name].notna().any()]
    rows = table[["method", "omega", "prompt_set", "n"]].rename(columns={"omega": "ω"})
    rows["ω"] = rows["ω"].map(lambda omega: "" if pd.isna(omega) else f"{omega:g}")
    for metric in (*shown, COSTS["model_evaluations"], COSTS["vlm_calls"]):
        ends = [table.get(f"{metric.name}_{end}", np.nan) for end in ("low", "high")]
        cells = pd.DataFrame({"value": table[metric.name], "low": ends[0], "high": ends[1]})
        rows[metric.label] = [_number(metric.format, *cell) for cell in cells.to_numpy()]
    return rows.set_index(["prompt_set", "method", "ω"])


def paired(
    images: pd.DataFrame, prompt_set: str, first: str = "vl-dnp", second: str = "static"
) -> pd.DataFrame:
    """`first − second` at each ω that both have, paired by prompt and seed.

    Args:
        images: rows of `images.parquet`.
        first, second: names of methods; one without ω is compared at every ω of the other.
    """
    rows = images[images["prompt_set"] == prompt_set]
    one, other = (rows[rows["method"] == name] for name in (first, second))
    found = {}
    for omega in sorted(pd.concat([one, other])["omega"].dropna().unique()):
        pair = _at(one, omega), _at(other, omega)
        if not (pair[0].empty or pair[1].empty):
            found[f"{omega:g}"] = _differences(*pair)
    return pd.DataFrame.from_dict(found, orient="index").rename_axis("ω")


def against(
    images: pd.DataFrame, variants: Mapping[str, str], base: str, prompt_set: str
) -> pd.DataFrame:
    """Each variant of an ablation less the variant `base`, paired by prompt and seed.

    Args:
        images: rows of `images.parquet`.
        variants: label → setting.
    """
    rows = images[images["prompt_set"] == prompt_set]
    of = {label: rows[rows["setting"] == setting] for label, setting in variants.items()}
    found = {label: _differences(own, of[base]) for label, own in of.items() if label != base}
    return pd.DataFrame.from_dict(found, orient="index")


def verdicts(table: pd.DataFrame) -> pd.DataFrame:
    """The table of `vldnp.study.claims` for reading."""
    ends = table[["difference", "low", "high"]].to_numpy()
    shown = table.assign(difference=[_number("+.3f", *row) for row in ends])
    shown["p"] = [f"{p:.3f}" if p >= 0.001 else "< 0.001" for p in table["p"]]
    columns = [
        "claim",
        "method",
        "against",
        "prompt_set",
        "metric",
        "difference",
        "n",
        "asked",
        "p",
    ]
    return shown[[*columns, "verdict"]].set_index("claim")


def _differences(one: pd.DataFrame, other: pd.DataFrame) -> dict[str, str]:
    columns = {METRICS[name].label: METRICS[name].column for name in PAIRED}
    return {
        label: _number("+.3f", *paired_difference(one, other, column))
        for label, column in columns.items()
        if one[column].notna().any() and other[column].notna().any()
    }


def _at(rows: pd.DataFrame, omega: float) -> pd.DataFrame:
    return rows if rows["omega"].isna().all() else rows[np.isclose(rows["omega"], omega)]


def _number(form: str, value: float, low: float = np.nan, high: float = np.nan) -> str:
    if pd.isna(value):
        return ""
    ends = "" if pd.isna(low) else f" [{low:{form}}, {high:{form}}]"
    return f"{value:{form}}{ends}"
