"""The queries of a run: which images the VLM is asked about, and from when its answers count."""

from collections.abc import Collection, Sequence

from PIL import Image
from torch import Tensor

from vldnp._finite import naming
from vldnp.core.methods import Method
from vldnp.core.negatives import Negative
from vldnp.models.backbone import to_pil
from vldnp.models.run import Run


class Looking:
    """Looks at x̂₀ and keeps what was answered.

    Args:
        run: decodes, where the method has no preview decoder.
        method: its policy, preview, gate and lag.
        negatives: before the first query, one per image.
        query_steps: when to ask.
        x0_every: decode x̂₀ at every step.
        labels: the images in an error's words.
        cfg: what plain CFG goes on with, for a policy that is shown what it has `foreseen`: the
            conditioning of each step, g, and the generators.

    Attributes:
        latest: what the last answers made of the negatives, in force or not yet.
    """

    def __init__(
        self,
        run: Run,
        method: Method,
        negatives: Sequence[Negative],
        query_steps: Collection[int],
        x0_every: bool,
        labels: Sequence[str],
        cfg: tuple,
    ):
        self.run, self.method, self.labels = run, method, labels
        self.decoder = method.preview or run
        self.foreseen, self.cfg = getattr(method.negatives, "foreseen", None), cfg
        self.query_steps, self.x0_every = query_steps, x0_every
        self.latest, self.seen = list(negatives), [None] * len(negatives)
        self.due = {0: self.latest}

    def at(self, i: int, x0: Tensor, latents: Tensor) -> tuple[list[int], list[Image.Image | None]]:
        """The images that the VLM was asked about at step i, and the x̂₀ that were decoded."""
        everyone, gate = range(len(x0)), self.method.gate
        pictures: list[Image.Image | None] = [None] * len(x0)

        def shown(rows: Sequence[int]) -> list[Image.Image]:
            if new := [row for row in rows if pictures[row] is None]:
                with naming([self.labels[row] for row in new], f"at step {i}"):
                    decoded = to_pil(self.decoder.decode(x0[new]))
                for row, picture in zip(new, decoded, strict=True):
                    pictures[row] = picture
            return [pictures[row] for row in rows]

        if self.x0_every:
            shown(everyone)
        asked = list(everyone) if i in self.query_steps else []
        if asked and gate is not None:
            looks = gate.looks(x0, lambda: shown(everyone))
            asked = gate.moved(looks, self.seen)
        if asked:
            seen, before = shown(asked), [self.latest[row].at(i) for row in asked]
            if self.foreseen is not None:  # of all images: such a policy has no gate
                seen = self.foreseen(self.run, i, latents, *self.cfg)
            answered = self.method.negatives.updated(seen, before)
            self.latest = list(self.latest)
            for row, negative in zip(asked, answered, strict=True):
                self.latest[row] = negative
                if gate is not None and negative.failure is None:
                    self.seen[row] = looks[row]
            self.due[i + self.method.lag] = self.latest
        return asked, pictures

    def in_force(self, i: int) -> list[Negative]:
        """The negatives of step i: by the last answers that are `lag` steps old or older."""
        return self.due[max(step for step in self.due if step <= i)]
