"""FID's change by hand, and its interval."""

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm

from moji.study import fid


def fid_change(own, plain, real, *prompts, **options):
    return fid.fid_change(*map(torch.from_numpy, (own, plain, real)), *prompts, **options)


def test_fid_change_is_zero_for_the_same_and_positive_for_worse_features():
    rng = np.random.default_rng(1)
    real, plain = rng.normal(size=(300, 4)), rng.normal(0.5, 1, size=(80, 4))
    assert fid_change(plain, plain, real, resamples=20) == (0, 0, 0)
    worse = fid_change(plain + 1, plain, real, resamples=50)
    assert worse.low > 0
    # Gaussians: FID = |μ1 − μ2|² + tr(Σ1 + Σ2 − 2 (Σ1 Σ2)^½); a shift changes the first part only.
    gap, base = (f.mean(0) - real.mean(0) for f in (plain + 1, plain))
    assert worse.value == pytest.approx(gap @ gap - base @ base, rel=1e-3)
    wider = fid_change(plain * 2, plain, real, resamples=20)
    s2, sides = np.cov(real.T), []
    for side in (plain * 2, plain):
        s1, gap = np.cov(side.T), side.mean(0) - real.mean(0)
        sides.append(gap @ gap + np.trace(s1 + s2 - 2 * sqrtm(s1 @ s2).real))
    assert wider.value == pytest.approx(sides[0] - sides[1], rel=1e-6)


def test_fid_changes_interval_is_over_prompts():
    """Images of one prompt that are all alike count once, not once each."""
    rng = np.random.default_rng(2)
    real, plain = rng.normal(size=(200, 3)), rng.normal(size=(60, 3))
    worse = plain + rng.normal(0.3, 0.5, size=plain.shape)
    once = fid_change(worse, plain, real, resamples=100)
    copied = [np.repeat(rows, 4, axis=0) for rows in (worse, plain)]
    prompts = np.repeat(np.arange(60), 4)
    by_prompt = fid_change(*copied, real, prompts, resamples=100)
    by_image = fid_change(*copied, real, resamples=100)
    width = once.high - once.low
    assert by_prompt.high - by_prompt.low == pytest.approx(width, rel=0.1)
    assert by_image.high - by_image.low < 0.7 * width
