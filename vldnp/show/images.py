"""Images in notebooks: grids, and the blur of flagged images."""

import base64
import io
import textwrap
from collections.abc import Mapping, Sequence

import jinja2
from markupsafe import Markup
from matplotlib.figure import Figure
from PIL import Image

from vldnp.metrics.intervals import UNSAFE_THRESHOLD
from vldnp.models.judges import Judge
from vldnp.show import figures

STRICT = {"autoescape": True, "undefined": jinja2.StrictUndefined, "trim_blocks": True}
templates = jinja2.Environment(loader=jinja2.PackageLoader("vldnp.show"), **STRICT)
"""HTML and SVG templates; values are escaped unless they are `Markup`."""


def judged(
    judge: Judge | None, images: Sequence[Image.Image], reveal: bool = False
) -> list[tuple[float | None, str | None]]:
    """Each image's probability, and the reason for its blur; None for no blur."""
    if judge is None or not images:
        return [(None, None)] * len(images)
    found, looks = judge(images), []
    for p, names in zip(found.unsafe_probability, found.found(UNSAFE_THRESHOLD), strict=True):
        shown = ", ".join(names).replace("_", " ").lower() or "no single thing"
        unsafe = p >= UNSAFE_THRESHOLD and not reveal
        looks.append((float(p), f"judged unsafe: {shown}" if unsafe else None))
    return looks


def blurred(image: Image.Image) -> Image.Image:
    """The image reduced to 6×6 pixels and smoothly enlarged, so that only colours remain."""
    return image.convert("RGB").resize((6, 6), Image.Resampling.BOX).resize(image.size)


def image_html(image: Image.Image, width: int, alt: str, reason: str | None = None) -> Markup:
    """An `<img>` of that width; with a reason, a blurred image that a click replaces by it."""
    values = {"alt": alt, "reason": reason, "width": width, "source": _data_uri(image, width)}
    values["preview"] = _data_uri(blurred(image), 48) if reason else None
    return Markup(templates.get_template("image.html").render(values))


def _data_uri(image: Image.Image, largest: int) -> str:
    """The image as a data address (WebP), no wider than `largest` pixels."""
    if image.width > largest:
        size = (largest, max(1, round(image.height * largest / image.width)))
        image = image.resize(size, Image.Resampling.LANCZOS)
    data = io.BytesIO()
    image.convert("RGB").save(data, "WEBP", quality=90 if image.width <= 128 else 75)
    return "data:image/webp;base64," + base64.b64encode(data.getvalue()).decode()


def image_grid(
    rows: Mapping[str, Sequence[Image.Image]],
    titles: Sequence[str] = (),
    *,
    reasons: Mapping[str, Sequence[str | None]] | None = None,
    unsafe: Mapping[str, Sequence[bool]] | None = None,
    captions: Mapping[str, Sequence[str]] | None = None,
) -> Figure:
    """Images in labelled rows (label → images, of any number), as a closed figure.

    Titles, such as prompts, are above the columns. By row label there may be, for each image, the
    reason for its blur or None (`reasons`, see `judged`), a flag for a red frame, and a caption.
    """
    columns = max(map(len, rows.values()), default=0)
    if not columns:
        raise ValueError("an image grid needs at least one image")
    height = (1.7 if captions else 1.3) * len(rows) + 0.5 * bool(titles)
    box = {"facecolor": "black", "alpha": 0.7, "linewidth": 0, "pad": 1.5}
    flag = {"fontsize": 7, "color": "white", "bbox": box, "parse_math": False}
    flag |= {"ha": "center", "va": "center"}
    beside = {"rotation": 0, "ha": "right", "va": "center", "fontsize": 9}
    with figures.panels((1.3 * columns + 1, height), len(rows), columns) as (figure, grid):
        for axes in grid.flat:
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set(visible=False, color="crimson", linewidth=2)
        for cells, (label, images) in zip(grid, rows.items(), strict=True):
            nothing = [None] * len(images)
            given = [(of or {}).get(label, nothing) for of in (reasons, unsafe, captions)]
            own = zip(images, *given, strict=True)
            for axes, (image, why, framed, caption) in zip(cells, own, strict=False):
                axes.imshow(image if why is None else blurred(image), interpolation="nearest")
                if why is not None:
                    axes.text(0.5, 0.5, _wrapped(why, 16), transform=axes.transAxes, **flag)
                axes.spines[:].set_visible(bool(framed))
                axes.set_xlabel(_wrapped(caption or "", 18), fontsize=6, parse_math=False)
            cells[0].set_ylabel(_wrapped(label, 16), parse_math=False, **beside)
        for axes, title in zip(grid[0], titles, strict=False):
            axes.set_title(_wrapped(title, 20), fontsize=7, parse_math=False)
    return figure


def _wrapped(text: str, width: int) -> str:
    return "\n".join(textwrap.wrap(text, width, max_lines=4, placeholder=" …"))
