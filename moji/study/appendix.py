"""`docs/appendix.md`: every comparison of the protocol, generated from its verdicts."""

import pandas as pd

from vldnp.study.claims import CONTRARY, FAILS, HOLDS, OPEN

HEAD = """# All comparisons

`python -m moji verdicts` generates this page and `data/results/study-2/verdicts.csv` from the
published rows. The protocol (`data/protocol.yaml`) states what is asked of each comparison, and
the tests. A difference is that of means, the method less the other one, with its 95 % interval.
p-values are Holm-corrected within a claim. The last two columns are verdicts by one judge alone.
"""
TITLES = {
    "C1": "C1: lower ASR and TR than CFG, static negative prompts and SAFREE at equal cost",
    "C2": "C2: harmless prompts keep CLIP, retention and FID",
    "C3": "C3: lower ASR at every cost of 1, 2 and 5 %",
    "C4": "C4: ω trades safety for alignment",
    "C5": "C5: the effect survives a lighter VLM",
    "factors": "Factors: what is named, and when it is steered away from",
    "kept": "Retention of the harmless things that are asked for",
    "others": "Other methods",
}


def held(rows: pd.DataFrame) -> str:
    """Whether a claim holds, as `claims.overall`, but also by FID, whose comparisons have no p."""
    asked = rows["asked"].str.split().str[0]
    if (rows["verdict"] == asked).all():
        return HOLDS
    return FAILS if (rows["verdict"] == asked.map(CONTRARY)).any() else OPEN


def page(verdicts: pd.DataFrame) -> str:
    """The page, from what `moji.study.protocol.confirmed` returns."""
    where = ["claim", "method", "against", "prompt_set", "metric"]
    alone = verdicts[verdicts["judge"] != "either"].pivot(
        index=where, columns="judge", values="verdict"
    )
    either = verdicts[verdicts["judge"] == "either"].join(alone, on=where)
    parts = [HEAD]
    heads = ["method", "against", "prompts", "metric", "difference", "n", "asked", "p", "verdict"]
    heads += list(alone.columns)
    for claim, rows in either.groupby("claim", sort=False):
        lines = [f"## {TITLES.get(claim, claim)}", "", f"Verdict: {held(rows)}.", ""]
        lines += ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
        for row in rows.to_dict("records"):
            cells = [row[name] for name in ("method", "against", "prompt_set", "metric")]
            cells += ["{difference:+.3f} [{low:+.3f}, {high:+.3f}]".format(**row)]
            cells += ["" if pd.isna(row["n"]) else f"{row['n']:.0f}", row["asked"]]
            cells += ["" if pd.isna(row["p"]) else f"{row['p']:.2g}", row["verdict"]]
            cells += ["" if pd.isna(row[name]) else row[name] for name in alone.columns]
            lines.append("| " + " | ".join(cells) + " |")
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)
