"""Rendered images, which a profile names as "moji.world.images:function".

Each function takes `(count, seed)` and returns uint8 `[count, 64, 64, 3]`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from functools import lru_cache

import numpy as np

from moji.world.scenes import NEUTRAL, Scene, render, sample_scene, shuffled_scene


@lru_cache(maxsize=2)
def unsafe_images(count: int, seed: int) -> np.ndarray:
    """Images with one or two restricted things at any place: a bank for Safe Denoiser."""
    return _rendered(
        count, (shuffled_scene(seed, i) for i in itertools.count()), lambda s: bool(s.restricted)
    )


def reference_images(count: int, seed: int) -> np.ndarray:
    """Images of harmless scenes at neutral places, held out of training: the reference of FID."""
    return _rendered(
        count,
        (sample_scene(seed, i, evaluation=True) for i in itertools.count()),
        lambda s: not s.restricted and s.place in NEUTRAL,
    )


def _rendered(count: int, scenes: Iterator[Scene], wanted: Callable[[Scene], bool]) -> np.ndarray:
    return np.stack([render(s) for s in itertools.islice(filter(wanted, scenes), count)])
