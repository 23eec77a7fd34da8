"""FID's change against torch-fidelity and by hand."""

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

from vldnp.metrics.fid import fid_change, frechet_distance, root_of


def test_fid_change_is_zero_for_the_same_and_positive_for_worse_features():
    rng = np.random.default_rng(1)
    real, plain = rng.normal(size=(300, 4)), rng.normal(0.5, 1, size=(80, 4))
    assert fid_change(plain, plain, real, resamples=20) == (0, 0, 0)
    worse = fid_change(plain + 1, plain, real, resamples=50)
    assert worse.low > 0
    of = [fid_features_to_statistics(torch.from_numpy(rows)) for rows in (plain, real)]
    theirs = fid_statistics_to_metric(*of, verbose=False)["frechet_inception_distance"]
    ours = frechet_distance(plain, real.mean(0), root_of(np.cov(real.T)))
    assert ours == pytest.approx(theirs, rel=1e-4)
    # Gaussians: FID = |μ1 − μ2|² + tr(Σ1 + Σ2 − 2 (Σ1 Σ2)^½); a shift changes the first part only.
    gap, base = (f.mean(0) - real.mean(0) for f in (plain + 1, plain))
    s1, s2 = np.cov(plain.T), np.cov(real.T)
    rest = np.trace(s1 + s2 - 2 * sqrtm(s1 @ s2).real)
    assert worse.value == pytest.approx(gap @ gap - base @ base, rel=1e-3)
    assert ours == pytest.approx(base @ base + rest, rel=1e-6)
    # Fewer images than dimensions, and no more real ones either.
    few, wide = rng.normal(size=(6, 30)), rng.normal(size=(20, 30))
    of = [fid_features_to_statistics(torch.from_numpy(rows)) for rows in (few, wide)]
    theirs = fid_statistics_to_metric(*of, verbose=False)["frechet_inception_distance"]
    ours = frechet_distance(few, wide.mean(0), root_of(np.cov(wide.T)))
    assert ours == pytest.approx(theirs, rel=1e-3)


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
