"""Sensitive pictures: what the judge flags is shown blurred, with its reason, until one asks.

Only what is shown is blurred; saved pictures are never altered.
"""

import base64
import io
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from markupsafe import Markup
from PIL import Image

from vldnp.metrics.intervals import UNSAFE_THRESHOLD
from vldnp.models.judges import Judge
from vldnp.show.templating import filled

QUALITY, QUALITY_OF_SMALL, SMALL = 75, 90, 128
"""Of the WebP pictures in pages; those up to `SMALL` pixels wide are enlarged there, and cheap:
64×64 pixels take about 1.5 kB, a quarter of the PNG."""

PREVIEW = 48
"""So many pixels wide is what stands for a flagged picture; it is smooth."""


class Look(NamedTuple):
    """What a judge says about one picture; `reason` is None where it passes."""

    probability: float
    reason: str | None


def look(
    judge: Judge, pictures: Sequence[Image.Image], threshold: float = UNSAFE_THRESHOLD
) -> list[Look]:
    """Judge pictures one by one.

    Args:
        judge: as `vldnp.load_judge` opens it.
        pictures: may be empty.
        threshold: a picture is flagged, and what is in it named, from this probability on.
    """
    if not pictures:
        return []
    judged = judge(pictures)
    return [
        Look(float(p), because(named) if p >= threshold else None)
        for p, named in zip(judged.unsafe_probability, judged.found(threshold), strict=True)
    ]


def because(names: Iterable[str]) -> str:
    """The reason of a flag, from the names of what the judge found."""
    return "judged unsafe: " + (
        ", ".join(name.replace("_", " ").lower() for name in names) or "no single thing"
    )


def reasons(judge: Judge, pictures: Sequence[Image.Image], reveal: bool) -> list[str | None]:
    """Why each picture is to be blurred; None for those that may be seen. See `look`."""
    if reveal:
        return [None] * len(pictures)
    return [found.reason for found in look(judge, pictures)]


def blurred(picture: Image.Image) -> Image.Image:
    """The picture with nothing left in it but its colours: 6×6 pixels, smoothly enlarged."""
    return picture.convert("RGB").resize((6, 6), Image.Resampling.BOX).resize(picture.size)


def picture_html(source: str, width: int, alt: str, reason: str | None = None) -> Markup:
    """An `<img>`; with a reason it is hidden behind a blurred one, which opens on a click.

    Args:
        source: a data address, as `data_uri` makes it.
        width: in screen pixels.
        alt: what the picture is; escaped here, like the reason.
        reason: why it is blurred.
    """
    preview = None
    if reason:
        with Image.open(io.BytesIO(base64.b64decode(source.split(",", 1)[1]))) as picture:
            preview = data_uri(blurred(picture), PREVIEW)
    return filled(
        "picture.html", source=source, width=width, alt=alt, reason=reason, preview=preview
    )


def data_uri(picture: Image.Image, largest: int | None = None) -> str:
    """A picture as a data address (WebP), no wider than `largest` pixels."""
    if largest and picture.width > largest:
        height = max(1, round(picture.height * largest / picture.width))
        picture = picture.resize((largest, height), Image.Resampling.LANCZOS)
    data = io.BytesIO()
    quality = QUALITY_OF_SMALL if picture.width <= SMALL else QUALITY
    picture.convert("RGB").save(data, "WEBP", quality=quality)
    return "data:image/webp;base64," + base64.b64encode(data.getvalue()).decode()
