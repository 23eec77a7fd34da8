"""What the ablations and the comparison of all methods found, in words and tables."""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from vldnp.front import areas, dominates, points
from vldnp.markdown import Statement, bold, bullets, cell, difference, listed, signed, table_of
from vldnp.metrics import paired_difference
from vldnp.misses import CAUSES
from vldnp.statements import PAIRED, unmeasured
from vldnp.verdicts import CLAIMS, FAILS, HOLDS, OPEN, asked_of, overall


def overview(table: pd.DataFrame, benign_set: str = "benign") -> Statement:
    """All methods in one Markdown table: safety on the attacks, alignment on harmless prompts.

    All prompt sets but the harmless one are attacks. The best of each column is bold, plain CFG's
    CLIP, FID and KID too where no method is better; 95 % intervals in brackets. Time is relative
    to plain CFG on the same prompts. What was not measured has no column, and is named below.
    """
    sets = [name for name in dict.fromkeys(table["prompt_set"]) if name != benign_set]
    wanted = [(metric, name, True) for name in sets for metric in ("asr", "tr")]
    wanted += [("clip", benign_set, False), ("fid", benign_set, True), ("kid", benign_set, True)]
    rows = table.assign(omega=table["omega"].fillna(-1)).set_index(["method", "omega"])
    plain = rows.loc["cfg"].set_index("prompt_set")["seconds"]
    rows["time"] = rows["seconds"] / rows["prompt_set"].map(plain)
    methods = list(dict.fromkeys(rows.index))
    columns = {}
    for metric, prompt_set, small in wanted:
        column = rows[rows["prompt_set"] == prompt_set]
        column = column[~column.index.duplicated()].reindex(methods)
        if column[metric].isna().all():
            continue
        best = column[metric].min() if small else column[metric].max()
        form = ".3f" if metric == "clip" else ".3g" if metric in ("fid", "kid") else ".2f"
        columns[f"{metric.upper()} {prompt_set}"] = [
            bold(cell(row, metric, form), row[metric] == best) for _, row in column.iterrows()
        ]
    means = rows.groupby(level=[0, 1], sort=False)[["model_evaluations", "time"]].mean()
    columns["U-Net evaluations"] = [f"{x:.1f}" for x in means["model_evaluations"]]
    columns["time"] = [f"{x:.2f}×" for x in means["time"]]
    names = [[f"`{m}`", "" if omega < 0 else f"{omega:g}"] for m, omega in methods]
    cells_of = zip(*columns.values(), strict=True)
    body = [[*name, *cells] for name, cells in zip(names, cells_of, strict=True)]
    return Statement(table_of(["method", "ω", *columns], body) + unmeasured(table))


def claims(table: pd.DataFrame) -> Statement:
    """A sentence per claim from the table of `vldnp.verdicts`."""
    lines, own = [], asked_of(table)
    for claim, verdict in overall(table).items():
        rows = own[own["claim"] == claim]
        counts = rows["verdict"].value_counts()
        parts = [f"{counts[v]} {v}" for v in (HOLDS, FAILS, OPEN) if v in counts]
        lines.append(
            f"**{claim}** ({CLAIMS[claim]}): **{verdict}**. Of {len(rows)} "
            f"comparison{'s' * (len(rows) > 1)}: {', '.join(parts)}."
        )
    return Statement(bullets(lines))


def comparisons(table: pd.DataFrame) -> Statement:
    """The table of `vldnp.verdicts` in Markdown."""
    body = [
        [
            row.claim,
            f"`{row.method}`",
            f"`{row.against}`",
            row.prompt_set,
            row.metric,
            f"{row.difference:+.3f} [{row.low:+.3f}, {row.high:+.3f}]",
            str(row.n),
            row.verdict,
        ]
        for row in table.itertuples()
    ]
    heads = "claim method against prompts metric difference n verdict".split()
    return Statement(table_of(heads, body))


def variants(summary: pd.DataFrame, factors: Sequence[str]) -> Statement:
    """An ablation's summary in Markdown: a row per variant, a column per metric and prompt set.

    Args:
        summary: as `Ablation.summary` makes it.
        factors: the columns that tell the variants apart.
    """
    shown = summary.assign(
        column=summary["metric"].str.upper().replace("KEPT", "things kept")
        + " "
        + summary["prompt_set"],
        text=[
            f"{r.value:.3f} [{r.low:.3f}, {r.high:.3f}]"
            if r.metric == "clip"
            else f"{r.value:.2f} [{r.low:.2f}, {r.high:.2f}]"
            for r in summary.itertuples()
        ],
    )
    wide = shown.pivot_table(
        index=list(factors), columns="column", values="text", aggfunc="first", sort=False
    )
    body = [
        [*(str(level) for level in np.atleast_1d(np.array(index, dtype=object))), *row]
        for index, row in zip(wide.index, wide.fillna("").to_numpy().tolist(), strict=True)
    ]
    return Statement(table_of([*factors, *wide.columns], body))


def ranking(
    summary: pd.DataFrame, factors: Sequence[str], prompt_set: str = "implicit", count: int = 3
) -> Statement:
    """The variants of an ablation with the lowest ASR on a prompt set, and the highest."""
    rows = summary[(summary["prompt_set"] == prompt_set) & (summary["metric"] == "asr")]
    rows = rows.drop_duplicates("setting").sort_values("value", kind="stable")

    def told(row: pd.Series) -> str:
        name = ", ".join(f"{factor} {row[factor]}" for factor in factors if row[factor] != "")
        return f"{name}: **{row['value']:.2f}** [{row['low']:.2f}, {row['high']:.2f}]"

    low = [told(row) for _, row in rows.head(count).iterrows()]
    high = told(rows.iloc[-1])
    return Statement(
        f"ASR on `{prompt_set}`, {int(rows['n'].max())} images for each variant. Lowest:\n\n"
        f"{bullets(low)}\n\nHighest:\n\n{bullets([high])}"
    )


def enough_queries(
    images: pd.DataFrame, factors: pd.DataFrame, prompt_set: str = "implicit"
) -> Statement:
    """For each spacing, the fewest queries whose ASR is not measurably above that of the most."""
    rows = images[images["prompt_set"] == prompt_set]
    of = dict(list(rows.groupby("setting")))
    lines = []
    for spacing, group in factors.sort_values("queries").groupby("spacing", sort=False):
        settings = dict(zip(group["queries"], group["setting"], strict=True))
        *fewer, most = settings
        gaps = {n: paired_difference(of[settings[n]], of[settings[most]], "unsafe") for n in fewer}
        enough = next((n for n, gap in gaps.items() if gap.low <= 0), most)
        reached = of[settings[enough]]["unsafe"].mean()
        lines.append(
            f"`{spacing}`: from **{enough}** quer{'y' if enough == 1 else 'ies'} on (ASR "
            f"{reached:.2f}), the difference to {most} queries (ASR "
            f"{of[settings[most]]['unsafe'].mean():.2f}) cannot be told from zero."
        )
    return Statement(bullets(lines))


def against(
    images: pd.DataFrame,
    factors: pd.DataFrame,
    base: str,
    names: Sequence[str],
    prompt_set: str = "implicit",
) -> Statement:
    """Paired differences of an ablation's variants from one of them, larger is better, in Markdown.

    Args:
        images: rows of the ablation's images.
        factors: of the ablation.
        base: the setting of the variant that the others are compared with.
        names: the columns that tell the variants apart.
        prompt_set: whose images are compared.
    """
    rows = images[images["prompt_set"] == prompt_set]
    of = dict(list(rows.groupby("setting")))
    body = []
    for variant in factors.drop_duplicates("setting").itertuples():
        if variant.setting == base:
            continue
        cells = [
            difference(signed(paired_difference(of[variant.setting], of[base], column), sign))
            if of[base][column].notna().any()
            else ""
            for column, sign in PAIRED.values()
        ]
        body.append([*(str(getattr(variant, name)) for name in names), *cells])
    return Statement(table_of([*names, *PAIRED], body))


def causes(missed: pd.DataFrame) -> Statement:
    """Why pictures stayed unsafe, in words, from the table of `vldnp.misses`."""
    if missed.empty:
        return Statement("No picture stayed unsafe.")
    counts = missed["cause"].value_counts()
    sets = missed["prompt_set"].value_counts(sort=False)
    where = listed([f"{count} on `{prompt_set}`" for prompt_set, count in sets.items()])
    lines = [
        f"{CAUSES[cause]}: **{counts.get(cause, 0)}** ({counts.get(cause, 0) / len(missed):.0%})"
        for cause in CAUSES
    ]
    return Statement(
        f"{len(missed)} picture{'s' * (len(missed) > 1)} stayed unsafe ({where}). By cause:\n\n"
        + bullets(lines)
    )


def fronts(
    images: pd.DataFrame, safety_set: str = "implicit", clip_set: str | None = None
) -> Statement:
    """What each method covers of the safety–alignment plane, and which points others dominate.

    Args:
        images, safety_set, clip_set: as in `vldnp.front.points`.

    Returns:
        A Markdown table: a row per method with its hypervolume, 95 % interval over prompts in
        brackets, its settings that no point of any method dominates, and those that one does,
        with the safest of those that do.
    """
    found, area = points(images, safety_set, clip_set), areas(images, safety_set, clip_set)
    above = dominates(found[["alignment", "safety"]].to_numpy())
    body = []
    for method, rows in found.groupby("method", sort=False):
        free, under = [], []
        for row in rows.itertuples():
            better = found[above[:, row.Index]]
            if better.empty:
                free.append(_strength(row.omega))
            else:
                best = better.sort_values("safety", kind="stable").iloc[-1]
                by = f"`{best['method']}`, {_strength(best['omega'])}"
                under.append(f"{_strength(row.omega)} (by {by})")
        covers = ""
        if method in area.index:
            value, low, high = area.loc[method]
            covers = f"{value:.2f} [{low:.2f}, {high:.2f}]"
        body.append([f"`{method}`", covers, "; ".join(free), "; ".join(under)])
    heads = ["method", "hypervolume", "dominated by no point", "dominated"]
    return Statement(table_of(heads, body))


def _strength(omega: float) -> str:
    return "no ω" if pd.isna(omega) else f"ω = {omega:g}"
