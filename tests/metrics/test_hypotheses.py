"""The tests of differences against SciPy, statsmodels, and data simulated at the hypothesis."""

import numpy as np
import pytest
from scipy import stats
from statsmodels.stats.contingency_tables import mcnemar as statsmodels_mcnemar
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.weightstats import ttost_paired

from vldnp.metrics.hypotheses import ALPHA, Evidence, holm, hypotheses
from vldnp.metrics.intervals import tango_interval, tango_z

RNG = np.random.default_rng(20)


@pytest.mark.parametrize("better, worse", [(0, 0), (5, 0), (9, 3), (3, 9), (40, 22)])
def test_mcnemar_is_that_of_statsmodels(better, worse):
    theirs = statsmodels_mcnemar([[7, better], [worse, 11]], exact=True).pvalue
    differences = np.repeat([1.0, -1.0, 0.0], [better, worse, 18])
    ours = hypotheses(Evidence(differences, np.ones(len(differences)), rates=True))
    assert ours["superior" if better >= worse else "inferior"] == pytest.approx(theirs)
    assert min(ours.values()) == pytest.approx(theirs)


def test_holm_is_that_of_statsmodels():
    p = RNG.random(12) ** 3
    np.testing.assert_allclose(holm(p), multipletests(p, method="holm")[1])
    assert list(holm([])) == []


def test_signs_are_turned_as_if_all_were_counted():
    few = RNG.normal(0.3, 1, 10)
    signs = 1 - 2 * ((np.arange(1024)[:, None] >> np.arange(10)) & 1)
    counted = (signs @ few >= few.sum() - 1e-9).mean()
    assert Evidence(few, np.ones(10), rates=False).above(0) == pytest.approx(counted)
    assert Evidence(np.zeros(9), np.ones(9), rates=False).above(0) == 1
    many = RNG.normal(0.05, 1, 200)
    near = stats.ttest_1samp(many, 0, alternative="greater").pvalue
    assert Evidence(many, np.ones(200), rates=False).above(0) == pytest.approx(near, abs=0.015)


def test_margins_are_those_of_statsmodels_two_one_sided_tests():
    first, second = RNG.normal(0.5, 0.1, 50), RNG.normal(0.48, 0.1, 50)
    _, (_, above, _), (_, below, _) = ttost_paired(first, second, -0.05, 0.05)
    known = Evidence(first - second, np.ones(50), rates=False)
    assert known.above(-0.05) == pytest.approx(above)
    assert known.below(0.05) == pytest.approx(below)
    assert hypotheses(known, 0.05)["non-inferior"] == pytest.approx(2 * above)


def test_tango_against_his_formula_maximised_by_hand():
    """Tango's q̃ is where the multinomial likelihood of (b, c, n − b − c) is largest, given Δ."""
    b, c, n, bound = 9, 4, 44, 0.12
    q = np.linspace(1e-9, (1 - bound) / 2 - 1e-9, 400_001)
    likelihood = b * np.log(q + bound) + c * np.log(q) + (n - b - c) * np.log1p(-2 * q - bound)
    best = q[np.nanargmax(likelihood)]
    gap = b - c - n * bound
    corrected = np.sign(gap) * (abs(gap) - 0.5)
    assert tango_z(b, c, n, bound) == pytest.approx(
        corrected / np.sqrt(n * (2 * best + bound * (1 - bound))) if abs(gap) > 0.5 else 0, abs=1e-4
    )
    # Without a bound it is McNemar's statistic with the continuity correction.
    theirs = statsmodels_mcnemar([[0, 20], [9, 0]], exact=False, correction=True).statistic
    assert tango_z(20, 9, 50, 0.0) ** 2 == pytest.approx(theirs * ((11 - 0.5) / (11 - 1)) ** 2)


@pytest.mark.parametrize("better, worse, n", [(0, 0, 24), (5, 1, 24), (24, 0, 24), (60, 31, 640)])
def test_the_interval_holds_what_the_test_does_not_reject(better, worse, n):
    found = tango_interval(better, worse, n)
    assert found.value == (better - worse) / n
    assert -1 <= found.low <= found.value <= found.high <= 1
    for end, sign in ((found.low, 1), (found.high, -1)):
        if abs(end) < 1:
            assert sign * tango_z(better, worse, n, end) == pytest.approx(1.96, abs=1e-3)


def simulated(n, seeds, gain, rng):
    """Differences of unsafe rates by prompt: prompts differ, and the gain is true on average."""
    plain = rng.beta(0.6, 0.6, n) * (1 - abs(gain))
    first = rng.random((n, seeds)) < (plain + max(gain, 0))[:, None]
    second = rng.random((n, seeds)) < (plain + max(-gain, 0))[:, None]
    return (first.astype(float) - second).mean(axis=1)


@pytest.mark.parametrize("seeds", [1, 8])
@pytest.mark.parametrize("n", [24, 640])
def test_no_more_is_said_in_error_than_the_level(n, seeds, monkeypatch):
    """At a gain of 0 nothing is superior, at the margin nothing kept, but in α of the cases."""
    monkeypatch.setattr("vldnp.metrics.hypotheses.RESAMPLES", 499)
    draws, rng, margin = 400 if seeds == 1 else 100, np.random.default_rng(n + seeds), 0.05
    said = dict.fromkeys(("superior", "inferior", "non-inferior"), 0)
    for gain, asked in ((0.0, ("superior", "inferior")), (-margin, ("non-inferior",))):
        for _ in range(draws):
            known = Evidence(simulated(n, seeds, gain, rng), np.full(n, seeds), rates=True)
            found = hypotheses(known, margin) if gain else hypotheses(known)
            for name in asked:
                said[name] += found[name] <= ALPHA
    most = stats.binom.ppf(0.999, draws, 0.025)
    for name, count in said.items():
        assert count <= most, f"{name}: {count} of {draws} at n = {n}"


def test_what_is_true_is_found_with_640_prompts():
    rng = np.random.default_rng(3)
    for seeds in (1, 8):

        def known(gain, seeds=seeds):
            return Evidence(simulated(640, seeds, gain, rng), np.full(640, seeds), rates=True)

        assert hypotheses(known(0.15))["superior"] < 0.001
        assert hypotheses(known(-0.15), 0.05)["beyond"] < 0.05
        assert hypotheses(known(0.0), 0.1)["non-inferior"] < 0.05


@pytest.mark.parametrize("seeds", [1, 8])
def test_two_dozen_prompts_without_any_difference_show_nothing(seeds):
    """A change in one prompt of twenty goes unseen in 24 prompts with 29 %."""
    same = Evidence(np.zeros(24), np.full(24, seeds), rates=True)
    assert min(*hypotheses(same, 0.05).values(), *hypotheses(same).values()) > ALPHA
    many = Evidence(np.zeros(640), np.full(640, seeds), rates=True)
    assert hypotheses(many, 0.05)["non-inferior"] < 0.001
