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

from vldnp import sensitive
from vldnp.files import atomic

PALETTE = sns.color_palette("colorblind")
LOOKS = {"vl-dnp": ("o", PALETTE[0]), "static": ("s", PALETTE[1]), "cfg": ("X", (0.25, 0.25, 0.25))}
"""Method → marker and colour."""
MORE_LOOKS = [("D", PALETTE[2]), ("^", PALETTE[4]), ("v", PALETTE[3]), ("P", PALETTE[7])]
"""For other methods, in the order of their names."""

LARGER_IS_BETTER = {
    "asr": ("Safety, 1 − ASR", lambda x: 1 - x),
    "tr": ("1 − toxic rate", lambda x: 1 - x),
    "clip": ("CLIP score", lambda x: x),
    "kept": ("Named things kept", lambda x: x),
}
"""Metric → axis label, and how its values turn so that larger is better."""


def omega_curves(summary: pd.DataFrame, metrics: Sequence[str] | None = None) -> Figure:
    """Each metric against ω: a column per metric, a row per prompt set, 95 % intervals.

    A method without ω (plain CFG) is a dashed line across.

    Args:
        summary: as `vldnp.study.summary` makes it.
        metrics: of `LARGER_IS_BETTER`; default is all that the summary has.
    """
    data = _turned(summary)
    present = [metric for metric in LARGER_IS_BETTER if metric in set(data["metric"])]
    metrics = list(metrics or present)
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
                axes.set_ylabel(LARGER_IS_BETTER[metric][0])
        for axes in grid[-1]:
            axes.set_xlabel("strength ω")
        _legend(figure, grid[0, 0])
    plt.close(figure)
    return figure


def pareto(
    summary: pd.DataFrame, safety_set: str = "implied", clip_set: str | None = None
) -> Figure:
    """Safety (1 − ASR) against CLIP score: a marker per ω, methods by shape, intervals on both.

    Up and to the right is better.

    Args:
        summary: as `vldnp.study.summary` makes it.
        safety_set: the prompt set whose ASR is shown.
        clip_set: the prompt set whose CLIP score is shown; default is `safety_set`.
    """
    clip_set = clip_set or safety_set
    data = _turned(summary)
    safety = _of(data, "asr", safety_set)
    clip = _of(data, "clip", clip_set)
    points = safety.merge(clip, on="setting", suffixes=("", "_clip"))
    looks = _looks(data["method"])
    with _style():
        figure, axes = plt.subplots(figsize=(7, 5), layout="constrained")
        for method, group in points.groupby("method", sort=False):
            marker, colour = looks[method]
            group = group.sort_values("omega")
            axes.plot(group["value_clip"], group["value"], color=colour, alpha=0.4, linewidth=1)
            axes.errorbar(
                group["value_clip"],
                group["value"],
                xerr=_reach(group, "_clip"),
                yerr=_reach(group),
                fmt=marker,
                color=colour,
                markersize=8,
                elinewidth=1,
                alpha=0.9,
                label=method,
            )
        axes.set_xlabel(f"CLIP score on {clip_set!r} prompts →")
        axes.set_ylabel(f"Safety, 1 − ASR, on {safety_set!r} prompts →")
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
            as `vldnp.sensitive.reasons` finds them.
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
            cells[0].set_ylabel(label, rotation=0, ha="right", va="center", fontsize=9)
        for axes, label in zip(grid[0], columns, strict=False):
            axes.set_title(label, fontsize=8)
    plt.close(figure)
    return figure


def show_picture(axes: Axes, picture: Image.Image, reason: str | None = None) -> None:
    """A picture into a panel, pixel by pixel; one with a reason blurred, the reason upon it."""
    if reason is None:
        axes.imshow(picture, interpolation="nearest")
        return
    axes.imshow(sensitive.blurred(picture), interpolation="nearest")
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


def _omega_panel(axes: Axes, data: pd.DataFrame, looks: Mapping) -> None:
    for method, group in data.groupby("method", sort=False):
        marker, colour = looks[method]
        if group["omega"].isna().all():
            level = group.iloc[0]
            axes.axhline(level["value"], color=colour, linestyle="--", label=method)
            axes.axhspan(level["low"], level["high"], color=colour, alpha=0.1)
            continue
        group = group.sort_values("omega")
        axes.plot(group["omega"], group["value"], marker=marker, color=colour, label=method)
        axes.fill_between(group["omega"], group["low"], group["high"], color=colour, alpha=0.15)


def _turned(summary: pd.DataFrame) -> pd.DataFrame:
    """The summary with values and intervals such that larger is better."""
    parts = []
    for metric, part in summary.groupby("metric", sort=False):
        turn = LARGER_IS_BETTER[metric][1]
        bounds = turn(part[["low", "high"]].to_numpy())
        parts.append(
            part.assign(value=turn(part["value"]), low=bounds.min(axis=1), high=bounds.max(axis=1))
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
