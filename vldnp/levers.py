"""Levers: options that spend less on an image, each off unless it is set on a `Method`."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import torch
from PIL import Image
from torch import Tensor

from vldnp import guidance
from vldnp._finite import is_finite
from vldnp.models import vlm as vlms


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


@dataclass(frozen=True)
class Gate:
    """The VLM is asked about an image only if its x̂₀ moved since it was last asked about it.

    At a query step cos(x̂₀, x̂₀ at the last query that was answered) ≥ `threshold` leaves the
    image's negative prompt as it is: no call of the VLM, and of x̂₀ no picture. The first query is
    always made. EVLDNP compares CLIP embeddings of the pictures instead, with the threshold 0.95:
    `Gate(0.95, load_clip("moji-clip").embed_images)`, for which every picture is decoded.

    Attributes:
        threshold: in −1..1; above 1 no query would be skipped.
        embed: pictures (PIL, RGB) → `[B, D]`; None compares the latents x̂₀.
    """

    threshold: float
    embed: Callable[[Sequence[Image.Image]], Tensor] | None = None

    def __post_init__(self):
        if not (is_finite(self.threshold) and -1 <= self.threshold <= 1):
            raise ValueError(f"threshold must be a number in -1..1, not {self.threshold!r}")

    def looks(self, x0: Tensor, pictures: Callable[[], Sequence[Image.Image]]) -> Tensor:
        """What is compared, `[B, D]`: x̂₀, or the embeddings of its pictures."""
        if self.embed is None:
            return x0.flatten(1)
        return torch.as_tensor(self.embed(pictures())).to(x0.device)

    def moved(self, looks: Tensor, seen: Sequence[Tensor | None]) -> list[int]:
        """The images to ask about, given their looks when last asked; None: never yet."""
        return [
            row
            for row, (new, old) in enumerate(zip(looks, seen, strict=True))
            if old is None or guidance.cosine(new[None], old[None]).item() < self.threshold
        ]

    @property
    def embedder(self) -> Callable | None:
        """What records name of `embed`: the model that it is a method of, or itself."""
        owner = getattr(self.embed, "__self__", None)
        return owner if hasattr(owner, "name") else self.embed

    def describe(self) -> dict:
        named = {} if self.embed is None else {"embed": vlms.describe(self.embedder)}
        return {"threshold": self.threshold, **named}
