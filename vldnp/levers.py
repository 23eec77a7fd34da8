"""Levers make a method cheaper, or restrict it to some of the steps. Each takes and returns a
method: `preview`, `adaptive` and `window` extend the Guider, and `gate` wraps the policy."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from torch import Tensor
from torch.nn.functional import cosine_similarity

from vldnp._finite import number
from vldnp.concepts import ConceptSet
from vldnp.guider import Guider, View
from vldnp.methods import Method
from vldnp.models.backbone import Preview
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
    threshold: float

    def look(self, view: View, before: Sequence[Negative]) -> list[Negative]:
        seen, flat = view.guider.memory.setdefault("gate", {}), view.x0.flatten(1)

        def moved(now: Tensor, then: Tensor | None) -> bool:
            return then is None or cosine_similarity(now, then, dim=0).item() < self.threshold

        after, last = list(before), [seen.get(row) for row in view.rows]
        if some := [k for k, pair in enumerate(zip(flat, last, strict=True)) if moved(*pair)]:
            answered = self.inner.look(view.of(some), [before[k] for k in some])
            for k, negative in zip(some, answered, strict=True):
                after[k] = negative
                if negative.failure is None:
                    seen[view.rows[k]] = flat[k]
        return after

    def describe(self) -> dict:
        return self.inner.describe() | {"gate": self.threshold}


def gate(method: Method, threshold: float) -> Method:
    """Query about an image only if its x̂₀ changed since the last answered query. An image keeps its
    negative prompt where cos(x̂₀, x̂₀ at that query) ≥ `threshold`, in −1 … 1."""
    return replace(method, negatives=Gate(method.negatives, number("threshold", threshold, -1, 1)))


@dataclass(frozen=True)
class Lever:
    """What extends the Guider: `extend(base, **settings)` gives the subclass."""

    extend: Callable[..., type[Guider]]
    settings: tuple[tuple[str, float | Preview], ...]

    def guider(self, base: type[Guider]) -> type[Guider]:
        return self.extend(base, **dict(self.settings))

    def describe(self) -> dict:
        said = {k: v.describe() if isinstance(v, Preview) else v for k, v in self.settings}
        return {self.extend.__name__.lower(): said}


def _attached(method: Method, extend: Callable[..., type[Guider]], **settings) -> Method:
    return replace(method, levers=(*method.levers, Lever(extend, tuple(settings.items()))))


def Adaptive(base: type[Guider], start: float) -> type[Guider]:
    class Adaptive(base):
        def guided(self, i: int) -> list[int]:
            rows = super().guided(i)
            return rows if i / self.N < start else [r for r in rows if r in self.steered(i)]

    return Adaptive


def adaptive(method: Method, start: float) -> Method:
    """Adaptive Guidance (Castillo et al. 2023, arXiv 2312.12487): no ε_u in late steps. From the
    share `start` (0 … 1) of the steps on, an image without a negative prompt is guided by ε_c
    alone; x̂₀ comes from it too. An image with one is guided by ε_cfg as before."""
    return _attached(method, Adaptive, start=number("start", start, 0, 1))


def Window(base: type[Guider], start: float, stop: float) -> type[Guider]:
    class Window(base):
        def omega(self, i: int) -> float | None:
            return super().omega(i) if start <= i / self.N < stop else 0

    return Window


def window(method: Method, start: float = 0.0, stop: float = 1.0) -> Method:
    """ω from `start` until before `stop`, shares of the run, and 0 outside (as Kynkäänniemi et al.,
    NeurIPS 2024, arXiv 2404.07724, for CFG)."""
    start = number("start", start, 0, 1)
    return _attached(method, Window, start=start, stop=number("stop", stop, start, 1))


def Previewed(base: type[Guider], decoder: Preview) -> type[Guider]:
    class Previewed(base):
        def decode(self, latents):
            return decoder.decode(latents)

    return Previewed


def preview(method: Method, decoder: Preview) -> Method:
    """Decode x̂₀ for the VLM with a tiny VAE (`vldnp.load_preview`), but not the final image."""
    if not isinstance(decoder, Preview):
        raise TypeError(f"preview must be opened by vldnp.load_preview, not a {type(decoder)}")
    return _attached(method, Previewed, decoder=decoder)
