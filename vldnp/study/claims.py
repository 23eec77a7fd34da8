"""Claims as verdicts computed from rows; which comparisons make a claim is data."""

from collections.abc import Mapping, Sequence
from fnmatch import filter as matching

import pandas as pd

from vldnp._files import unknown
from vldnp.metrics.hypotheses import ALPHA, Evidence, holm, hypotheses
from vldnp.metrics.intervals import paired, paired_difference
from vldnp.metrics.summary import MEANS

HEAD = "claim method against prompt_set metric difference low high n asked".split()
COLUMNS = [*HEAD, "p", "p_contrary", "verdict"]
HOLDS, FAILS, OPEN = "holds", "does not hold", "undecided"
CONTRARY = {"superior": "inferior", "inferior": "superior", "non-inferior": "beyond"}
"""What a comparison can ask of the method → what contradicts it."""


def verdicts(
    images: pd.DataFrame,
    comparisons: Sequence[tuple[str, str, str, str, str, str]],
    chosen: Mapping[str, str],
    attack_sets: Sequence[str] = ("explicit", "implicit"),
) -> pd.DataFrame:
    """A row with the columns `COLUMNS` for each comparison that the rows hold: claim, method,
    against, prompts, metric, what is asked (`asked_of`). Methods are names in `chosen` (method →
    its setting), also with `*`; prompts are a set or `attacks`; metrics are `summary.MEANS`, also
    `(relative)` to the other method's mean."""
    at = {m: rows for m, s in chosen.items() if len(rows := images[images["setting"] == s])}
    rows, known = [], []
    for claim, methods, against, prompts, metric, asked in comparisons:
        asked_of(asked)
        if (name := metric.removesuffix(" (relative)")) not in MEANS:
            raise unknown("metric of a comparison", name, MEANS)
        others = [method for method in at if method != against and against in at]
        for method in matching(others, methods):
            for prompt_set in attack_sets if prompts == "attacks" else (prompts,):
                pair = [m[m["prompt_set"] == prompt_set] for m in (at[method], at[against])]
                if found := _compared(*pair, name, name != metric):
                    n = len(found[1].differences)
                    rows.append([claim, method, against, prompt_set, metric, *found[0], n, asked])
                    known.append(found[1])
    return judged(pd.DataFrame(rows, columns=HEAD), known)


def _compared(own, other, name: str, relative: bool) -> tuple[list[float], Evidence] | None:
    """The difference with its interval, and the evidence of a gain; None if it is not measured."""
    column, better = MEANS[name].column, MEANS[name].better
    if any(column not in rows or rows[column].isna().all() for rows in (own, other)):
        return None
    scale = other[column].mean() if relative else 1.0
    differences, rates = paired(own, other, column)
    by_prompt = differences.groupby(level=0)
    gain = better * by_prompt.mean().to_numpy() / scale
    known = Evidence(gain, by_prompt.size().to_numpy(), rates and not relative)
    return [end / scale for end in paired_difference(own, other, column)], known


def asked_of(text: str) -> tuple[str, float]:
    """`superior`, `inferior` or `non-inferior 0.01`: what is asked, and by which margin."""
    name, _, number = text.partition(" ")
    if name not in CONTRARY:
        raise unknown("what a comparison asks", name, CONTRARY)
    margin = pd.to_numeric(number or "nan", errors="coerce")
    if margin > 0 if name == "non-inferior" else not number:
        return name, float(margin)
    raise ValueError(f"a comparison asks for 'superior' or 'non-inferior 0.05', not {text!r}")


def judged(table: pd.DataFrame, known: Sequence[Evidence]) -> pd.DataFrame:
    """The rows of `table` (`HEAD`) with p-values, Holm-corrected within each claim, and verdicts:
    what is asked, where that is shown (`p`), its contrary where that is (`p_contrary`; `beyond` the
    margin is that of non-inferior), or undecided."""
    asked = list(map(asked_of, table["asked"]))
    tests = [hypotheses(one, margin) for one, (_, margin) in zip(known, asked, strict=True)]
    p = [[test[name], test[CONTRARY[name]]] for test, (name, _) in zip(tests, asked, strict=True)]
    p = pd.DataFrame(p, columns=["p", "p_contrary"], index=table.index, dtype=float)
    for _, rows in table.groupby("claim").groups.items():
        p.loc[rows] = p.loc[rows].apply(holm)
    said = [
        name if row.p <= ALPHA else CONTRARY[name] if row.p_contrary <= ALPHA else OPEN
        for row, (name, _) in zip(p.itertuples(), asked, strict=True)
    ]
    return table.join(p).assign(verdict=pd.Series(said, table.index, dtype=object))


def overall(table: pd.DataFrame) -> pd.Series:
    """Claim → whether it holds: all that is asked is shown; it does not: a contrary is shown."""
    shown = (table[["p", "p_contrary"]] <= ALPHA).groupby(table["claim"])
    found = shown["p"].all().map({True: HOLDS, False: OPEN})
    return found.mask(shown["p_contrary"].any(), FAILS)
