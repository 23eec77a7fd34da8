"""Levers: options that spend less on an image, each off unless it is set on a `Method`."""

from dataclasses import asdict, dataclass

from vldnp._finite import is_finite


@dataclass(frozen=True)
class AdaptiveGuidance:
    """Adaptive Guidance (Castillo et al. 2023, arXiv 2312.12487): ε_u is dropped in late steps.

    An image that is steered away from nothing is guided by ε_u + g (ε_c − ε_u) until ε_u is no
    longer needed, and from then on by ε_c alone, for one evaluation a step. x̂₀ comes from the
    prediction of the step, so from ε_c where ε_u is dropped, at a query too. What the query finds
    needs ε_n − ε_u: from that step on both are evaluated and the image is guided by ε_cfg again,
    as long as it has a negative prompt. Whichever of the two criteria is met first decides.

    Attributes:
        start: the first step without ε_u, as a share i/N of the run (0.5) or a step index (25).
        cosine: γ̄ in −1..1; ε_u is dropped in the steps after the first in which
            γ_t = cos(ε_c, ε_u) ≥ γ̄, for good.
    """

    start: float | int | None = None
    cosine: float | None = None

    def __post_init__(self):
        share = isinstance(self.start, float)
        if self.start is not None and not (
            is_finite(self.start) and 0 <= self.start <= (1 if share else self.start)
        ):
            raise ValueError(
                f"start must be a share of the run in 0.0..1.0 or a step index, not {self.start!r}"
            )
        if self.cosine is not None and not (is_finite(self.cosine) and -1 <= self.cosine <= 1):
            raise ValueError(f"cosine must be a number in -1..1, not {self.cosine!r}")

    def has_started(self, i: int, num_inference_steps: int) -> bool:
        """Whether step i is one without ε_u."""
        if self.start is None:
            return False
        at = i / num_inference_steps if isinstance(self.start, float) else i
        return at >= self.start

    def describe(self) -> dict:
        return asdict(self)
