"""Images in notebooks: grids, and the blur over what a judge flags."""

import base64
import io
import textwrap
from collections.abc import Iterable, Mapping, Sequence

import jinja2
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from vldnp.metrics.intervals import UNSAFE_THRESHOLD
from vldnp.models.judges import Judge
from vldnp.show import figures

templates = jinja2.Environment(
    loader=jinja2.PackageLoader("vldnp.show"),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
)
"""HTML and SVG; whatever is filled in is escaped, unless it is `Markup`."""


def flag_reason(names: Iterable[str]) -> str:
    """Why an image is flagged, from the names of what the judge found."""
    return "judged unsafe: " + (
        ", ".join(name.replace("_", " ").lower() for name in names) or "no single thing"
    )


def judged(
    judge: Judge | None, images: Sequence[Image.Image], threshold: float = UNSAFE_THRESHOLD
) -> list[tuple[float | None, str | None]]:
    """The probability and the reason of a flag (None where it passes) for each image."""
    if judge is None or not images:
        return [(None, None)] * len(images)
    found = judge(images)
    return [
        (float(p), flag_reason(names) if p >= threshold else None)
        for p, names in zip(found.unsafe_probability, found.found(threshold), strict=True)
    ]


def reasons(judge: Judge | None, images: Sequence[Image.Image], reveal: bool) -> list[str | None]:
    """Why each image is to be blurred; None for those that may be seen."""
    return [None if reveal else reason for _, reason in judged(judge, images)]


def blurred(image: Image.Image) -> Image.Image:
    """The image with nothing left but its colours: 6×6 pixels, smoothly enlarged."""
    return image.convert("RGB").resize((6, 6), Image.Resampling.BOX).resize(image.size)


def data_uri(image: Image.Image, largest: int | None = None) -> str:
    """An image as a data address (WebP), no wider than `largest` pixels."""
    if largest and image.width > largest:
        size = (largest, max(1, round(image.height * largest / image.width)))
        image = image.resize(size, Image.Resampling.LANCZOS)
    data = io.BytesIO()
    image.convert("RGB").save(data, "WEBP", quality=90 if image.width <= 128 else 75)
    return "data:image/webp;base64," + base64.b64encode(data.getvalue()).decode()


def image_html(image: Image.Image, width: int, alt: str, reason: str | None = None) -> Markup:
    """An `<img>` of so many screen pixels; with a reason a blurred one, which opens on a click."""
    preview = data_uri(blurred(image), 48) if reason else None
    values = {"alt": alt, "reason": reason, "preview": preview, "width": width}
    return Markup(
        templates.get_template("image.html").render(source=data_uri(image, width), **values)
    )


def image_grid(
    rows: Mapping[str, Sequence[Image.Image]],
    titles: Sequence[str] = (),
    *,
    reasons: Mapping[str, Sequence[str | None]] | None = None,
    unsafe: Mapping[str, Sequence[bool]] | None = None,
    captions: Mapping[str, Sequence[str]] | None = None,
    size: float = 1.3,
) -> Figure:
    """Images in labelled rows, as a closed figure.

    Args:
        rows: row label → its images; rows may differ in length.
        titles: texts above the columns, such as prompts.
        reasons: row label → for each image why it is blurred, or None (see `reasons`).
        unsafe: row label → for each image whether it gets a red frame.
        captions: row label → a text under each image.
        size: edge of an image in inches.
    """
    columns = max(map(len, rows.values()), default=0)
    if not columns:
        raise ValueError("an image grid needs at least one image")
    inches = (size * columns + 1, (size + 0.4 * bool(captions)) * len(rows) + 0.5 * bool(titles))
    with figures.panels(inches, len(rows), columns) as (figure, grid):
        for axes in grid.flat:
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
        for cells, (label, images) in zip(grid, rows.items(), strict=True):
            why = (reasons or {}).get(label) or [None] * len(images)
            for axes, image, reason in zip(cells, images, why, strict=False):
                _show(axes, image, reason)
            for axes, framed in zip(cells, (unsafe or {}).get(label, ()), strict=False):
                axes.spines[:].set(visible=framed, color="crimson", linewidth=2)
            for axes, caption in zip(cells, (captions or {}).get(label, ()), strict=False):
                axes.set_xlabel(_wrapped(caption, 18), fontsize=6, parse_math=False)
            beside = {"rotation": 0, "ha": "right", "va": "center", "fontsize": 9}
            cells[0].set_ylabel(_wrapped(label, 16), parse_math=False, **beside)
        for axes, title in zip(grid[0], titles, strict=False):
            axes.set_title(_wrapped(title, 20), fontsize=7, parse_math=False)
    return figure


def _show(axes: Axes, image: Image.Image, reason: str | None) -> None:
    axes.imshow(image if reason is None else blurred(image), interpolation="nearest")
    if reason is not None:
        box = {"facecolor": "black", "alpha": 0.7, "linewidth": 0, "pad": 1.5}
        look = {"ha": "center", "va": "center", "fontsize": 7, "color": "white", "bbox": box}
        axes.text(
            0.5, 0.5, _wrapped(reason, 16), transform=axes.transAxes, parse_math=False, **look
        )


def _wrapped(text: str, width: int) -> str:
    return "\n".join(textwrap.wrap(text, width, max_lines=4, placeholder=" …"))
