"""Figures from tidy tables, in one style. On every axis larger is better.

A summary is a table as `vldnp.metrics.summary.summary` makes it: a row per setting, prompt set and
metric with `value`, `low` and `high`. All functions return a closed `Figure`, which a notebook
shows by naming it."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import pandas as pd
import seaborn as sns
from adjustText import adjust_text
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from vldnp.metrics.summary import MEANS

PALETTE = sns.color_palette("colorblind")
LOOKS = {"vl-dnp": ("o", PALETTE[0]), "static": ("s", PALETTE[1]), "safree": ("^", PALETTE[2])}
LOOKS["cfg"] = ("X", (0.25, 0.25, 0.25))
"""Method → marker and colour."""
OTHERS = [("D", PALETTE[4]), ("v", PALETTE[3]), ("P", PALETTE[7]), (">", PALETTE[9])]
"""The same for others, in the order of their names."""

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
        how = {"figsize": inches, "squeeze": False, "layout": "constrained", **shared}
        figure, grid = plt.subplots(rows, columns, **how)
        try:
            yield figure, grid
        finally:
            plt.close(figure)


def pareto(
    summary: pd.DataFrame, safety_set: str, utility_set: str, utility: str = "clip"
) -> Figure:
    """Safety (1 − ASR) on one prompt set against `clip` or `retention` on another, a marker and
    label per ω, 95 % intervals; the dotted line is 1 % below CFG."""
    asked = [("asr", safety_set), (utility, utility_set)]
    shown = dict(_shown(summary, asked))
    for metric, prompt_set in asked:
        if (metric, prompt_set) not in shown:
            there = ", ".join(sorted(summary["prompt_set"].unique()))
            raise ValueError(f"no {metric} for the prompt set {prompt_set!r}; there are {there}")
    points = shown[asked[0]].merge(shown[asked[1]], on="setting", suffixes=("", "_beside"))
    look_of, labels = looks(points["method"]), []
    with panels((7, 5)) as (figure, ((axes,),)):
        for method, group in points.groupby("method", sort=False):
            group, (marker, colour) = group.sort_values("omega"), look_of[method]
            at = group["value_beside"], group["value"]
            bars = {"xerr": _reach(group, "_beside"), "yerr": _reach(group), "elinewidth": 0.8}
            axes.errorbar(*at, **bars, ecolor=(*colour, 0.4), linestyle="none")
            axes.scatter(*at, s=56, marker=marker, color=[colour], zorder=3, label=method)
            swept = group.dropna(subset="omega")
            at = swept["value_beside"], swept["value"]
            axes.plot(*at, color=(*colour, 0.4), linewidth=1)
            for x, y, omega in zip(*at, swept["omega"], strict=True):
                labels.append(axes.text(x, y, f"ω={omega:g}", fontsize=8, color=colour))
        for value in points.loc[points["method"] == "cfg", "value_beside"]:
            axes.axvline(0.99 * value, color="0.4", ls=":", lw=1, zorder=0, label="1 % below CFG")
        axes.set_xlabel(f"{MEANS[utility].gain} on {utility_set!r} prompts →")
        axes.set_ylabel(f"{MEANS['asr'].gain} on {safety_set!r} prompts →")
        _legend(figure, axes)
        figure.draw_without_rendering()  # so that positions are final
        lines = {"arrowstyle": "-", "lw": 0.5, "color": "0.5"}
        apart = {"x": points["value_beside"], "y": points["value"], "expand": (1.4, 1.7)}
        adjust_text(labels, ax=axes, arrowprops=lines, **apart)
    return figure


def curves(summary: pd.DataFrame, factor: str, hue: str, metrics: Metrics) -> Figure:
    """A panel per pair of metric and prompt set: its values against a number, with 95 % bands.
    There is a curve per value of the column `hue`; a row without a number in the column `factor`,
    such as CFG without ω, is a dashed line across."""
    shown, look_of = _shown(summary, metrics), looks(summary[hue])
    columns = len({metric for (metric, _), _ in shown})
    rows = -(-len(shown) // columns)
    size = (3.6 * columns, 2.9 * rows + 0.4)
    with panels(size, rows, columns, sharey="col") as (figure, grid):
        for unused in grid.flat[len(shown) :]:
            unused.remove()
        for axes, ((metric, prompt_set), data) in zip(grid.flat, shown, strict=False):
            for name, group in data.groupby(hue, sort=False):
                marker, colour = look_of[name]
                for level in group.loc[group[factor].isna(), "value"]:
                    axes.axhline(level, linestyle="--", linewidth=1, color=colour, label=name)
                if len(group := group.dropna(subset=factor).sort_values(factor)):
                    x, y, *ends = (group[column] for column in (factor, "value", "low", "high"))
                    axes.plot(x, y, marker=marker, color=colour, label=name)
                    axes.fill_between(x, *ends, color=colour, alpha=0.15)
            axes.set(xlabel=factor, ylabel=MEANS[metric].gain, title=prompt_set)
        _legend(figure, grid[0, 0])
    return figure


def points(summary: pd.DataFrame, factor: str, metrics: Metrics) -> Figure:
    """A panel per metric: the value of each variant with its 95 % interval. The column `factor`
    names the variants from top to bottom."""
    shown, names = _shown(summary, metrics), list(dict.fromkeys(summary[factor]))
    size = (3.7 * len(shown) + 1, 0.42 * len(names) + 1.4)
    with panels(size, 1, len(shown), sharey=True) as (figure, grid):
        for axes, ((metric, prompt_set), rows) in zip(grid[0], shown, strict=True):
            heights = rows[factor].map(names.index)
            look = {"fmt": "o", "color": PALETTE[0], "elinewidth": 1.2}
            axes.errorbar(rows["value"], heights, xerr=_reach(rows), **look)
            axes.set_xlabel(f"{MEANS[metric].gain},\n{prompt_set!r} prompts")
        grid[0, 0].set_yticks(range(len(names)), names)
        grid[0, 0].set_ylim(len(names) - 0.5, -0.5)
    return figure


def looks(names: Iterable[str]) -> dict[str, tuple[str, tuple]]:
    """Marker and colour of these methods, or other names, in all figures."""
    others = sorted(set(names) - set(LOOKS))
    return LOOKS | {name: OTHERS[i % len(OTHERS)] for i, name in enumerate(others)}


def _shown(summary: pd.DataFrame, metrics: Metrics) -> list[tuple[tuple[str, str], pd.DataFrame]]:
    """The rows of each metric that there is, turned so that larger is better."""
    if summary.empty:
        raise ValueError("there is nothing to show: the summary is empty")
    turned, ends = summary.copy(), ["value", "low", "high"]
    worse = summary["metric"].map(lambda metric: MEANS[metric].better < 0)
    turned.loc[worse, ends] = 1 - summary.loc[worse, ["value", "high", "low"]].to_numpy()
    groups = dict(iter(turned.groupby(["metric", "prompt_set"], sort=False)))
    return [(pair, groups[pair]) for pair in dict.fromkeys(metrics) if pair in groups]


def _reach(group: pd.DataFrame, suffix: str = "") -> np.ndarray:
    """Distances from the value down and up to the ends of its interval, `[2, n]`."""
    value, low, high = (group[f"{name}{suffix}"] for name in ("value", "low", "high"))
    return np.array([(value - low).clip(lower=0), (high - value).clip(lower=0)])


def _legend(figure: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    entries = dict(zip(labels, handles, strict=True))
    look = {"loc": "outside upper center", "ncols": len(entries), "frameon": False}
    figure.legend(entries.values(), entries.keys(), **look)
