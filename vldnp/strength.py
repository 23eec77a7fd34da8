"""ω(t): schedules that multiply ω step by step. Where ω(t) is 0, no ε_n is evaluated.

A schedule is frozen data with `factor(progress, posterior)`, ω(t)/ω at progress i/N, and
`describe()`. One that follows the image has a `prior` besides, and `updated`; see `DNG`.
"""

from dataclasses import asdict, dataclass
from typing import Protocol

import torch
from torch import Tensor

from vldnp import guidance
from vldnp._finite import is_finite


class OmegaSchedule(Protocol):
    """Anything that says by how much ω is multiplied in a step."""

    def factor(self, progress: float, posterior: Tensor | None) -> float | Tensor:
        """ω(t)/ω ≥ 0: a number, or `[B, 1, 1, 1]` from a posterior of that shape."""

    def describe(self) -> dict: ...


@dataclass(frozen=True)
class Window:
    """ω from `start` until before `stop`, shares i/N of the run, and 0 outside.

    `Window(stop=0.5)` steers early only, `Window(start=0.5)` late only. Such windows for guidance
    itself: Kynkäänniemi et al., NeurIPS 2024, arXiv 2404.07724.
    """

    start: float = 0.0
    stop: float = 1.0

    def __post_init__(self):
        _check(self, 0, 1)

    def factor(self, progress: float, posterior: Tensor | None = None) -> float:
        return float(self.start <= progress < self.stop)

    def describe(self) -> dict:
        return {"kind": "window", **asdict(self)}


@dataclass(frozen=True)
class Linear:
    """ω times a + (b − a) i/N, from a = `first` at the first step towards b = `last`; both ≥ 0."""

    first: float
    last: float

    def __post_init__(self):
        _check(self, 0, float("inf"))

    def factor(self, progress: float, posterior: Tensor | None = None) -> float:
        return self.first + (self.last - self.first) * progress

    def describe(self) -> dict:
        return {"kind": "linear", **asdict(self)}


@dataclass(frozen=True)
class DNG:
    """Dynamic Negative Guidance (Koulischer et al., ICLR 2025, arXiv 2410.14398).

    ω(t) = ω p/(1 − p), where p is an estimate of the posterior p(c₋ | x_t) of the negative prompt,
    followed from step to step by `guidance.log_posterior`, from `prior` on whenever an image gets
    a negative prompt. Defaults are those of the authors' code, which ran 1,000 ancestral steps on
    CIFAR-10; other models and step counts need their own. Every step needs ε_n for the estimate.

    Attributes:
        prior: p where the negative prompt begins.
        temperature, offset: τ and δ of `guidance.log_posterior`.
        p_min, p_max: p is kept between them.
    """

    prior: float = 0.2
    temperature: float = 1.0
    offset: float = 0.0
    p_min: float = 1e-6
    p_max: float = 0.99

    def __post_init__(self):
        _check(self, 0, float("inf"))
        if not 0 < self.p_min <= self.prior <= self.p_max < 1:
            raise ValueError(
                "DNG needs 0 < p_min ≤ prior ≤ p_max < 1, not "
                f"{self.p_min!r}, {self.prior!r} and {self.p_max!r}"
            )

    def factor(self, progress: float, posterior: Tensor) -> Tensor:
        return posterior / (1 - posterior)

    def updated(
        self,
        posterior: Tensor,
        x0: Tensor,
        x0_neg: Tensor,
        x0_uncond: Tensor,
        snr: float,
        snr_next: float,
    ) -> Tensor:
        """p after a step, of the shape of `posterior`; see `guidance.log_posterior`."""
        log_p = guidance.log_posterior(
            posterior.log(), x0, x0_neg, x0_uncond, snr, snr_next, self.temperature, self.offset
        )
        return torch.exp(log_p).clamp(self.p_min, self.p_max)

    def describe(self) -> dict:
        return {"kind": "dng", **asdict(self)}


def _check(schedule: Window | Linear | DNG, least: float, most: float) -> None:
    for name, value in asdict(schedule).items():
        if not (is_finite(value) and least <= value <= most):
            raise ValueError(
                f"{type(schedule).__name__}'s {name} must be a number from {least} to {most}, "
                f"not {value!r}"
            )
