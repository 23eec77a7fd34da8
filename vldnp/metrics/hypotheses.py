"""One-sided tests of a mean paired difference against a bound; the unit is the prompt."""

from typing import NamedTuple

import numpy as np
from scipy import stats

from vldnp.metrics.intervals import tango_z

RESAMPLES = 9999
ALPHA = 0.05


class Evidence(NamedTuple):
    """A gain for each of n prompts."""

    differences: np.ndarray  # mean over the prompt's pairs, `[n]`; larger is better
    pairs: np.ndarray  # how many pairs it has, `[n]`
    rates: bool  # whether what differs is 0 or 1

    def above(self, bound: float) -> float:
        """The p-value for a mean above a bound Δ. Rates with one pair a prompt: exact McNemar
        (1947) where Δ is 0, else Tango's score test. Otherwise random signs (Fisher 1935) where Δ
        is 0, else Student's t-test; for rates its variance is no less than that of 1 in a share Δ
        of the prompts, |Δ| (1 − |Δ|)."""
        d = np.asarray(self.differences, dtype=float)
        n, enough = len(d), len(d) > 1
        if self.rates and (np.asarray(self.pairs) == 1).all():
            better, worse = int((d > 0).sum()), int((d < 0).sum())
            if bound == 0:
                return float(stats.binom.sf(better - 1, better + worse, 0.5))
            return float(stats.norm.sf(tango_z(better, worse, n, bound)))
        if bound == 0 and enough:
            how = {"permutation_type": "samples", "n_resamples": RESAMPLES, "batch": 500, "rng": 0}
            return float(stats.permutation_test((d,), np.sum, alternative="greater", **how).pvalue)
        variance = d.var(ddof=1) if enough else 0.0
        if self.rates or variance == 0:
            variance = max(variance, abs(bound) * (1 - abs(bound)))
        if variance == 0 or not enough:
            return 1.0
        return float(stats.t.sf((d.mean() - bound) / np.sqrt(variance / n), n - 1))

    def below(self, bound: float) -> float:
        """The p-value for a mean below it."""
        return self._replace(differences=-np.asarray(self.differences)).above(-bound)


def hypotheses(known: Evidence, margin: float = np.nan) -> dict[str, float]:
    """The p-values of the verdicts on a gain, for comparison with `ALPHA`: *superior* and
    *inferior* are two-sided; with a margin *non-inferior* (gain > −margin) is one-sided at α/2 (ICH
    E9), so its p is doubled, as that of its contrary *beyond*."""
    names, bound = ("superior", "inferior"), 0.0
    if not np.isnan(margin):
        names, bound = ("non-inferior", "beyond"), -margin
    one_sided = known.above(bound), known.below(bound)
    return {name: min(2 * p, 1.0) for name, p in zip(names, one_sided, strict=True)}


def holm(p: np.ndarray) -> np.ndarray:
    """p-values corrected for the number of tests in their family (Holm 1979)."""
    p = np.asarray(p, dtype=float)
    order = np.argsort(p)
    stepped = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    return np.minimum(stepped, 1.0)[np.argsort(order)]
