"""Query schedules: at which of the N denoising steps the VLM is queried."""

import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from vldnp._files import unknown

PAPER_STEPS = (5, 6, 7, 9, 12, 16, 21, 27, 34, 42)
"""𝒯 of arXiv 2510.26052, for 50 steps: from the second query on, the gap grows by one."""


def _front_loaded(n: int, N: int) -> list[int]:
    """The paper's curve at n evenly spaced points, made distinct and kept within N."""
    points = np.linspace(0, len(PAPER_STEPS) - 1, n)
    curve = np.interp(points, range(len(PAPER_STEPS)), PAPER_STEPS)
    steps = np.floor(curve * N / 50 + 0.5).astype(int).tolist()
    for k in range(1, n):
        steps[k] = max(steps[k], steps[k - 1] + 1)
    return [min(step, N - n + k) for k, step in enumerate(steps)]


SPACINGS = {
    "front_loaded": _front_loaded,
    "uniform": lambda n, N: [(2 * k + 1) * N // (2 * n) for k in range(n)],
    "late": lambda n, N: [N - 1 - step for step in reversed(_front_loaded(n, N))],
}
"""name → (n queries, N steps) → step indices; `late` is `front_loaded` mirrored in time."""


@dataclass(frozen=True)
class Schedule:
    """`n` queries by a spacing of `SPACINGS`, or the given step `indices`."""

    spacing: str = ""
    n: int = 0
    indices: tuple[int, ...] = ()

    def steps(self, N: int) -> tuple[int, ...]:
        """The step indices, ascending and distinct, in 0 … N−1; a ValueError if they don't fit."""
        if self.spacing and self.n > N:
            raise ValueError(f"{self.n} queries do not fit into {N} denoising steps; use n ≤ {N}")
        if outside := [i for i in self.indices if not 0 <= i < N]:
            said = f"outside the {N} denoising steps; use 0 to {N - 1}"
            raise ValueError(f"query steps {outside} are {said}")
        return tuple(SPACINGS[self.spacing](self.n, N) if self.spacing else sorted(self.indices))

    def describe(self) -> dict | list:
        return {self.spacing: self.n} if self.spacing else list(self.indices)


def front_loaded(n: int) -> Schedule:
    """The paper's spacing: `front_loaded(10).steps(50)` is `PAPER_STEPS`."""
    return as_schedule({"front_loaded": n})


def uniform(n: int) -> Schedule:
    """Queries in the middles of n equal parts of the trajectory."""
    return as_schedule({"uniform": n})


def as_schedule(query_steps: Schedule | Mapping[str, int] | Iterable[int]) -> Schedule:
    """A schedule as it is; `{spacing: n}` with n ≥ 0, or step indices; else a ValueError."""
    if isinstance(query_steps, Schedule):
        return query_steps
    try:
        if not isinstance(query_steps, Mapping):
            return Schedule(indices=tuple(dict.fromkeys(map(operator.index, query_steps))))
        ((spacing, n),) = query_steps.items()
        if spacing in SPACINGS and type(n) is not bool and operator.index(n) >= 0:
            return Schedule(spacing, operator.index(n))
    except (TypeError, ValueError):
        pass
    else:
        if spacing not in SPACINGS:
            raise unknown("query schedule", spacing, SPACINGS)
    known = "front_loaded(n) or uniform(n) with n ≥ 0, or step indices such as [2, 4, 8]"
    raise ValueError(f"query_steps must be {known}, not {query_steps!r}")
