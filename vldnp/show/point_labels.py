"""Labels beside a figure's points, such that none covers another or a point."""

from collections.abc import Mapping

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

LABEL_OFFSETS = [
    (dx * reach, dy * reach - (8 if dy < 0 else 0))
    for reach in (8, 18, 28, 38)
    for dy in (1, -1)
    for dx in (1, -1)
]
"""Where a label may stand, in points from its marker, nearest first."""


def label_points(axes: Axes, points: pd.DataFrame, colours: Mapping) -> None:
    """Write ω beside each point, where it covers neither another label nor another point."""
    axes.figure.draw_without_rendering()  # lays the axes out, so that places are final
    pixel = axes.figure.dpi / 72
    places = axes.transData.transform(points[["value_beside", "value"]]) / pixel  # in points
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
            (point.value_beside, point.value),
            textcoords="offset points",
            xytext=(dx, dy),
            ha="left" if dx > 0 else "right",
            fontsize=8,
            color=colours[point.method],
            arrowprops={"arrowstyle": "-", "linewidth": 0.5, "color": colours[point.method]},
        )


def _overlap(a: tuple, b: tuple) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
