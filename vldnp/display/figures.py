"""Figures from tidy tables, in one style; on every axis larger is better.

All functions return a closed `Figure`, which a notebook shows by naming it and `save` writes.
"""

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from PIL import Image

from vldnp._files import atomic
from vldnp.display import blur
from vldnp.metrics.pareto import front
from vldnp.metrics.summary import MEANS

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


def omega_curves(summary: pd.DataFrame, metrics: Sequence[str] | None = None) -> Figure:
    """Each metric against ω: a column per metric, a row per prompt set, 95 % intervals.

    A setting without ω (plain CFG, SLD) is a dashed line across.

    Args:
        summary: as `vldnp.metrics.summary.summary` makes it.
        metrics: of `summary.MEANS`; default is all. Those that the summary lacks are left out.
    """
    data = _turned(summary)
    present = [metric for metric in MEANS if metric in set(data["metric"])]
    metrics = [metric for metric in metrics or present if metric in present]
    sets = list(data["prompt_set"].unique())
    looks = _looks(data["method"])
    with _style():
        figure, grid = plt.subplots(
            len(sets),
            len(metrics),
            figsize=(3.3 * len(metrics), 2.7 * len(sets) + 0.4),
            squeeze=False,
            sharex=True,
            sharey="col",
            layout="constrained",
        )
        for row, prompt_set in zip(grid, sets, strict=True):
            for axes, metric in zip(row, metrics, strict=True):
                chosen = data[(data["metric"] == metric) & (data["prompt_set"] == prompt_set)]
                _omega_panel(axes, chosen, looks)
                axes.set_title(prompt_set)
                axes.set_ylabel(MEANS[metric].gain)
        for axes in grid[-1]:
            axes.set_xlabel("strength ω")
        _legend(figure, grid[0, 0])
    plt.close(figure)
    return figure


def pareto(
    summary: pd.DataFrame, safety_set: str = "implicit", clip_set: str | None = None
) -> Figure:
    """Safety (1 − ASR) against CLIP score: a marker per ω, methods by shape, intervals on both.

    Up and to the right is better. What a method's settings leave behind them is shaded; a point
    that a point of any method dominates is hollow.

    Args:
        summary: as `vldnp.metrics.summary.summary` makes it.
        safety_set: the prompt set whose ASR is shown.
        clip_set: the prompt set whose CLIP score is shown; default is `safety_set`.
    """
    clip_set = clip_set or safety_set
    data = _turned(summary)
    safety = _of(data, "asr", safety_set)
    clip = _of(data, "clip", clip_set)
    points = safety.merge(clip, on="setting", suffixes=("", "_clip"))
    looks = _looks(data["method"])
    points["best"] = front(points[["value_clip", "value"]].to_numpy())
    with _style():
        figure, axes = plt.subplots(figsize=(7, 5), layout="constrained")
        for method, group in points.groupby("method", sort=False):
            marker, colour = looks[method]
            group = group.sort_values("omega")
            swept = group[group["omega"].notna()]
            axes.plot(swept["value_clip"], swept["value"], color=colour, alpha=0.4, linewidth=1)
            axes.errorbar(
                group["value_clip"],
                group["value"],
                xerr=_reach(group, "_clip"),
                yerr=_reach(group),
                fmt="none",
                ecolor=colour,
                elinewidth=1,
                alpha=0.5,
            )
            axes.scatter(
                group["value_clip"],
                group["value"],
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
            corners = _staircase(group[["value_clip", "value"]].to_numpy(), left, bottom)
            if method != "cfg":
                axes.fill(*corners.T, color=looks[method][1], alpha=0.07, linewidth=0, zorder=0)
        axes.set(xlim=(left, None), ylim=(bottom, None))
        axes.set_xlabel(f"{MEANS['clip'].gain} on {clip_set!r} prompts →")
        axes.set_ylabel(f"{MEANS['asr'].gain}, on {safety_set!r} prompts →")
        _legend(figure, axes)
        _label_points(axes, points, {method: colour for method, (_, colour) in looks.items()})
    plt.close(figure)
    return figure


def image_grid(
    rows: Mapping[str, Sequence[Image.Image]],
    columns: Sequence[str] = (),
    size: float = 1.3,
    reasons: Mapping[str, Sequence[str | None]] | None = None,
) -> Figure:
    """Pictures in labelled rows.

    Args:
        rows: row label → its pictures; rows may differ in length.
        columns: labels above the columns.
        size: edge of a picture in inches.
        reasons: row label → for each picture why it is shown blurred, None for one that is not;
            as `vldnp.display.blur.reasons` finds them.
    """
    width = max(map(len, rows.values()), default=0)
    if not width:
        raise ValueError("an image grid needs at least one picture")
    with _style():
        figure, grid = plt.subplots(
            len(rows),
            width,
            figsize=(size * width + 1, (size + 0.12) * len(rows) + 0.3 * bool(columns)),
            squeeze=False,
            layout="constrained",
        )
        for cells, (label, pictures) in zip(grid, rows.items(), strict=True):
            for axes in cells:
                axes.set(xticks=[], yticks=[])
                sns.despine(ax=axes, left=True, bottom=True)
            why = (reasons or {}).get(label) or [None] * len(pictures)
            if len(why) != len(pictures):
                raise ValueError(f"{len(why)} reasons for the {len(pictures)} pictures of {label}")
            for axes, picture, reason in zip(cells, pictures, why, strict=False):
                show_picture(axes, picture, reason)
            beside = {"rotation": 0, "ha": "right", "va": "center"}
            cells[0].set_ylabel(label, fontsize=9, parse_math=False, **beside)
        for axes, label in zip(grid[0], columns, strict=False):
            axes.set_title(label, fontsize=8, parse_math=False)
    plt.close(figure)
    return figure


def strips(rows: Mapping[str, Sequence[tuple[Image.Image, str]]], size: float = 1.1) -> Figure:
    """Rows of pictures with a caption under each; the row's label stands at its left."""
    width = max(map(len, rows.values()))
    with _style():
        figure, grid = plt.subplots(
            len(rows),
            width,
            figsize=(size * width + 1.6, (size + 0.4) * len(rows)),
            squeeze=False,
            layout="constrained",
        )
        for cells, (label, pictures) in zip(grid, rows.items(), strict=True):
            for axes in cells:
                axes.set_axis_off()
            for axes, (picture, caption) in zip(cells, pictures, strict=False):
                axes.imshow(picture, interpolation="nearest")
                below = {"transform": axes.transAxes, "ha": "center", "va": "top"}
                axes.text(0.5, -0.04, _wrapped(caption, 18), fontsize=6, parse_math=False, **below)
            cells[0].text(
                -0.1,
                0.5,
                _wrapped(label, 22),
                transform=cells[0].transAxes,
                ha="right",
                va="center",
                fontsize=7,
                parse_math=False,
            )
    plt.close(figure)
    return figure


def _wrapped(text: str, width: int) -> str:
    lines = [textwrap.fill(line, width, max_lines=3, placeholder=" …") for line in text.split("\n")]
    return "\n".join(lines)


def show_picture(axes: Axes, picture: Image.Image, reason: str | None = None) -> None:
    """A picture into a panel, pixel by pixel; one with a reason blurred, the reason upon it."""
    if reason is None:
        axes.imshow(picture, interpolation="nearest")
        return
    axes.imshow(blur.blurred(picture), interpolation="nearest")
    axes.text(
        0.5,
        0.5,
        "\n".join(textwrap.wrap(reason, 16, max_lines=4, placeholder=" …")),
        transform=axes.transAxes,
        ha="center",
        va="center",
        fontsize=7,
        color="white",
        bbox={"facecolor": "black", "alpha": 0.7, "linewidth": 0, "pad": 1.5},
        parse_math=False,
    )


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
    """Safety and things kept against the number of queries, a curve per spacing, and the cost.

    Args:
        summary, costs: of an `Ablation` of `spacing` and `queries`.
        prompt_set: whose images are shown.
    """
    data = _turned(summary[summary["prompt_set"] == prompt_set])
    spent = costs[costs["prompt_set"] == prompt_set]
    metrics = [metric for metric in ("asr", "kept", "clip") if metric in set(data["metric"])]
    with _style():
        figure, grid = plt.subplots(
            1, len(metrics), figsize=(4 * len(metrics), 3.4), squeeze=False, layout="constrained"
        )
        for axes, metric in zip(grid[0], metrics, strict=True):
            chosen = data[data["metric"] == metric]
            for place, (spacing, group) in enumerate(chosen.groupby("spacing", sort=False)):
                group = group.sort_values("queries")
                look = {"color": PALETTE[place], "marker": "osD^"[place]}
                axes.plot(group["queries"], group["value"], label=spacing, **look)
                axes.fill_between(
                    group["queries"], group["low"], group["high"], color=look["color"], alpha=0.12
                )
            axes.set(xlabel="queries", ylabel=MEANS[metric].gain)
            axes.set_xscale("symlog", linthresh=1)
            counts = sorted(chosen["queries"].unique())
            axes.set_xticks(counts, counts)
            axes.minorticks_off()
        beside = grid[0, 0].twinx()
        mean = spent.groupby("queries")["model_evaluations"].mean()
        beside.plot(mean.index, mean, color="0.5", linestyle=":", label="U-Net evaluations")
        beside.set_ylabel("U-Net evaluations an image (dotted)", color="0.4")
        beside.grid(visible=False)
        _legend(figure, grid[0, 0])
    plt.close(figure)
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
            default is safety and things kept on the summary's first prompt set, and CLIP score on
            its last: an ablation's harmless one.
    """
    data = _turned(summary)
    first, *_, last = [*dict.fromkeys(summary["prompt_set"])] * 2
    metrics = metrics or (("asr", first), ("kept", first), ("clip", last))
    there = set(zip(data["metric"], data["prompt_set"], strict=True))
    shown = [pair for pair in metrics if pair in there]
    variants = list(dict.fromkeys(data[factor]))
    groups = list(dict.fromkeys(data[hue])) if hue else [None]
    with _style():
        figure, grid = plt.subplots(
            1,
            len(shown),
            figsize=(3.4 * len(shown) + 1, 0.42 * len(variants) + 1.4),
            squeeze=False,
            sharey=True,
            layout="constrained",
        )
        for axes, (metric, prompt_set) in zip(grid[0], shown, strict=True):
            rows = data[(data["metric"] == metric) & (data["prompt_set"] == prompt_set)]
            for place, group in enumerate(groups):
                part = rows if group is None else rows[rows[hue] == group]
                shift = 0.22 * (place - (len(groups) - 1) / 2)
                heights = [variants.index(name) + shift for name in part[factor]]
                reach = [part["value"] - part["low"], part["high"] - part["value"]]
                axes.errorbar(
                    part["value"],
                    heights,
                    xerr=np.clip(reach, 0, None),
                    fmt="osD^"[place],
                    color=PALETTE[place],
                    elinewidth=1.2,
                    label=group,
                )
            axes.set_xlabel(f"{MEANS[metric].gain},\n{prompt_set!r} prompts")
        grid[0, 0].set_yticks(range(len(variants)), variants)
        grid[0, 0].set_ylim(len(variants) - 0.5, -0.5)
        if hue:
            _legend(figure, grid[0, 0])
    plt.close(figure)
    return figure


def detection_curves(table: pd.DataFrame) -> Figure:
    """F1, precision and recall by step, a curve per VLM (see `detection`)."""
    with _style():
        figure, grid = plt.subplots(
            1, 3, figsize=(11, 3.2), squeeze=False, sharey=True, layout="constrained"
        )
        for axes, score in zip(grid[0], ("f1", "precision", "recall"), strict=True):
            for place, (vlm, group) in enumerate(table.groupby("vlm", sort=False)):
                look = {"color": PALETTE[place % 10], "marker": "osD^vP"[place % 6]}
                axes.plot(group["step"], group[score], label=vlm, **look)
            axes.set(xlabel="step", ylabel=score.capitalize(), ylim=(-0.02, 1.02))
        _legend(figure, grid[0, 0])
    plt.close(figure)
    return figure


def cost_parts(shares: pd.DataFrame) -> Figure:
    """Where an image's time goes, a bar per way.

    Args:
        shares: as `vldnp.experiments.timing.relative` makes it.
    """
    with _style():
        figure, axes = plt.subplots(figsize=(8, 0.6 * len(shares) + 1.2), layout="constrained")
        left = np.zeros(len(shares))
        for place, part in enumerate(shares.columns.drop("all")):
            axes.barh(list(shares.index), shares[part], left=left, color=PALETTE[place], label=part)
            left += shares[part].to_numpy()
        axes.invert_yaxis()
        axes.set_xlabel("time of an image, plain CFG's being 1")
        axes.grid(visible=False, axis="y")
        _legend(figure, axes)
    plt.close(figure)
    return figure


def _staircase(points: np.ndarray, left: float, bottom: float) -> np.ndarray:
    """The corners of the area that points dominate, down to (left, bottom): `[m, 2]`."""
    best = points[front(points)]
    best = best[np.argsort(best[:, 0])]
    corners, edge = [(left, bottom)], left
    for x, y in best:
        corners += [(edge, y), (x, y)]
        edge = x
    return np.array([*corners, (edge, bottom)])


def _omega_panel(axes: Axes, data: pd.DataFrame, looks: Mapping) -> None:
    for method, group in data.groupby("method", sort=False):
        marker, colour = looks[method]
        for level in group[group["omega"].isna()].itertuples():
            label = f"{method}, no ω" if group["omega"].notna().any() else method
            axes.axhline(level.value, color=colour, linestyle="--", linewidth=1, label=label)
            if method == "cfg":  # bands of all would hide the curves
                axes.axhspan(level.low, level.high, color=colour, alpha=0.1)
        group = group[group["omega"].notna()].sort_values("omega")
        if group.empty:
            continue
        axes.plot(group["omega"], group["value"], marker=marker, color=colour, label=method)
        axes.fill_between(group["omega"], group["low"], group["high"], color=colour, alpha=0.15)


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


def _of(data: pd.DataFrame, metric: str, prompt_set: str) -> pd.DataFrame:
    chosen = data[(data["metric"] == metric) & (data["prompt_set"] == prompt_set)]
    if chosen.empty:
        present = ", ".join(sorted(data["prompt_set"].unique()))
        raise ValueError(
            f"there is no {metric} for the prompt set {prompt_set!r}; there are {present}"
        )
    return chosen


def _reach(group: pd.DataFrame, suffix: str = "") -> np.ndarray:
    """Distances from the value down and up to its interval's ends: `[2, n]`."""
    value, low, high = (group[f"{name}{suffix}"] for name in ("value", "low", "high"))
    return np.array([(value - low).clip(lower=0), (high - value).clip(lower=0)])


def _label_points(axes: Axes, points: pd.DataFrame, colours: Mapping) -> None:
    """Write ω beside each point, where it covers neither another label nor another point."""
    axes.figure.draw_without_rendering()  # lays the axes out, so that places are final
    pixel = axes.figure.dpi / 72
    places = axes.transData.transform(points[["value_clip", "value"]]) / pixel  # in points
    taken = [(x - 4, y - 4, x + 4, y + 4) for x, y in places]
    for point, (x, y) in zip(points.itertuples(), places, strict=True):
        if np.isnan(point.omega):
            continue
        text = f"ω={point.omega:g}"
        width, height = 5.0 * len(text), 8
        for dx, dy in LABEL_OFFSETS:
            left = x + dx if dx > 0 else x + dx - width
            box = (left, y + dy, left + width, y + dy + height)
            if not any(_overlap(box, other) for other in taken):
                break
        taken.append(box)
        axes.annotate(
            text,
            (point.value_clip, point.value),
            textcoords="offset points",
            xytext=(dx, dy),
            ha="left" if dx > 0 else "right",
            fontsize=8,
            color=colours[point.method],
            arrowprops={"arrowstyle": "-", "linewidth": 0.5, "color": colours[point.method]},
        )


LABEL_OFFSETS = [
    (dx * reach, dy * reach - (8 if dy < 0 else 0))
    for reach in (8, 18, 28, 38)
    for dy in (1, -1)
    for dx in (1, -1)
]
"""Where a label may stand, in points from its marker, nearest first."""


def _overlap(a: tuple, b: tuple) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _looks(methods: pd.Series) -> dict:
    others = sorted(set(methods) - set(LOOKS))
    return LOOKS | {name: MORE_LOOKS[i % len(MORE_LOOKS)] for i, name in enumerate(others)}


def _legend(figure: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False)


def _style():
    """The one style of all figures."""
    return plt.rc_context(
        sns.axes_style("whitegrid")
        | sns.plotting_context("notebook", font_scale=0.8)
        | {
            "axes.spines.top": False,
            "axes.spines.right": False,
            "figure.dpi": 100,
            "grid.linewidth": 0.6,
        }
    )
