"""Figures from tidy tables, in one style. On every axis larger is better.

A summary is a table as `vldnp.metrics.summary.summary` makes it: a row per setting, prompt set and
metric with `value`, `low` and `high`. All functions return a closed `Figure`, which a notebook
shows by naming it and `save` writes.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pandas as pd
import seaborn as sns
from adjustText import adjust_text
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from vldnp._files import atomic
from vldnp.metrics.summary import MEANS

PALETTE = sns.color_palette("colorblind")
LOOKS = {
    "vl-dnp": ("o", PALETTE[0]),
    "static": ("s", PALETTE[1]),
    "safree": ("^", PALETTE[2]),
    "cfg": ("X", (0.25, 0.25, 0.25)),
}
"""Method → marker and colour."""
OTHERS = [("D", PALETTE[4]), ("v", PALETTE[3]), ("P", PALETTE[7]), (">", PALETTE[9])]
"""The same for other methods, in the order of their names."""

Metrics = Sequence[tuple[str, str]]
"""A metric of `MEANS` and a prompt set, for each panel; what a summary lacks is left out."""


@contextmanager
def panels(
    inches: tuple[float, float], rows: int = 1, columns: int = 1, **shared
) -> Iterator[tuple[Figure, np.ndarray]]:
    """A figure and its panels `[rows, columns]`; closed at the end, or it is shown twice."""
    style = sns.axes_style("whitegrid") | sns.plotting_context("notebook", font_scale=0.8)
    style |= {"axes.spines.top": False, "axes.spines.right": False}
    with plt.rc_context(style | {"figure.dpi": 100, "grid.linewidth": 0.6}):
        figure, grid = plt.subplots(
            rows, columns, figsize=inches, squeeze=False, layout="constrained", **shared
        )
        try:
            yield figure, grid
        finally:
            plt.close(figure)


def save(figure: Figure, path: str | Path, dpi: int = 150) -> Path:
    """Write a figure (format by suffix), atomically; returns the path."""
    with atomic(path) as temporary:
        figure.savefig(temporary, dpi=dpi, bbox_inches="tight")
    return Path(path)


def pareto(
    summary: pd.DataFrame,
    safety_set: str = "implicit",
    utility_set: str | None = None,
    utility: str = "clip",
) -> Figure:
    """Safety (1 − ASR) against utility, a marker and label per ω, 95 % intervals on both axes.

    Args:
        safety_set: the prompt set whose ASR is shown.
        utility_set: the prompt set whose utility is shown; default is `safety_set`.
        utility: `clip` or `retention`.
    """
    data = _turned(summary)
    safety = _of(data, "asr", safety_set)
    beside = _of(data, utility, utility_set or safety_set)
    points = safety.merge(beside, on="setting", suffixes=("", "_beside"))
    with panels((7, 5)) as (figure, ((axes,),)):
        labels = []
        for method, group in points.groupby("method", sort=False):
            marker, colour = _looks(points["method"])[method]
            group = group.sort_values("omega")
            at = group["value_beside"], group["value"]
            bars = {"xerr": _reach(group, "_beside"), "yerr": _reach(group), "elinewidth": 0.8}
            axes.errorbar(*at, **bars, ecolor=(*colour, 0.4), linestyle="none")
            swept = group[group["omega"].notna()]
            axes.plot(swept["value_beside"], swept["value"], color=(*colour, 0.4), linewidth=1)
            axes.scatter(*at, s=56, marker=marker, color=[colour], zorder=3, label=method)
            labels += [
                axes.text(row.value_beside, row.value, f"ω={row.omega:g}", fontsize=8, color=colour)
                for row in group[group["omega"].notna()].itertuples()
            ]
        axes.set_xlabel(f"{MEANS[utility].gain} on {utility_set or safety_set!r} prompts →")
        axes.set_ylabel(f"{MEANS['asr'].gain} on {safety_set!r} prompts →")
        _legend(figure, axes)
        figure.draw_without_rendering()  # so that the places are final
        adjust_text(labels, ax=axes, arrowprops={"arrowstyle": "-", "lw": 0.5, "color": "0.5"})
    return figure


def omega_curves(
    summary: pd.DataFrame, metrics: Sequence[str] = ("asr", "retention", "clip")
) -> Figure:
    """Each metric against ω: a column per metric, a row per prompt set, 95 % bands.

    A setting without ω is a dashed line.
    """
    data = _turned(summary)
    sets = list(data["prompt_set"].unique())
    metrics = [metric for metric in metrics if metric in set(data["metric"])]
    size = (3.3 * len(metrics), 2.7 * len(sets) + 0.4)
    with panels(size, len(sets), len(metrics), sharex=True, sharey="col") as (figure, grid):
        for row, prompt_set in zip(grid, sets, strict=True):
            for axes, metric in zip(row, metrics, strict=True):
                rows = data[(data["metric"] == metric) & (data["prompt_set"] == prompt_set)]
                for method, group in rows.groupby("method", sort=False):
                    marker, colour = _looks(data["method"])[method]
                    look = {"color": colour, "label": method}
                    for level in group[group["omega"].isna()].itertuples():
                        axes.axhline(level.value, linestyle="--", linewidth=1, **look)
                    if len(swept := group[group["omega"].notna()]):
                        _curve(axes, swept, "omega", marker=marker, **look)
                axes.set(title=prompt_set, ylabel=MEANS[metric].gain)
        for axes in grid[-1]:
            axes.set_xlabel("strength ω")
        _legend(figure, grid[0, 0])
    return figure


def curves(
    summary: pd.DataFrame, factor: str, hue: str, metrics: Metrics, level: str = ""
) -> Figure:
    """A panel per metric: its values against a number that varies, a curve per value of `hue`.

    Args:
        summary: with the columns `factor` and `hue`; rows without a number in `factor` are dashed
            lines across.
        level: what the dashed line is called.
    """
    shown = _shown(_turned(summary), metrics)
    with panels((4 * len(shown), 3.6), 1, len(shown)) as (figure, grid):
        for axes, ((metric, prompt_set), rows) in zip(grid[0], shown, strict=True):
            numbers = pd.to_numeric(rows[factor], errors="coerce")
            for row in rows[numbers.isna()].itertuples():
                axes.axhline(row.value, color="0.4", linestyle="--", label=level)
            varied = rows.assign(**{factor: numbers})[numbers.notna()]
            for place, (value, group) in enumerate(varied.groupby(hue, sort=False)):
                _curve(axes, group, factor, label=value, **_look(place))
            axes.set(xlabel=factor, ylabel=MEANS[metric].gain, title=prompt_set)
        _legend(figure, grid[0, 0])
    return figure


def points(summary: pd.DataFrame, factor: str, metrics: Metrics, hue: str | None = None) -> Figure:
    """A panel per metric: the value of each variant with its 95 % interval.

    Args:
        summary: with the column `factor`, which names the variants from top to bottom.
        hue: a column whose values differ in colour and marker.
    """
    shown = _shown(data := _turned(summary), metrics)
    variants = list(dict.fromkeys(data[factor]))
    groups = list(dict.fromkeys(data[hue])) if hue else [None]
    size = (3.7 * len(shown) + 1, 0.42 * len(variants) + 1.4)
    with panels(size, 1, len(shown), sharey=True) as (figure, grid):
        for axes, ((metric, prompt_set), rows) in zip(grid[0], shown, strict=True):
            for place, group in enumerate(groups):
                part = rows if group is None else rows[rows[hue] == group]
                shift = 0.22 * (place - (len(groups) - 1) / 2)
                heights = [variants.index(name) + shift for name in part[factor]]
                bars = {"xerr": _reach(part), "elinewidth": 1.2, "linestyle": "none"}
                axes.errorbar(part["value"], heights, label=group, **bars, **_look(place))
            axes.set_xlabel(f"{MEANS[metric].gain},\n{prompt_set!r} prompts")
        grid[0, 0].set_yticks(range(len(variants)), variants)
        grid[0, 0].set_ylim(len(variants) - 0.5, -0.5)
        if hue:
            _legend(figure, grid[0, 0])
    return figure


def bars(shares: pd.DataFrame, label: str = "time of an image, that of CFG being 1") -> Figure:
    """A stacked bar per row, a part per column."""
    with panels((8, 0.6 * len(shares) + 1.2)) as (figure, ((axes,),)):
        shares.plot.barh(stacked=True, ax=axes, color=PALETTE, legend=False)
        axes.invert_yaxis()
        axes.set(xlabel=label, ylabel="")
        axes.grid(visible=False, axis="y")
        _legend(figure, axes)
    return figure


def colours(methods: Iterable[str]) -> dict[str, str]:
    """Method → its colour in all figures, as `#rrggbb`."""
    return {name: to_hex(colour) for name, (_, colour) in _looks(methods).items()}


def _looks(methods: Iterable[str]) -> dict:
    others = sorted(set(methods) - set(LOOKS))
    return LOOKS | {name: OTHERS[i % len(OTHERS)] for i, name in enumerate(others)}


def _look(place: int) -> dict:
    return {"color": PALETTE[place % len(PALETTE)], "marker": "osD^vP"[place % 6]}


def _curve(axes: Axes, group: pd.DataFrame, x: str, *, color, **look) -> None:
    group = group.sort_values(x)
    axes.plot(group[x], group["value"], color=color, **look)
    axes.fill_between(group[x], group["low"], group["high"], color=color, alpha=0.15)


def _turned(summary: pd.DataFrame) -> pd.DataFrame:
    """The summary with values and intervals such that larger is better."""
    if summary.empty:
        raise ValueError("there is nothing to show: the summary is empty")
    turned, ends = summary.copy(), ["value", "low", "high"]
    worse = summary["metric"].map(lambda metric: MEANS[metric].better < 0)
    turned.loc[worse, ends] = 1 - summary.loc[worse, ["value", "high", "low"]].to_numpy()
    return turned


def _shown(data: pd.DataFrame, metrics: Metrics) -> list:
    groups = dict(iter(data.groupby(["metric", "prompt_set"], sort=False)))
    return [(pair, groups[pair]) for pair in dict.fromkeys(metrics) if pair in groups]


def _of(data: pd.DataFrame, metric: str, prompt_set: str) -> pd.DataFrame:
    for _, rows in _shown(data, [(metric, prompt_set)]):
        return rows
    present = ", ".join(sorted(data["prompt_set"].unique()))
    raise ValueError(f"there is no {metric} for the prompt set {prompt_set!r}; there are {present}")


def _reach(group: pd.DataFrame, suffix: str = "") -> np.ndarray:
    """Distances from the value down and up to the ends of its interval, `[2, n]`."""
    value, low, high = (group[f"{name}{suffix}"] for name in ("value", "low", "high"))
    return np.array([(value - low).clip(lower=0), (high - value).clip(lower=0)])


def _legend(figure: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    entries = dict(zip(labels, handles, strict=True))
    names = list(entries)
    figure.legend(
        entries.values(), names, loc="outside upper center", ncols=len(names), frameon=False
    )
