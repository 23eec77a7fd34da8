"""Figures from tidy tables, in one style; on every axis larger is better.

All functions return a closed `Figure`, which a notebook shows by naming it and `save` writes.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from vldnp._files import atomic
from vldnp.metrics.pareto import front
from vldnp.metrics.summary import MEANS
from vldnp.show.point_labels import label_points

PALETTE = sns.color_palette("colorblind")
LOOKS = {
    "vl-dnp": ("o", PALETTE[0]),
    "static": ("s", PALETTE[1]),
    "safree": ("^", PALETTE[2]),
    "cfg": ("X", (0.25, 0.25, 0.25)),
}
"""Method → marker and colour."""
MORE_LOOKS = [("D", PALETTE[4]), ("v", PALETTE[3]), ("P", PALETTE[7]), (">", PALETTE[9])]
"""For other methods, in the order of their names."""


@contextmanager
def panels(
    inches: tuple[float, float], rows: int = 1, columns: int = 1, **shared
) -> Iterator[tuple[Figure, np.ndarray]]:
    """A figure and its panels `[rows, columns]` in the one style of all figures.

    It is closed at the end: a notebook would show it twice.
    """
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


@contextmanager
def _in_threes(
    count: int, width: float, height: float, **shared
) -> Iterator[tuple[Figure, Sequence[Axes]]]:
    """`panels` of so many inches each, three in a row."""
    columns = min(3, count)
    lines = -(-count // columns)
    with panels((width * columns, height * lines), lines, columns, **shared) as (figure, grid):
        for axes in grid.flat[count:]:
            axes.remove()
        yield figure, grid.flat[:count]


def omega_curves(summary: pd.DataFrame, metrics: Sequence[str] | None = None) -> Figure:
    """Each metric against ω: a column per metric, a row per prompt set, 95 % intervals.

    A setting without ω is a dashed line across; ticks are at the ω that most methods have.

    Args:
        summary: as `vldnp.metrics.summary.summary` makes it.
        metrics: of `summary.MEANS`; default is all. Those that the summary lacks are left out.
    """
    data = _turned(summary)
    present = [metric for metric in MEANS if metric in set(data["metric"])]
    metrics = [metric for metric in metrics or present if metric in present]
    sets = list(data["prompt_set"].unique())
    looks = _looks(data["method"])
    having = data.groupby("omega")["method"].nunique()
    size = (3.3 * len(metrics), 2.7 * len(sets) + 0.4)
    with panels(size, len(sets), len(metrics), sharex=True, sharey="col") as (figure, grid):
        for row, prompt_set in zip(grid, sets, strict=True):
            for axes, metric in zip(row, metrics, strict=True):
                chosen = data[(data["metric"] == metric) & (data["prompt_set"] == prompt_set)]
                _omega_panel(axes, chosen, looks)
                axes.set_title(prompt_set)
                axes.set_ylabel(MEANS[metric].gain)
        for axes in grid[-1]:
            axes.set(xlabel="strength ω", xticks=having.index[having == having.max()])
        _legend(figure, grid[0, 0])
    return figure


def pareto(
    summary: pd.DataFrame,
    safety_set: str = "implicit",
    utility_set: str | None = None,
    utility: str = "clip",
) -> Figure:
    """Safety (1 − ASR) against utility: a marker per ω, methods by shape, intervals on both.

    Up and to the right is better. What a method's settings leave behind them is shaded, where it
    has several; a point that a point of any method dominates is hollow.

    Args:
        summary: as `vldnp.metrics.summary.summary` makes it.
        safety_set: the prompt set whose ASR is shown.
        utility_set: the prompt set whose utility is shown; default is `safety_set`.
        utility: `clip` or `retention`.
    """
    utility_set = utility_set or safety_set
    data = _turned(summary)
    safety = _of(data, "asr", safety_set)
    points = safety.merge(_of(data, utility, utility_set), on="setting", suffixes=("", "_beside"))
    looks = _looks(data["method"])
    points["best"] = front(points[["value_beside", "value"]].to_numpy())
    with panels((7, 5)) as (figure, ((axes,),)):
        for method, group in points.groupby("method", sort=False):
            marker, colour = looks[method]
            group = group.sort_values("omega")
            swept = group[group["omega"].notna()]
            axes.plot(swept["value_beside"], swept["value"], color=colour, alpha=0.4, linewidth=1)
            at = group["value_beside"], group["value"]
            bars = {"xerr": _reach(group, "_beside"), "yerr": _reach(group), "fmt": "none"}
            axes.errorbar(*at, **bars, ecolor=colour, elinewidth=1, alpha=0.5)
            axes.scatter(
                *at,
                s=64,
                marker=marker,
                facecolors=[colour if best else "white" for best in group["best"]],
                edgecolors=[colour],
                linewidths=1.5,
                zorder=3,
                label=method,
            )
        left, bottom = axes.get_xlim()[0], axes.get_ylim()[0]
        for method, group in points.groupby("method", sort=False):
            if len(group) > 1:
                best = group[front(group[["value_beside", "value"]].to_numpy())]
                x, y = best.sort_values("value_beside")[["value_beside", "value"]].to_numpy().T
                shade = {"color": looks[method][1], "alpha": 0.07, "linewidth": 0, "zorder": 0}
                axes.fill_between([left, *x], [y[0], *y], bottom, step="pre", **shade)
        axes.set(xlim=(left, None), ylim=(bottom, None))
        images, beside = points["n"].max(), points["n_beside"].max()
        axes.set_xlabel(f"{MEANS[utility].gain} on {utility_set!r} prompts, n = {beside} →")
        axes.set_ylabel(f"{MEANS['asr'].gain}, on {safety_set!r} prompts, n = {images} →")
        handles = [_half_full(method, *looks[method]) for method in points["method"].unique()]
        _legend(figure, axes, handles)
        label_points(axes, points, {method: colour for method, (_, colour) in looks.items()})
    return figure


def colours(methods: Iterable[str]) -> dict[str, str]:
    """Method → its colour in all figures, as `#rrggbb`."""
    return {name: to_hex(colour) for name, (_, colour) in _looks(pd.Series(list(methods))).items()}


def save(figure: Figure, path: str | Path, dpi: int = 150) -> Path:
    """Write a figure (format by suffix), atomically; returns the path."""
    with atomic(path) as temporary:
        figure.savefig(temporary, dpi=dpi, bbox_inches="tight")
    return Path(path)


def schedule_curves(
    summary: pd.DataFrame, costs: pd.DataFrame, prompt_set: str = "implicit"
) -> Figure:
    """Safety and retention against the number of queries, a curve per spacing, and the cost.

    Args:
        summary, costs: of an `Ablation` of `spacing` and `queries`.
        prompt_set: whose images are shown.
    """
    metrics = [(metric, prompt_set) for metric in ("asr", "retention", "clip")]
    figure = factor_curves(summary, "queries", "spacing", metrics)
    spent = costs[costs["prompt_set"] == prompt_set]
    for axes in figure.axes:
        axes.set_xscale("symlog", linthresh=1)
        counts = sorted(spent["queries"].unique())
        axes.set_xticks(counts, counts)
        axes.minorticks_off()
    beside = figure.axes[0].twinx()
    mean = spent.groupby("queries")["model_evaluations"].mean()
    beside.plot(mean.index, mean, color="0.5", linestyle=":", label="U-Net evaluations")
    beside.set_ylabel("U-Net evaluations an image (dotted)", color="0.4")
    beside.grid(visible=False)
    return figure


def factor_curves(
    summary: pd.DataFrame,
    factor: str,
    hue: str,
    metrics: Sequence[tuple[str, str]],
    level: str = "",
) -> Figure:
    """A panel per metric: its values against a number that varies, a curve per value of `hue`.

    Args:
        summary: as `Ablation.summary` makes it; rows without a value of `factor` are of one variant
            that does not vary, and are drawn as a line across with its interval.
        factor: the column of numbers.
        hue: a column whose values are told apart by colour and shape.
        metrics: metric and prompt set of each panel; those that are not there are left out.
        level: what the line across is called.
    """
    shown = _shown(_turned(summary), metrics)
    with _in_threes(len(shown), 4, 3.4) as (figure, panel):
        for axes, ((metric, prompt_set), rows) in zip(panel, shown, strict=True):
            varied = pd.to_numeric(rows[factor], errors="coerce")
            for row in rows[varied.isna()].itertuples():
                axes.axhspan(row.low, row.high, color="0.5", alpha=0.15, linewidth=0)
                axes.axhline(row.value, color="0.4", linestyle="--", label=level)
            chosen = rows.assign(**{factor: varied})[varied.notna()]
            for place, (value, group) in enumerate(chosen.groupby(hue, sort=False)):
                _curve(axes, group, factor, label=value, **_look(place))
            axes.set(xlabel=factor, ylabel=MEANS[metric].gain)
            if len(set(summary["prompt_set"])) > 1:
                axes.set_title(prompt_set)
        _legend(figure, panel[0])
    return figure


def factor_points(
    summary: pd.DataFrame,
    factor: str,
    hue: str | None = None,
    metrics: Sequence[tuple[str, str]] | None = None,
) -> Figure:
    """A panel per metric: each variant's value with its 95 % interval, to the right is better.

    Args:
        summary: as `Ablation.summary` makes it.
        factor: the column that names the variants, from top to bottom in their order.
        hue: a column whose values are told apart by colour and shape.
        metrics: metric and prompt set of each panel; those that are not there are left out. The
            default is safety and retention on the summary's first prompt set, and CLIP score on
            its last: an ablation's harmless one.
    """
    data = _turned(summary)
    first, *_, last = [*dict.fromkeys(summary["prompt_set"])] * 2
    shown = _shown(data, metrics or (("asr", first), ("retention", first), ("clip", last)))
    variants = list(dict.fromkeys(data[factor]))
    groups = list(dict.fromkeys(data[hue])) if hue else [None]
    height = 0.42 * len(variants) + 1.4
    with _in_threes(len(shown), 3.7, height, sharey=True) as (figure, panel):
        for axes, ((metric, prompt_set), rows) in zip(panel, shown, strict=True):
            for place, group in enumerate(groups):
                part = rows if group is None else rows[rows[hue] == group]
                shift = 0.22 * (place - (len(groups) - 1) / 2)
                heights = [variants.index(name) + shift for name in part[factor]]
                bars = {"xerr": _reach(part), "elinewidth": 1.2, "linestyle": "none"}
                axes.errorbar(part["value"], heights, label=group, **bars, **_look(place))
            axes.set_xlabel(f"{MEANS[metric].gain},\n{prompt_set!r} prompts")
        panel[0].set_yticks(range(len(variants)), variants)
        panel[0].set_ylim(len(variants) - 0.5, -0.5)
        if hue:
            _legend(figure, panel[0])
    return figure


def cost_points(
    summary: pd.DataFrame,
    costs: pd.DataFrame,
    variant: str = "variant",
    metrics: Sequence[tuple[str, str]] | None = None,
) -> Figure:
    """Each metric against an image's time in units of plain CFG's; up and to the left is better.

    Args:
        summary, costs: of an `Ablation` with plain CFG among its variants.
        variant: the column that names the variants.
        metrics: metric and prompt set of each panel; those that are not there are left out. The
            default is safety and retention on the summary's first prompt set, and retention on
            its last: an ablation's harmless one.
    """
    spent = costs[[variant, "prompt_set", "relative"]]
    data = _turned(summary).merge(spent, on=[variant, "prompt_set"])
    first, *_, last = [*dict.fromkeys(summary["prompt_set"])] * 2
    shown = _shown(data, metrics or (("asr", first), ("retention", first), ("retention", last)))
    size = 4 * len(shown), 3.5 + 0.11 * data[variant].nunique()  # the legend has two a line
    with panels(size, 1, len(shown)) as (figure, grid):
        for axes, ((metric, prompt_set), rows) in zip(grid[0], shown, strict=True):
            for place, (name, part) in enumerate(rows.groupby(variant, sort=False)):
                bars = {"yerr": _reach(part), "elinewidth": 0.8, "linestyle": "none"}
                axes.errorbar(part["relative"], part["value"], label=name, **bars, **_look(place))
            axes.set(xlabel="time of an image, plain CFG's being 1", ylabel=MEANS[metric].gain)
            axes.set_title(f"{prompt_set!r} prompts", fontsize="medium")
        entries = grid[0, 0].get_legend_handles_labels()
        figure.legend(*entries, loc="outside lower center", ncols=2, frameon=False)
    return figure


def detection_curves(table: pd.DataFrame) -> Figure:
    """F1, precision and recall by step, a curve per VLM (see `detection`)."""
    with panels((11, 3.2), 1, 3, sharey=True) as (figure, grid):
        for axes, score in zip(grid[0], ("f1", "precision", "recall"), strict=True):
            for place, (vlm, group) in enumerate(table.groupby("vlm", sort=False)):
                axes.plot(group["step"], group[score], label=vlm, **_look(place))
            axes.set(xlabel="step", ylabel=score.capitalize(), ylim=(-0.02, 1.02))
        _legend(figure, grid[0, 0])
    return figure


def cost_parts(shares: pd.DataFrame) -> Figure:
    """Where an image's time goes, a bar per way.

    Args:
        shares: as `vldnp.study.timing.relative` makes it.
    """
    with panels((8, 0.6 * len(shares) + 1.2)) as (figure, ((axes,),)):
        left = np.zeros(len(shares))
        for place, part in enumerate(shares.columns.drop("all")):
            axes.barh(list(shares.index), shares[part], left=left, color=PALETTE[place], label=part)
            left += shares[part].to_numpy()
        axes.invert_yaxis()
        axes.set_xlabel("time of an image, plain CFG's being 1")
        axes.grid(visible=False, axis="y")
        _legend(figure, axes)
    return figure


def _omega_panel(axes: Axes, data: pd.DataFrame, looks: Mapping) -> None:
    for method, group in data.groupby("method", sort=False):
        marker, colour = looks[method]
        for level in group[group["omega"].isna()].itertuples():
            label = f"{method}, no ω" if group["omega"].notna().any() else method
            axes.axhline(level.value, color=colour, linestyle="--", linewidth=1, label=label)
            if method == "cfg":  # bands of all would hide the curves
                axes.axhspan(level.low, level.high, color=colour, alpha=0.1)
        if len(swept := group[group["omega"].notna()]):
            _curve(axes, swept, "omega", marker=marker, color=colour, label=method)


def _curve(axes: Axes, group: pd.DataFrame, x: str, *, color, **look) -> None:
    """Values over a column, with the band of their intervals."""
    group = group.sort_values(x)
    axes.plot(group[x], group["value"], color=color, **look)
    axes.fill_between(group[x], group["low"], group["high"], color=color, alpha=0.15)


def _look(place: int) -> dict:
    """Colour and marker of what is no method, by its place among its like."""
    return {"color": PALETTE[place % len(PALETTE)], "marker": "osD^vP"[place % 6]}


def _turned(summary: pd.DataFrame) -> pd.DataFrame:
    """The summary with values and intervals such that larger is better."""
    parts = []
    for metric, part in summary.groupby("metric", sort=False):
        turned = part[["value", "low", "high"]]
        if MEANS[metric].better < 0:  # of a share, as ASR; its lower end becomes the upper one
            turned = 1 - turned[["value", "high", "low"]]
        parts.append(
            part.assign(**dict(zip(("value", "low", "high"), turned.to_numpy().T, strict=True)))
        )
    if not parts:
        raise ValueError("there is nothing to draw: the summary is empty")
    return pd.concat(parts).sort_index()


def _shown(data: pd.DataFrame, metrics: Sequence[tuple[str, str]]) -> list:
    """The pairs of metric and prompt set that are there, each with its rows."""
    groups = dict(iter(data.groupby(["metric", "prompt_set"], sort=False)))
    return [(pair, groups[pair]) for pair in dict.fromkeys(metrics) if pair in groups]


def _of(data: pd.DataFrame, metric: str, prompt_set: str) -> pd.DataFrame:
    for _, rows in _shown(data, [(metric, prompt_set)]):
        return rows
    present = ", ".join(sorted(data["prompt_set"].unique()))
    raise ValueError(f"there is no {metric} for the prompt set {prompt_set!r}; there are {present}")


def _reach(group: pd.DataFrame, suffix: str = "") -> np.ndarray:
    """Distances from the value down and up to its interval's ends: `[2, n]`."""
    value, low, high = (group[f"{name}{suffix}"] for name in ("value", "low", "high"))
    return np.array([(value - low).clip(lower=0), (high - value).clip(lower=0)])


def _looks(methods: pd.Series) -> dict:
    others = sorted(set(methods) - set(LOOKS))
    return LOOKS | {name: MORE_LOOKS[i % len(MORE_LOOKS)] for i, name in enumerate(others)}


def _half_full(name: str, marker: str, colour: str) -> Line2D:
    """A method in a legend, neither full nor hollow, which would say something of it."""
    half = {"fillstyle": "bottom", "markerfacecoloralt": "white", "markersize": 8}
    return Line2D([], [], linestyle="", marker=marker, color=colour, label=name, **half)


def _legend(figure: Figure, axes: Axes, handles: Sequence[Line2D] = ()) -> None:
    labels = [handle.get_label() for handle in handles]
    if not handles:
        handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False)
