"""The paper's claims as verdicts computed from a run: what holds, what does not, what is open.

Which comparisons make a claim is data, and stated where it is used (`notebooks/07_table`); here
are the estimators, and the one rule by which anything is said to hold.
"""

from collections.abc import Collection, Mapping, Sequence
from fnmatch import filter as matching

import pandas as pd

from vldnp.metrics import pareto
from vldnp.metrics.intervals import Interval, paired_difference, signed
from vldnp.metrics.summary import MEANS

CLAIMS = {
    "C1": "lower ASR and TR than CFG, static negative prompts and SAFREE",
    "C2": "CLIP score and FID kept on harmless prompts",
    "C3": "Pareto-dominant over static negative prompts and SAFREE across ω",
    "C4": "ω trades safety against alignment",
    "C5": "the effect survives a lighter VLM",
}
COLUMNS = "claim method against prompt_set metric difference low high n verdict".split()
ENDS = "largest ω", "smallest ω"
HOLDS, FAILS, OPEN = "holds", "does not hold", "undecided"

Comparison = tuple[str, str, str, str, str, str]
"""Claim, method, against, prompts, metric, and where the interval of the difference has to lie."""


def below(found: Interval, bound: float = 0.0) -> str:
    """Whether a quantity is below a bound: its whole interval, none of it, or a part.

    The one rule by which anything here is said to hold: never by a point estimate.
    """
    if found.high < bound:
        return HOLDS
    return FAILS if found.low >= bound else OPEN


def above(found: Interval, bound: float = 0.0) -> str:
    """Whether a quantity is above a bound, by the same rule."""
    return below(signed(found, -1), -bound)


def verdicts(
    images: pd.DataFrame,
    comparisons: Sequence[Comparison],
    chosen: Mapping[str, str],
    fid: Mapping[str, Interval] | None = None,
    curves: Collection[str] | None = None,
    attack_sets: Sequence[str] = ("explicit", "implicit", "adversarial"),
) -> pd.DataFrame:
    """A verdict for each comparison, with the columns of `COLUMNS`.

    Comparisons that the images do not hold are left out.

    Args:
        images: rows of `images.parquet`.
        comparisons: claim, method, against, prompts, metric, and where the whole 95 % interval of
            method − against has to lie, as `"< 0"` or `"> -0.01"`. Methods are names in `chosen`,
            also with `*`, or VL-DNP at the `largest ω` and the `smallest ω` of its curve; prompts
            are a set or `attacks`, each of `attack_sets`. Metrics are those of images in
            `metrics.summary`, also `(relative)` to the other method's mean; `fid (relative)`; and
            `hypervolume`, between the two methods' curves.
        chosen: method → the setting at which it enters.
        fid: method → its FID less plain CFG's, relative to plain CFG's, with an interval.
        curves: the settings that make up the methods' curves over ω; all by default.
        attack_sets: prompt sets that yield unwanted things.

    Raises:
        ValueError: a comparison names no such metric, or its last part is not as above.
    """
    at = {name: images[images["setting"] == setting] for name, setting in chosen.items()}
    at = {name: rows for name, rows in at.items() if len(rows)}
    swept = images if curves is None else images[images["setting"].isin(list(curves))]
    dynamic = swept[swept["method"] == "vl-dnp"]
    called = {name: name for name in at}
    if dynamic["omega"].nunique() > 1:
        for name, omega in zip(ENDS, dynamic["omega"].agg(["max", "min"]), strict=True):
            at[name], called[name] = dynamic[dynamic["omega"] == omega], f"vl-dnp, ω = {omega:g}"

    def measured(method: str, against: str, prompt_set: str, metric: str) -> Interval | None:
        if metric == "hypervolume":
            if not {method, against} <= set(swept["method"]):
                return None
            return pareto.area_difference(swept, [method], [against], prompt_set)
        if metric == "fid (relative)" and against == "cfg":
            return (fid or {}).get(method)
        name = metric.removesuffix(" (relative)")
        if name not in MEANS:
            known = f"{', '.join(MEANS)} and hypervolume, and fid (relative) against cfg"
            raise ValueError(f"{metric!r} against {against} cannot be compared; there are {known}")
        pair = [at[m][at[m]["prompt_set"] == prompt_set] for m in (method, against)]
        if any(rows[MEANS[name].column].isna().all() for rows in pair):
            return None
        found = paired_difference(*pair, MEANS[name].column)
        scale = pair[1][MEANS[name].column].mean() if name != metric else 1
        return Interval(*(value / scale for value in found))

    rows = []
    for claim, methods, against, prompts, metric, bound in comparisons:
        for method in matching(at, methods) if against in at else ():
            for prompt_set in attack_sets if prompts == "attacks" else (prompts,):
                own = at[method][at[method]["prompt_set"] == prompt_set]
                if own.empty:
                    continue
                if (found := measured(method, against, prompt_set, metric)) is None:
                    continue
                n, verdict = own["prompt_id"].nunique(), _judged(found, bound)
                pair = called[method], called[against]
                values = (claim, *pair, prompt_set, metric, *found, n, verdict)
                rows.append(dict(zip(COLUMNS, values, strict=True)))
    return pd.DataFrame(rows, columns=COLUMNS)


def _judged(found: Interval, bound: str) -> str:
    side, number = bound[:1], bound[1:]
    if side not in ("<", ">"):
        raise ValueError(f"a comparison ends in a bound such as '< 0' or '> -0.01', not {bound!r}")
    return {"<": below, ">": above}[side](found, float(number))


def overall(table: pd.DataFrame) -> pd.Series:
    """Claim → one verdict from its comparisons: it holds when all of them do.

    It does not hold when one of them does not; otherwise it is undecided.
    """

    def one(verdict: pd.Series) -> str:
        if (verdict == FAILS).any():
            return FAILS
        return HOLDS if (verdict == HOLDS).all() else OPEN

    return table.groupby("claim")["verdict"].agg(one)
