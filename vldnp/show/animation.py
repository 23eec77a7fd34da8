"""A trajectory as an animated picture, for places that show no viewer, such as a README."""

import base64
import io
import textwrap
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from vldnp._files import atomic
from vldnp.show import figures
from vldnp.show.picture_grid import show_picture

COLUMN, HEIGHT, EDGE = 3.3, 5.0, 2.9
"""Inches: a column's and the whole frame's size, the edge of a picture."""

DPI = 100
LAST = 3.0
"""Seconds for which the final image stays."""

WRAP, MOST_LINES = 42, 3
"""Of a text under a picture, in characters and lines."""


def save(data: dict, path: str | Path, seconds: float = 20.0, reveal: bool = False) -> Path:
    """Write a trajectory as an animation, atomically.

    Args:
        data: as `vldnp.show.trajectory_data.trajectory_data` makes it.
        path: ends in `.webp` or `.gif`.
        seconds: how long it lasts; the final image stays for the last three of them.
        reveal: show what the judge flags unblurred.

    Returns:
        The path.

    Raises:
        ValueError: the animation is too short for its final image.
    """
    if seconds <= LAST:
        raise ValueError(f"an animation lasts more than {LAST:g} seconds, not {seconds:g}")
    drawn = [frame(data, place, reveal) for place in range(data["num_steps"] + 1)]
    durations = [round(1000 * (seconds - LAST) / data["num_steps"])] * data["num_steps"]
    durations.append(round(1000 * LAST))
    with atomic(path) as temporary:
        drawn[0].save(
            temporary,
            save_all=True,
            append_images=drawn[1:],
            duration=durations,
            loop=0,
            quality=80,
        )
    return Path(path)


def frame(data: dict, place: int, reveal: bool = False) -> Image.Image:
    """One place of a trajectory: its columns side by side over a line with the queries.

    Under each picture stand the VLM's last words and the negative prompt in force.
    """
    columns, num_steps = data["columns"], data["num_steps"]
    width = COLUMN * len(columns)
    figure = Figure(figsize=(width, HEIGHT), dpi=DPI, facecolor="white")
    canvas = FigureCanvasAgg(figure)
    margin, top = (COLUMN - EDGE) / 2, HEIGHT - 0.72
    plain = {"va": "top", "color": "black", "parse_math": False}
    figure.text(
        margin / width,
        1 - 0.1 / HEIGHT,
        f"“{_short(data['prompt'], 80)}”",
        style="italic",
        **plain,
    )
    colours = figures.colours([column["method"] for column in columns])
    for number, column in enumerate(columns):
        left = (number * COLUMN + margin) / width
        colour = colours[column["method"]]
        figure.text(left, (top + 0.32) / HEIGHT, column["label"], weight="bold", **plain)
        axes = figure.add_axes((left, (top - EDGE) / HEIGHT, EDGE / width, EDGE / HEIGHT))
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_color(colour)
        here = column["places"][place]["picture"]
        if here is not None:
            png = base64.b64decode(column["pictures"][here].split(",", 1)[1])
            reason = None if reveal else column["reasons"][here]
            show_picture(axes, Image.open(io.BytesIO(png)), reason)
        lines = [_short(line, WRAP * MOST_LINES, WRAP) for line in _caption(column, place)]
        text = "\n".join(lines)
        figure.text(left, (top - EDGE - 0.08) / HEIGHT, text, fontsize=9, linespacing=1.3, **plain)
    bar = figure.add_axes((margin / width, 0.12 / HEIGHT, 1 - 2 * margin / width, 0.2 / HEIGHT))
    bar.set(xlim=(-0.5, num_steps + 0.5), ylim=(-1, 1))
    bar.set_axis_off()
    bar.plot([0, num_steps], [0, 0], color="0.8", linewidth=4, solid_capstyle="round")
    bar.plot([0, place], [0, 0], color="0.35", linewidth=4, solid_capstyle="round")
    for column in columns:
        colour = colours[column["method"]]
        bar.plot(column["queries"], [0] * len(column["queries"]), "o", color=colour, markersize=5)
    canvas.draw()
    return Image.frombuffer("RGBA", canvas.get_width_height(), canvas.buffer_rgba()).convert("RGB")


def _caption(column: dict, place: int) -> list[str]:
    """A place's caption, and the VLM's last words: they would pass too quickly."""
    caption = column["places"][place]["caption"]
    asked = [step for step in column["queries"] if step <= place]
    if not asked or place == len(column["places"]) - 1 or place == asked[-1]:
        return caption
    return [caption[0], column["places"][asked[-1]]["caption"][1], *caption[1:]]


def _short(text: str, longest: int, width: int = 1000) -> str:
    lines = textwrap.wrap(text, width, max_lines=-(-longest // width), placeholder=" …")
    return "\n".join(lines)
