"""The paper's claims as verdicts computed from a run: what holds, what does not, what is open.

Which comparisons make a claim is data, and stated where it is used (`notebooks/07_table`); here
are the estimators, and the one rule by which anything is said to hold.
"""

from collections.abc import Collection, Mapping, Sequence
from fnmatch import filter as matching
from typing import NamedTuple

import numpy as np
import pandas as pd

from vldnp._files import unknown
from vldnp.metrics import pareto
from vldnp.metrics.hypotheses import ALPHA, Evidence, evidence, evidence_from, holm, hypotheses
from vldnp.metrics.intervals import Interval, paired, paired_difference, signed
from vldnp.metrics.summary import MEANS

CLAIMS = {
    "C1": "lower ASR and TR than CFG, static negative prompts and SAFREE",
    "C2": "CLIP score and FID kept on harmless prompts",
    "C3": "larger hypervolume than static negative prompts and SAFREE across ω",
    "C4": "ω trades safety against alignment",
    "C5": "the effect survives a lighter VLM",
}
COLUMNS = (
    "claim method against prompt_set metric difference low high place_low place_high n asked p "
    "p_contrary verdict"
).split()
ENDS = "largest ω", "smallest ω"
HOLDS, FAILS, OPEN = "holds", "does not hold", "undecided"

CONTRARY = {
    "superior": "inferior",
    "inferior": "superior",
    "non-inferior": "beyond",
    "equivalent": "different",
}
"""What a comparison can ask of the method → what contradicts it."""

VERDICTS = "superior", "equivalent", "non-inferior", "inferior", OPEN
MARGIN, SHARES = 0.05, ("asr", "tr", "retention")
"""Shares that differ by less are equivalent; other metrics have no margin but a given one."""

Comparison = tuple[str, str, str, str, str, str]
"""Claim, method, against, prompts, metric, and what is asked, such as `non-inferior 0.01`."""


class Measured(NamedTuple):
    """A difference, method − against, and what is known about it.

    Attributes:
        found: with its 95 % interval.
        by_place: the interval with places instead of prompts as units; None without places.
        evidence: of the gain, positive where the method is better.
    """

    found: Interval
    by_place: Interval | None
    evidence: Evidence


def below(found: Interval, bound: float = 0.0) -> str:
    """Whether a quantity is below a bound: its whole interval, none of it, or a part.

    The rule for a single quantity, as `verdicts` is for differences: never by a point estimate.
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
        images: rows of `images.parquet`; with a column `place`, intervals by place stand beside.
        comparisons: claim, method, against, prompts, metric, and what is asked of the method
            (`asked_of`). Methods are names in `chosen`, also with `*`, or VL-DNP at the
            `largest ω` and the `smallest ω` of its curve; prompts are a set or `attacks`, each of
            `attack_sets`. Metrics are those of images in `metrics.summary`, also `(relative)` to
            the other method's mean; `fid`; and `hypervolume`, between the two methods' curves.
        chosen: method → the setting at which it enters.
        fid: method → its FID less plain CFG's, with an interval.
        curves: the settings that make up the methods' curves over ω; all by default.
        attack_sets: prompt sets that yield unwanted things.

    Raises:
        ValueError: a comparison names no such metric, or asks nothing that can be asked.
    """
    at = {name: images[images["setting"] == setting] for name, setting in chosen.items()}
    at = {name: rows for name, rows in at.items() if len(rows)}
    swept = images if curves is None else images[images["setting"].isin(list(curves))]
    dynamic = swept[swept["method"] == "vl-dnp"]
    called = {name: name for name in at}
    if dynamic["omega"].nunique() > 1:
        for name, omega in zip(ENDS, dynamic["omega"].agg(["max", "min"]), strict=True):
            at[name], called[name] = dynamic[dynamic["omega"] == omega], f"vl-dnp, ω = {omega:g}"

    def measured(method: str, against: str, prompt_set: str, metric: str) -> Measured | None:
        if metric == "hypervolume":
            if not {method, against} <= set(swept["method"]):
                return None
            found = pareto.area_difference(swept, [method], [against], prompt_set)
            return Measured(found, None, evidence_from(found))
        if metric == "fid" and against == "cfg":
            if (found := (fid or {}).get(method)) is None:
                return None
            return Measured(found, None, evidence_from(found).turned())
        return _measured(*(_of(at[name], prompt_set) for name in (method, against)), metric)

    rows, known = [], []
    for claim, methods, against, prompts, metric, asked in comparisons:
        asked_of(asked)
        for method in matching(at, methods) if against in at else ():
            for prompt_set in attack_sets if prompts == "attacks" else (prompts,):
                own = _of(at[method], prompt_set)
                if own.empty or method == against:
                    continue
                if (one := measured(method, against, prompt_set, metric)) is None:
                    continue
                places = one.by_place or (np.nan, np.nan, np.nan)
                pair = called[method], called[against]
                n = own["prompt_id"].nunique()
                values = (claim, *pair, prompt_set, metric, *one.found, *places[1:], n, asked)
                rows.append(dict(zip(COLUMNS[:12], values, strict=True)))
                known.append(one.evidence)
    return judged(pd.DataFrame(rows, columns=COLUMNS[:12]), known)


def asked_of(text: str, metric: str = "") -> tuple[str, float]:
    """What is asked of a method and the margin: `superior`, `inferior`, `non-inferior 0.01`, ….

    *non-inferior* and *equivalent* need a margin, in the unit of the difference. Beside the others
    it is `MARGIN` for shares, and there is none for other metrics.

    Raises:
        ValueError: anything else.
    """
    name, _, number = text.partition(" ")
    if name not in CONTRARY:
        raise unknown("what a comparison asks", name, CONTRARY)
    if not number and name in ("superior", "inferior"):
        return name, MARGIN if metric in SHARES else np.nan
    try:
        margin = float(number)
    except ValueError:
        margin = np.nan
    if not margin > 0:
        raise ValueError(f"a comparison asks for {name!r} by a margin such as 0.05, not {text!r}")
    return name, margin


def judged(table: pd.DataFrame, known: Sequence[Evidence]) -> pd.DataFrame:
    """The verdicts of comparisons, by p-values that are Holm-corrected within each claim.

    A verdict is what is asked, where that is shown; else *superior*, *inferior*, *equivalent* or
    *non-inferior*, whichever is shown first; else *undecided*. `p` is that of what is asked,
    `p_contrary` that of its contrary.

    Args:
        table: the columns of `COLUMNS` up to `asked`.
        known: the evidence for each row.
    """
    table = table.reset_index(drop=True)
    asked = [asked_of(row.asked, row.metric) for row in table.itertuples()]
    p = pd.DataFrame(
        [hypotheses(one, margin) for one, (_, margin) in zip(known, asked, strict=True)],
        columns=["superior", "inferior", "equivalent", "non-inferior", "beyond", "different"],
        dtype=float,
    )
    for _, rows in table.groupby("claim").groups.items():
        p.loc[rows] = p.loc[rows].apply(holm)
    said, ps = [], []
    for i, (name, _) in enumerate(asked):
        ps.append((p.at[i, name], p.at[i, CONTRARY[name]]))
        order = (name, "superior", "inferior", "equivalent", "non-inferior")
        said.append(next((what for what in order if p.at[i, what] <= ALPHA), OPEN))
    table[["p", "p_contrary"]] = pd.DataFrame(ps, columns=["p", "p_contrary"], dtype=float)
    return table.assign(verdict=pd.Series(said, dtype=object))[COLUMNS]


def overall(table: pd.DataFrame) -> pd.Series:
    """Claim → whether it holds: when of each of its comparisons what is asked is shown.

    It does not hold when the contrary of one is; otherwise it is undecided.
    """

    def one(rows: pd.DataFrame) -> str:
        if (rows["p_contrary"] <= ALPHA).any():
            return FAILS
        return HOLDS if (rows["p"] <= ALPHA).all() else OPEN

    return table.groupby("claim")[["p", "p_contrary"]].apply(one)


def _of(rows: pd.DataFrame, prompt_set: str) -> pd.DataFrame:
    return rows[rows["prompt_set"] == prompt_set]


def _measured(own: pd.DataFrame, other: pd.DataFrame, metric: str) -> Measured | None:
    """The paired difference of a metric of images; None where one side was not measured."""
    name = metric.removesuffix(" (relative)")
    if name not in MEANS:
        known = f"{', '.join(MEANS)} and hypervolume, and fid against cfg"
        raise ValueError(f"{metric!r} cannot be compared; there are {known}")
    column, better = MEANS[name].column, MEANS[name].better
    if any(column not in rows or rows[column].isna().all() for rows in (own, other)):
        return None
    scale = other[column].mean() if name != metric else 1.0
    pairs = paired(own, other, column)
    means, counts = pairs.by_unit()
    by_place = None
    if "place" in own and own["place"].notna().any():
        by_place = _scaled(paired_difference(own, other, column, unit="place"), scale)
    return Measured(
        _scaled(paired_difference(own, other, column), scale),
        by_place,
        evidence(better * means / scale, counts, pairs.rates and scale == 1),
    )


def _scaled(found: Interval, scale: float) -> Interval:
    return Interval(*(end / scale for end in found))
