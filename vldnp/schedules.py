"""Query schedules: at which of the N denoising steps the VLM is asked.

A schedule is frozen data until it meets a number of steps: `schedule.steps(50)` gives the step
indices, ascending and distinct, in 0 … N−1.
"""

import operator
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

PAPER_STEPS = (5, 6, 7, 9, 12, 16, 21, 27, 34, 42)
"""𝒯 of arXiv 2510.26052, for 50 steps: from the second query on, the gap grows by one."""
PAPER_NUM_STEPS = 50


class Schedule(Protocol):
    """Anything that resolves to step indices."""

    def steps(self, num_inference_steps: int) -> tuple[int, ...]: ...

    def describe(self) -> dict | list: ...


@dataclass(frozen=True)
class FrontLoaded:
    """`n` queries spaced as in the paper: dense at first, the gaps growing. See `front_loaded`."""

    n: int

    def steps(self, num_inference_steps: int) -> tuple[int, ...]:
        _check_count(self, num_inference_steps)
        # Read the paper's curve at n evenly spaced places, so that every n is front-loaded.
        places = np.linspace(0, len(PAPER_STEPS) - 1, self.n)
        curve = np.interp(places, range(len(PAPER_STEPS)), PAPER_STEPS)
        wanted = np.floor(curve * num_inference_steps / PAPER_NUM_STEPS + 0.5).astype(int)
        return _distinct(wanted.tolist(), num_inference_steps)

    def describe(self) -> dict:
        return {"front_loaded": self.n}


@dataclass(frozen=True)
class Uniform:
    """`n` queries in the middles of n equal parts of the trajectory. See `uniform`."""

    n: int

    def steps(self, num_inference_steps: int) -> tuple[int, ...]:
        _check_count(self, num_inference_steps)
        return tuple((2 * k + 1) * num_inference_steps // (2 * self.n) for k in range(self.n))

    def describe(self) -> dict:
        return {"uniform": self.n}


@dataclass(frozen=True)
class Late:
    """`n` queries with the paper's spacing mirrored in time: dense at last. See `late`."""

    n: int

    def steps(self, num_inference_steps: int) -> tuple[int, ...]:
        early = FrontLoaded(self.n).steps(num_inference_steps)
        return tuple(num_inference_steps - 1 - step for step in reversed(early))

    def describe(self) -> dict:
        return {"late": self.n}


@dataclass(frozen=True)
class Explicit:
    """The given step indices."""

    indices: tuple[int, ...]

    def steps(self, num_inference_steps: int) -> tuple[int, ...]:
        outside = [i for i in self.indices if not 0 <= i < num_inference_steps]
        if outside:
            raise ValueError(
                f"query steps {outside} are outside the {num_inference_steps} denoising steps; "
                f"use 0 to {num_inference_steps - 1}"
            )
        return tuple(sorted(set(self.indices)))

    def describe(self) -> list:
        return list(self.indices)


def front_loaded(n: int) -> FrontLoaded:
    """The paper's spacing with `n` queries, scaled to any step count.

    `front_loaded(10).steps(50)` is exactly the paper's 5, 6, 7, 9, 12, 16, 21, 27, 34, 42; with
    fewer or more queries the first is still at a tenth and the last at 84 % of the trajectory.
    n = 0 asks never; n must not exceed the number of steps.
    """
    return FrontLoaded(_count(n, "front_loaded"))


def uniform(n: int) -> Uniform:
    """`n` evenly spread queries; n = 0 asks never; n must not exceed the number of steps."""
    return Uniform(_count(n, "uniform"))


def late(n: int) -> Late:
    """`front_loaded(n)` mirrored in time: the last query at nine tenths, the gaps shrinking."""
    return Late(_count(n, "late"))


SCHEDULES = {"front_loaded": front_loaded, "uniform": uniform, "late": late}
"""name → constructor from a number of queries."""


def as_schedule(query_steps: "Schedule | Iterable[int]") -> Schedule:
    """A schedule as it is; a sequence of step indices as an explicit one.

    Raises:
        ValueError: neither a schedule nor a sequence of whole numbers.
    """
    if hasattr(query_steps, "steps"):
        return query_steps
    try:
        return Explicit(tuple(operator.index(i) for i in query_steps))
    except TypeError:
        raise ValueError(
            f"query_steps must be a schedule such as front_loaded(5), or step indices such as "
            f"[2, 4, 8], not {query_steps!r}"
        ) from None


def _count(n: int, name: str) -> int:
    try:
        count = operator.index(n)
    except TypeError:
        count = -1
    if count < 0:
        raise ValueError(f"{name}({n!r}): the number of queries must be a whole number, 0 or more")
    return count


def _check_count(schedule: FrontLoaded | Uniform, num_inference_steps: int) -> None:
    if schedule.n > num_inference_steps:
        raise ValueError(
            f"{schedule.n} queries do not fit into {num_inference_steps} denoising steps; "
            f"use n ≤ {num_inference_steps}"
        )


def _distinct(wanted: list[int], num_inference_steps: int) -> tuple[int, ...]:
    """The nearest strictly ascending indices in range: later where two coincide, else earlier."""
    steps = wanted[:]
    for k in range(1, len(steps)):
        steps[k] = max(steps[k], steps[k - 1] + 1)
    for k in range(len(steps)):
        steps[k] = min(steps[k], num_inference_steps - len(steps) + k)
    return tuple(steps)
