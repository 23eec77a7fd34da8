"""What methods cost, in sentences."""

import pandas as pd

from vldnp.analysis.markdown import Statement, bullets, listed, literal
from vldnp.experiments.timing import PARTS


def cost(costs: pd.DataFrame) -> Statement:
    """A sentence per method from the table of `benchmarks.costs`."""
    first, *others = costs.index
    base = costs.loc[first]
    lines = [
        f"One batch of {base['images']:.0f} images takes {base['seconds']:.2f} s with `{first}`, "
        f"at {base['evaluations_per_step']:.2f} U-Net evaluations a step."
    ]
    for label in others:
        row = costs.loc[label]
        asked = f" and {row['vlm_calls']:.0f} VLM calls an image" if row["vlm_calls"] else ""
        lines.append(
            f"`{label}` takes **{row['ratio']:.2f}×** that time "
            f"({row['ratio_low']:.2f}× to {row['ratio_high']:.2f}× over the repetitions), with "
            f"{row['evaluations_per_step']:.2f} evaluations a step{asked}."
        )
    return Statement(bullets(lines))


def parts_of_cost(table: pd.DataFrame, label: str) -> Statement:
    """What was timed, and a sentence per way from the table of `benchmarks.parts_of_cost`."""
    first, *others = table.index
    lines = []
    for name in others:
        row = table.loc[name]
        parts = row[list(PARTS)].sort_values(ascending=False)
        shares = [f"{part} {spent / row['seconds']:.0%}" for part, spent in parts[:3].items()]
        lines.append(
            f"`{name}` takes **{row['ratio']:.2f}×** the time of `{first}`: {listed(shares)}."
        )
    sequential = "sequential reference"
    for name in others[others.index(sequential) + 1 :]:
        faster = table.loc[sequential, "seconds"] / table.loc[name, "seconds"]
        lines.append(f"`{name}` is **{faster:.1f}** times as fast as `{sequential}`.")
    return Statement(f"Timed: {literal(label)}.\n\n{bullets(lines)}")
