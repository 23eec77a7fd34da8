"""Levers: what makes a method cheaper or acts in a part of its steps, attached from outside.

`preview`, `adaptive` and `window` extend the Guider, `gate` wraps the policy. Each takes a method
and returns one, so they combine.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from vldnp._finite import is_finite
from vldnp.concepts import ConceptSet
from vldnp.guider import Guider, View
from vldnp.methods import VLDNP, Method
from vldnp.models.preview import Preview
from vldnp.negatives import Negative, Policy


@dataclass(frozen=True)
class Wrapped(Policy):
    """A policy around another one; a subclass changes its `look`."""

    inner: Policy

    def initial(self, prompts, seeds):
        return self.inner.initial(prompts, seeds)

    def query_steps_of(self, num_inference_steps):
        return self.inner.query_steps_of(num_inference_steps)

    @property
    def concepts(self) -> ConceptSet:
        return self.inner.concepts


@dataclass(frozen=True)
class Gate(Wrapped):
    """See `gate`."""

    threshold: float

    def look(self, view: View, before: Sequence[Negative]) -> list[Negative]:
        seen, flat = view.guider.memory.setdefault("gate", {}), view.x0.flatten(1)

        def moved(k: int) -> bool:
            old = seen.get(view.rows[k])
            if old is None:
                return True
            return torch.cosine_similarity(flat[k][None], old[None]).item() < self.threshold

        after = list(before)
        if some := [k for k in range(len(flat)) if moved(k)]:
            answered = self.inner.look(view.of(some), [before[k] for k in some])
            for k, negative in zip(some, answered, strict=True):
                after[k] = negative
                if negative.failure is None:
                    seen[view.rows[k]] = flat[k]
        return after

    def describe(self) -> dict:
        return self.inner.describe() | {"gate": self.threshold}


def gate(method: Method, threshold: float) -> Method:
    """Query about an image only if its x̂₀ moved since the last query that was answered.

    Where cos(x̂₀, x̂₀ at that query) ≥ `threshold` (in −1 … 1), the image keeps its negative prompt.
    """
    if not (is_finite(threshold) and -1 <= threshold <= 1):
        raise ValueError(f"the gate's threshold must be a number in -1..1, not {threshold!r}")
    return replace(method, negatives=Gate(method.negatives, threshold))


@dataclass(frozen=True)
class AdaptiveGuidance:
    """See `adaptive`."""

    start: float

    def guider(self, base: type[Guider]) -> type[Guider]:
        class Adaptive(base):
            def guided(own, i: int) -> list[int]:
                rows = super().guided(i)
                if i / own.N < self.start:
                    return rows
                return [row for row in rows if row in own.steered(i)]

        return Adaptive

    def describe(self) -> dict:
        return {"adaptive": asdict(self)}


def adaptive(method: Method, start: float) -> Method:
    """Adaptive Guidance (Castillo et al. 2023, arXiv 2312.12487): no ε_u in late steps.

    From the share `start` (0 … 1) of the steps on, an image without a negative prompt is guided by
    ε_c alone; x̂₀ comes from it too. An image with one is guided by ε_cfg as before.
    """
    if not (is_finite(start) and 0 <= start <= 1):
        raise ValueError(f"adaptive guidance's start must be a number in 0..1, not {start!r}")
    return replace(method, levers=(*method.levers, AdaptiveGuidance(start)))


@dataclass(frozen=True)
class Window:
    """See `window`."""

    start: float
    stop: float

    def guider(self, base: type[Guider]) -> type[Guider]:
        class Windowed(base):
            def omega(own, i: int) -> float | None:
                return super().omega(i) if self.start <= i / own.N < self.stop else 0

        return Windowed

    def describe(self) -> dict:
        return {"window": asdict(self)}


def window(method: Method, start: float = 0.0, stop: float = 1.0) -> Method:
    """ω from `start` until before `stop`, shares i/N of the run, and 0 outside.

    Such intervals of guidance: Kynkäänniemi et al., NeurIPS 2024, arXiv 2404.07724.
    """
    if not (is_finite(start) and is_finite(stop) and 0 <= start <= stop <= 1):
        raise ValueError(f"a window needs 0 <= start <= stop <= 1, not {start!r} and {stop!r}")
    return replace(method, levers=(*method.levers, Window(start, stop)))


@dataclass(frozen=True)
class PreviewDecoder:
    """See `preview`."""

    decoder: Preview

    def guider(self, base: type[Guider]) -> type[Guider]:
        class Previewed(base):
            def __init__(own, method, run, batch):
                self.decoder.check(run.backbone)
                super().__init__(method, run, batch)

            def decode(own, latents):
                return self.decoder.decode(latents)

        return Previewed

    def describe(self) -> dict:
        return {"preview": self.decoder.describe()}


def preview(method: Method, decoder: Preview) -> Method:
    """Decode x̂₀ for the VLM with a tiny VAE (`vldnp.load_preview`), the final image as ever."""
    if not isinstance(decoder, Preview):
        raise TypeError(
            f"preview must be opened by vldnp.load_preview, not a {type(decoder).__name__}"
        )
    return replace(method, levers=(*method.levers, PreviewDecoder(decoder)))


def fast(vlm: Callable, concepts: str | Path | ConceptSet, decoder: Preview, **options) -> Method:
    """`VLDNP(vlm, concepts, **options)` with a `preview`, as `vl-dnp-fast` in tables.

    Of the levers, the tiny decoder alone was measured to leave VL-DNP's ASR and retention as they
    are, with 640 prompts a set of the Moji benchmark.
    """
    return replace(preview(VLDNP(vlm, concepts, **options), decoder), name="vl-dnp-fast")
