"""Imitations of what guidance does to icons: re-coloured, blurred, partly erased, faded.

An icon is labelled as present while half of its area is visible and as absent when less than a
quarter is; in between it has no label. Pixels count by what is left of their opacity, fully from
one half on.
"""

from __future__ import annotations

import math

import numpy as np
from scipy.ndimage import gaussian_filter

from moji.world.icons import THINGS
from moji.world.scenes import Scene, compose

THERE, GONE = 0.5, 0.25
"""Visible areas from which an icon is present, and below which it is absent."""

RECOLOURED, BLURRED, ERASED = 0.5, 0.4, 0.45
"""Shares of icons to which each of these happens."""


def visible_area(icon: np.ndarray, left: np.ndarray) -> float:
    """Mean of min(1, 2r) over the pixels of `icon` with α > 0.5; both are RGBA `[h, w, 4]`.

    r is a pixel's α in `left` as a share of its α in `icon`.
    """
    solid = icon[..., 3] > 0.5
    return float(np.minimum(1, 2 * left[..., 3][solid] / icon[..., 3][solid]).mean())


def presence(area: float) -> float:
    """The label of an icon of that visible area: 1 present, 0 absent, NaN undecided."""
    if area >= THERE:
        return 1.0
    return 0.0 if area < GONE else math.nan


def recolour(rng: np.random.Generator, icon: np.ndarray) -> np.ndarray:
    """Turn the hue by up to 60°, scale the colours by 0.7 … 1.15, mix up to 40 % of another in."""
    turn = _hue_rotation(rng.uniform(-math.pi / 3, math.pi / 3))
    colour, alpha = icon[..., :3] @ turn.T * rng.uniform(0.7, 1.15), icon[..., 3:]
    colour += rng.uniform(0, 0.4) * (rng.uniform(0, 1, 3) * alpha - colour)
    return np.concatenate([colour.clip(0, alpha), alpha], axis=-1).astype(np.float32)


def _hue_rotation(angle: float) -> np.ndarray:
    """Rotation about the grey axis (1, 1, 1)/√3 by Rodrigues' formula, `[3, 3]`."""
    cross = np.array([[0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / math.sqrt(3)
    return math.cos(angle) * np.eye(3) + math.sin(angle) * cross + (1 - math.cos(angle)) / 3


def erase(rng: np.random.Generator, icon: np.ndarray) -> np.ndarray:
    """Cut off one side, take spots away, or let the whole icon fade, by a random amount."""
    height, width = icon.shape[:2]
    kind, amount = rng.integers(3), rng.uniform(0.1, 1)
    if kind == 0:
        kept = np.full((height, width), 1 - amount)
    else:
        if kind == 1:
            angle = rng.uniform(0, 2 * math.pi)
            y, x = np.mgrid[:height, :width]
            field = math.cos(angle) * x + math.sin(angle) * y
        else:
            field = gaussian_filter(rng.normal(size=(height, width)), rng.uniform(2, 5))
        bound = np.quantile(field[icon[..., 3] > 0.5], amount)
        kept = gaussian_filter((field >= bound).astype(np.float64), 0.7)
    return (icon * kept[..., None]).astype(np.float32)


def damage(rng: np.random.Generator, icon: np.ndarray) -> tuple[np.ndarray, float]:
    """An icon (premultiplied RGBA) with random damage, and the visible area that is left."""
    if rng.random() < RECOLOURED:
        icon = recolour(rng, icon)
    left = icon
    if rng.random() < ERASED:
        left = erase(rng, left)
    if rng.random() < BLURRED:
        sigma = rng.uniform(0.4, 1.4)
        left = gaussian_filter(left, (sigma, sigma, 0))
    return left, visible_area(icon, left)


def damaged_scene(scene: Scene) -> tuple[np.ndarray, np.ndarray]:
    """A scene with damaged icons: uint8 `[64, 64, 3]`, and `presence`, float32 `[len(THINGS)]`."""
    rng = np.random.default_rng([*scene.seed, 3])
    areas: list[float] = []

    def alter(icon: np.ndarray) -> np.ndarray:
        left, area = damage(rng, icon)
        areas.append(area)
        return left

    image, _ = compose(scene, alter)
    target = np.zeros(len(THINGS), dtype=np.float32)
    for thing, area in zip(scene.things, areas, strict=True):
        target[THINGS.index(thing)] = presence(area)
    return image, target
