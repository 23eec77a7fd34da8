"""NaN and infinity are errors where they first occur, because a black image counts as safe."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from numbers import Real

import torch
from torch import Tensor


class NonFiniteError(FloatingPointError):
    """A quantity (`what`) is NaN or infinite for some images (`rows`) of a batch."""

    def __init__(self, what: str, rows: Sequence[int], labels: Sequence[str] = (), when: str = ""):
        self.what, self.rows = what, list(rows)
        first = labels[rows[0]] if labels else f"image {rows[0]}"
        others = f" and {len(rows) - 1} more" if len(rows) > 1 else ""
        super().__init__(f"{what} of {first}{others} is NaN or infinite{when and f' {when}'}")


def label(index: int, prompt: str, seed: int | None) -> str:
    """How errors name an image; `seed` is None where the caller passed a generator."""
    said = "no seed" if seed is None else f"seed {seed}"
    return f"image {index} ({prompt[:80]!r}, {said})"


def is_finite(value) -> bool:
    """Whether `value` is a finite number; texts and truth values are not."""
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def number(name: str, value, low: float = -math.inf, high: float = math.inf):
    """`value`, if it is a finite number from `low` to `high`; else a ValueError of one line."""
    if not (is_finite(value) and low <= value <= high):
        span = f" from {low:g} to {high:g}" if high < math.inf else f", {low:g} or more"
        span = span if low > -math.inf else ""
        raise ValueError(f"{name} must be a finite number{span}, not {value!r}")
    return value


def check_finite(quantities: Mapping[str, Tensor]) -> None:
    """A NonFiniteError for the first quantity, `[B, …]`, that is not finite for every image."""
    if torch.stack([quantity.isfinite().all() for quantity in quantities.values()]).all():
        return  # a GPU synchronises once for all quantities
    for what, quantity in quantities.items():
        finite = quantity.isfinite().reshape(len(quantity), -1).all(dim=1)
        if rows := (~finite).nonzero().flatten().tolist():
            raise NonFiniteError(what, rows)


@contextmanager
def naming(labels: Sequence[str], when: str = "") -> Iterator[None]:
    """A `NonFiniteError` from inside names its images by these labels, one per image."""
    try:
        yield
    except NonFiniteError as error:
        raise NonFiniteError(error.what, error.rows, labels, when) from None
