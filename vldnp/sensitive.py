"""Sensitive pictures: what the judge flags is shown blurred, with its reason and a "show" button.

Only what is shown is blurred; saved pictures are never altered.
"""

import base64
import html
import io
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from PIL import Image

from vldnp.judges import Judge
from vldnp.metrics import UNSAFE_THRESHOLD

QUALITY, QUALITY_OF_SMALL, SMALL = 75, 90, 128
"""Of the WebP pictures in pages; those up to `SMALL` pixels wide are enlarged there, and cheap:
64×64 pixels take about 1.5 kB, a quarter of the PNG."""

STYLE = """<style>
.vldnp-picture {display: block; height: auto; image-rendering: pixelated}
.vldnp-flagged {position: relative; overflow: hidden; max-width: 100%}
.vldnp-cover {position: absolute; inset: 0; display: flex; flex-direction: column; gap: 6px;
  align-items: center; justify-content: center; padding: 4px; text-align: center}
.vldnp-cover span {background: rgba(0, 0, 0, .75); color: #fff; padding: 1px 6px;
  border-radius: 4px; overflow-wrap: anywhere; font: 12px/1.4 sans-serif}
.vldnp-cover button {font: 12px/1.4 sans-serif; padding: 1px 10px; cursor: pointer;
  color: #000; background: #fff; border: 1px solid #555; border-radius: 4px}
.vldnp-cover .vldnp-hide {display: none}
.vldnp-shown img {filter: none !important}
.vldnp-shown .vldnp-cover {justify-content: flex-end}
.vldnp-shown .vldnp-cover span, .vldnp-shown .vldnp-show {display: none}
.vldnp-shown .vldnp-cover .vldnp-hide {display: inline; opacity: .8}
</style>"""
"""What `picture_html` needs, once in a page."""

TOGGLE = "this.closest('.vldnp-scope').classList.toggle('vldnp-shown')"
"""Where no script may run, the picture stays blurred."""


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
        threshold: a picture is flagged from this probability on.
    """
    if not pictures:
        return []
    judged = judge(pictures)
    return [
        Look(float(p), because(n for n, c in named.items() if c >= threshold))
        if p >= threshold
        else Look(float(p), None)
        for p, named in zip(judged.unsafe_probability, judged.concepts, strict=True)
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


def picture_html(
    source: str, width: int, alt: str, reason: str | None = None, *, own_scope: bool = False
) -> str:
    """An `<img>`; with a reason it is blurred under a "show" button.

    The button opens all flagged pictures within the next element of class `vldnp-scope`.

    Args:
        source: a data address, as `data_uri` makes it.
        width: in screen pixels.
        alt: what the picture is; escaped here, like the reason.
        reason: why it is blurred.
        own_scope: the button opens only this picture.
    """
    blur = f"filter: blur({width / 9:.0f}px)" if reason else ""
    image = (
        f'<img class="vldnp-picture" src="{html.escape(source)}" alt="{html.escape(alt)}" '
        f'width="{width}" style="max-width: 100%; {blur}">'
    )
    if not reason:
        return image
    scope = " vldnp-scope" * own_scope
    return (
        f'<div class="vldnp-flagged{scope}" style="width: {width}px; overflow: hidden">{image}'
        f'<div class="vldnp-cover"><span>{html.escape(reason)}</span>'
        f'<button type="button" onclick="{TOGGLE}"><b class="vldnp-show">show</b>'
        f'<b class="vldnp-hide">hide</b></button></div></div>'
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
