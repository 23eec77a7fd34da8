"""Pictures in rows: any, or those of a run, method beside method."""

import textwrap
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from vldnp.show import blur, figures
from vldnp.study.run_fid import Draw


def image_grid(
    rows: Mapping[str, Sequence[Image.Image]],
    titles: Sequence[str] = (),
    size: float = 1.3,
    reasons: Mapping[str, Sequence[str | None]] | None = None,
    captions: Mapping[str, Sequence[str]] | None = None,
    *,
    heading: str = "",
    between: float = 0.12,
    **look,
) -> Figure:
    """Pictures in labelled rows.

    Args:
        rows: row label → its pictures; rows may differ in length.
        titles: texts above the pictures in reading order: as many as columns label these.
        size: edge of a picture in inches.
        reasons: row label → for each picture why it is shown blurred, None for one that is not;
            as `vldnp.show.blur.reasons` finds them.
        captions: row label → a text under each picture.
        heading: above all.
        between: inches for text between two rows.
        look: of the titles, as `Axes.set_title` takes it.
    """
    width = max(map(len, rows.values()), default=0)
    if not width:
        raise ValueError("an image grid needs at least one picture")
    label_width, label_size = (1.6, 7) if captions else (1, 9)
    inches = (
        size * width + label_width * any(map(str.strip, rows)),
        (size + between) * len(rows) + 0.3 * (bool(titles) + bool(heading)),
    )
    with figures.panels(inches, len(rows), width) as (figure, grid):
        for axes in grid.flat:
            axes.set(xticks=[], yticks=[])
            sns.despine(ax=axes, left=True, bottom=True)
        for cells, (label, pictures) in zip(grid, rows.items(), strict=True):
            why = (reasons or {}).get(label) or [None] * len(pictures)
            if len(why) != len(pictures):
                raise ValueError(f"{len(why)} reasons for the {len(pictures)} pictures of {label}")
            for axes, picture, reason in zip(cells, pictures, why, strict=False):
                show_picture(axes, picture, reason)
            for axes, caption in zip(cells, (captions or {}).get(label, ()), strict=False):
                axes.set_xlabel(_wrapped(caption, 18), fontsize=6, parse_math=False)
            beside = {"rotation": 0, "ha": "right", "va": "center"}
            cells[0].set_ylabel(
                _wrapped(label, 22), fontsize=label_size, parse_math=False, **beside
            )
        for axes, title in zip(grid.flat, titles, strict=False):
            axes.set_title(title, **{"fontsize": 8, "parse_math": False} | look)
        if heading:
            figure.suptitle(heading, fontsize=11, parse_math=False)
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


def examples(
    images: pd.DataFrame, draw: Draw, prompt_set: str, omega: float | None, count: int = 8
) -> dict[str, list[Image.Image]]:
    """The first pictures of each method at one ω: label → pictures, in the prompts' order.

    Args:
        images: rows of a study.
        draw: rows → their pictures, such as `vldnp.study.run.drawing` gives.
        omega: None, where the rows have one setting of each method.
    """
    rows = _at_omega(images, prompt_set, omega, count)
    return {method: draw(group) for method, group in rows}


def flagged(
    images: pd.DataFrame, prompt_set: str, omega: float | None, reveal: bool, count: int = 8
) -> dict[str, list[str | None]]:
    """Why each picture of `examples` is to be shown blurred; None for those that may be seen."""
    return {
        method: [
            blur.because(row.found) if row.unsafe and not reveal else None
            for row in group.itertuples()
        ]
        for method, group in _at_omega(images, prompt_set, omega, count)
    }


def _at_omega(images: pd.DataFrame, prompt_set: str, omega: float | None, count: int):
    """Method → its rows at ω; those without ω only for a method that has none there."""
    rows = images[images["prompt_set"] == prompt_set]
    found = []
    for method, group in rows.groupby("method", sort=False):
        swept = group if omega is None else group[np.isclose(group["omega"], omega)]
        chosen = swept if len(swept) else group[group["omega"].isna()]
        if len(chosen):
            found.append((method, chosen.head(count)))
    return found
