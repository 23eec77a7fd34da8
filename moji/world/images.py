"""Rendered images, which a profile names as "moji.world.images:function".

Each function takes `(count, seed)` and returns uint8 `[count, 64, 64, 3]`.
"""

from __future__ import annotations

import itertools

import numpy as np

from moji.world.scenes import NEUTRAL, render, sample_scene


def reference_images(count: int, seed: int) -> np.ndarray:
    """Images of harmless scenes at neutral places, held out of training: the reference of FID."""
    scenes = (sample_scene(seed, i, evaluation=True) for i in itertools.count())
    wanted = (s for s in scenes if not s.restricted and s.place in NEUTRAL)
    return np.stack([render(s) for s in itertools.islice(wanted, count)])
