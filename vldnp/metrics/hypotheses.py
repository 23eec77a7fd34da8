"""One-sided tests of a mean paired difference against a bound; the unit is the prompt."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from scipy import stats

from vldnp.metrics.intervals import Interval, tango_z

RESAMPLES = 9999
ALPHA = 0.05


class Evidence(NamedTuple):
    """What is known about a gain: a bound → the p-value for a mean above it, and below it."""

    above: Callable[[float], float]
    below: Callable[[float], float]


def mcnemar(better: np.ndarray, worse: np.ndarray) -> np.ndarray:
    """The exact p-value for more *better* pairs than *worse* ones (McNemar 1947), one-sided."""
    b, c = np.asarray(better), np.asarray(worse)
    return stats.binom.sf(b - 1, b + c, 0.5)


def sign_flip(differences: np.ndarray, resamples: int = RESAMPLES, seed: int = 0) -> float:
    """The p-value for a mean above 0 from turning prompts' signs at random (Fisher 1935).

    As `scipy.stats.permutation_test` with `samples`, in a twentieth of its time.
    """
    d = np.asarray(differences, dtype=float)
    if exact := len(d) < 64 and 2 ** len(d) <= resamples:
        bits = (np.arange(2 ** len(d))[:, None] >> np.arange(len(d))) & 1
    else:
        bits = np.random.default_rng(seed).integers(0, 2, (resamples, len(d)), dtype=np.int8)
    sums = bits.astype(float) @ (2 * d) - d.sum()
    as_far = (sums >= d.sum() - 1e-9 * np.abs(d).sum()).sum()
    return float(as_far / len(bits) if exact else (as_far + 1) / (resamples + 1))


def mean_above(differences: np.ndarray, bound: float, rare: bool = False) -> float:
    """Student's t-test for a mean above a bound, one-sided; one difference per prompt, n ≥ 1.

    For `rare`, differences of rates, the variance is no less than that of 1 in a share Δ of the
    prompts, |Δ| (1 − |Δ|): a sample without any of those looks certain.
    """
    d = np.asarray(differences, dtype=float)
    n, gap = len(d), d.mean() - bound
    variance = d.var(ddof=1) if n > 1 else 0.0
    if rare or variance == 0:
        variance = max(variance, abs(bound) * (1 - abs(bound)))
    if variance == 0 or n == 1:
        return 1.0
    return float(stats.t.sf(gap / np.sqrt(variance / n), n - 1))


def evidence(differences: np.ndarray, pairs: np.ndarray, rates: bool) -> Evidence:
    """The tests that suit each prompt's mean difference, of so many pairs, both `[n]`.

    A bound of 0: exact McNemar for rates (0 or 1) with one pair a prompt, else a sign-flip test.
    Another bound: Tango's score test for those rates, else a t-test over prompts.
    """
    d = np.asarray(differences, dtype=float)

    def above(bound: float, d: np.ndarray = d) -> float:
        if rates and (np.asarray(pairs) == 1).all():
            better, worse = (d > 0).sum(), (d < 0).sum()
            if bound == 0:
                return float(mcnemar(better, worse))
            return float(stats.norm.sf(tango_z(better, worse, len(d), bound)))
        return sign_flip(d) if bound == 0 else mean_above(d, bound, rates)

    return Evidence(above, lambda bound: above(-bound, -d))


def evidence_from(found: Interval, confidence: float = 0.95) -> Evidence:
    """Approximate tests from an estimate and its interval (Altman & Bland 2011, BMJ 343:d2304)."""
    z = stats.norm.ppf((1 + confidence) / 2)

    def above(bound: float, value: float = found.value, low: float = found.low) -> float:
        if value <= low:  # no spread: nothing is known about it
            return 1.0
        return float(stats.norm.sf((value - bound) / ((value - low) / z)))

    return Evidence(above, lambda bound: above(-bound, -found.value, -found.high))


def hypotheses(known: Evidence, margin: float = np.nan) -> dict[str, float]:
    """The p-values of all that can be said of a gain, for comparison with `ALPHA`.

    *superior* and *inferior* are two-sided; *non-inferior* (gain > −margin) is one-sided at α/2
    (ICH E9), so its p is doubled, as that of its contrary *beyond*; *equivalent* is two one-sided
    tests at α each (Schuirmann 1987), *different* its contrary. They are 1 without a margin.
    """
    above, below = known
    over, under, over_top, under_top = [1.0] * 4
    if not np.isnan(margin):
        over, under, over_top, under_top = (test(m) for m in (-margin, margin) for test in known)
    found = {"superior": 2 * above(0.0), "inferior": 2 * below(0.0)}
    found |= {"non-inferior": 2 * over, "beyond": 2 * under}
    found |= {"equivalent": max(over, under_top), "different": 2 * min(under, over_top)}
    return {name: min(p, 1.0) for name, p in found.items()}


def holm(p: np.ndarray) -> np.ndarray:
    """p-values corrected for the number of tests in their family (Holm 1979)."""
    p = np.asarray(p, dtype=float)
    order = np.argsort(p)
    stepped = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    return np.minimum(stepped, 1.0)[np.argsort(order)]
