"""Query schedules: at which of the N denoising steps the VLM is queried."""

import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from vldnp._files import unknown

PAPER_STEPS = (5, 6, 7, 9, 12, 16, 21, 27, 34, 42)
"""𝒯 of arXiv 2510.26052, for 50 steps: from the second query on, the gap grows by one."""


def _front_loaded(n: int, N: int) -> list[int]:
    # The paper's curve at n evenly spaced points, so that every n is front-loaded.
    points = np.linspace(0, len(PAPER_STEPS) - 1, n)
    curve = np.interp(points, range(len(PAPER_STEPS)), PAPER_STEPS)
    steps = np.floor(curve * N / 50 + 0.5).astype(int).tolist()
    for k in range(1, n):  # distinct: later where two coincide
        steps[k] = max(steps[k], steps[k - 1] + 1)
    return [min(step, N - n + k) for k, step in enumerate(steps)]  # and all within N


def _uniform(n: int, N: int) -> list[int]:
    return [(2 * k + 1) * N // (2 * n) for k in range(n)]


def _late(n: int, N: int) -> list[int]:
    return [N - 1 - step for step in reversed(_front_loaded(n, N))]


SPACINGS = {"front_loaded": _front_loaded, "uniform": _uniform, "late": _late}
"""name → (n queries, N steps) → step indices."""


@dataclass(frozen=True)
class Schedule:
    """`n` queries by a spacing of `SPACINGS`, or the given step `indices`."""

    spacing: str = ""
    n: int = 0
    indices: tuple[int, ...] = ()

    def steps(self, num_inference_steps: int) -> tuple[int, ...]:
        """The step indices, ascending and distinct, in 0 … N−1.

        Raises:
            ValueError: they do not fit into N steps.
        """
        N = num_inference_steps
        if self.spacing:
            if self.n > N:
                raise ValueError(
                    f"{self.n} queries do not fit into {N} denoising steps; use n ≤ {N}"
                )
            return tuple(SPACINGS[self.spacing](self.n, N))
        if outside := [i for i in self.indices if not 0 <= i < N]:
            raise ValueError(
                f"query steps {outside} are outside the {N} denoising steps; use 0 to {N - 1}"
            )
        return tuple(sorted(set(self.indices)))

    def describe(self) -> dict | list:
        return {self.spacing: self.n} if self.spacing else list(self.indices)


def schedule(spacing: str, n: int) -> Schedule:
    """`n` ≥ 0 queries by name of the spacing; n must not exceed the number of steps."""
    if spacing not in SPACINGS:
        raise unknown("query schedule", spacing, SPACINGS)
    if type(n) is bool or not isinstance(n, int | np.integer) or n < 0:
        raise ValueError(f"{spacing}({n!r}): the number of queries must be a whole number, 0 or up")
    return Schedule(spacing, int(n))


def front_loaded(n: int) -> Schedule:
    """The paper's spacing: `front_loaded(10).steps(50)` is `PAPER_STEPS`."""
    return schedule("front_loaded", n)


def uniform(n: int) -> Schedule:
    """Queries in the middles of n equal parts of the trajectory."""
    return schedule("uniform", n)


def late(n: int) -> Schedule:
    """`front_loaded(n)` mirrored in time."""
    return schedule("late", n)


def as_schedule(query_steps: Schedule | Mapping[str, int] | Iterable[int]) -> Schedule:
    """A schedule as it is; step indices, or a mapping of one spacing to a count, as a schedule.

    Raises:
        ValueError: it is none of these.
    """
    if isinstance(query_steps, Schedule):
        return query_steps
    if isinstance(query_steps, Mapping) and len(query_steps) == 1:
        return schedule(*next(iter(query_steps.items())))
    try:
        return Schedule(indices=tuple(operator.index(i) for i in query_steps))
    except TypeError:
        raise ValueError(
            f"query_steps must be a schedule such as front_loaded(5), or step indices such as "
            f"[2, 4, 8], not {query_steps!r}"
        ) from None
