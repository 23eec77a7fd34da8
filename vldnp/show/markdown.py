"""Markdown as results are shown in: sentences, lists, tables, numbers with their intervals."""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from vldnp.metrics.intervals import Interval
from vldnp.metrics.summary import Metric


class Statement(str):
    """Markdown that a notebook shows as such."""

    def _repr_markdown_(self) -> str:
        return str(self)


def bold(text: str, really: bool = True) -> str:
    """`text` in bold type, where it really is to be; nothing stays nothing."""
    return f"**{text}**" if really and text else text


def number(metric: Metric, value: float, low: float = np.nan, high: float = np.nan) -> str:
    """A metric's value, with its interval where it has one; "" where it was not measured."""
    if pd.isna(value):
        return ""
    interval = f" [{low:{metric.format}}, {high:{metric.format}}]"
    return f"{value:{metric.format}}{interval * pd.notna(low)}"


def cell(row: pd.Series, metric: Metric) -> str:
    """The same from a row of `table.csv`."""
    return number(
        metric, *(row.get(f"{metric.name}{end}", np.nan) for end in ("", "_low", "_high"))
    )


def difference(found: Interval) -> str:
    """A difference with its interval, bold where that excludes 0."""
    value, low, high = (round(end, 3) + 0.0 for end in found)  # + 0.0 turns −0 into 0
    text = f"{value:+.3f} [{low:+.3f}, {high:+.3f}]"
    return f"**{text}**" if found.low > 0 or found.high < 0 else text


def listed(parts: Sequence[str]) -> str:
    """`a, b and c`."""
    *head, last = parts
    return f"{', '.join(head)} and {last}" if head else last


def bullets(lines: Sequence[str]) -> str:
    """A list, a line each."""
    return "\n".join(f"- {line}" for line in lines)


def table_of(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table from its cells' texts."""
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def literal(text: str) -> str:
    """Text that comes from users or models, with Markdown's and HTML's characters disarmed."""
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace("\n", " ")
    return "".join(f"\\{c}" if c in "\\`*_[]$|" else c for c in text)
