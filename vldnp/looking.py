"""The queries of a run: which images the VLM is asked about, and from when its answers count."""

from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

from vldnp._finite import naming
from vldnp.methods import Method
from vldnp.models.backbone import to_pil
from vldnp.models.run import Run
from vldnp.negatives import Negative


class Said(NamedTuple):
    """The VLM's answers at a step and why it failed to answer, one per image; None where not."""

    answers: list[str | None]
    failures: list[str | None]


class Looking:
    """Looks at x̂₀ and keeps what was answered.

    With a lag the VLM is asked in a thread of its own, one query after the other, while the
    denoising goes on; in the step in which an answer is due it is waited for. So the pictures do
    not depend on who is quicker.

    Args:
        run: decodes, where the method has no preview decoder.
        method: its policy, preview, gate and lag.
        negatives: before the first query, one per image.
        query_steps: when to ask.
        x0_every: decode x̂₀ at every step.
        labels: the images in an error's words.
        cfg: what plain CFG goes on with, for a policy that is shown what it has `foreseen`: the
            conditioning of each step, g, and the generators.
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
        self.due: dict[int, Callable[[], list[Negative]]] = {0: partial(list, negatives)}
        self.start = _beside() if method.lag else _at_once

    def at(
        self, i: int, x0: Tensor, latents: Tensor
    ) -> tuple[list[int], list[Image.Image | None], Said | None]:
        """The images that the VLM is asked about at step i, the x̂₀ that were decoded, and what is
        said; None where nobody is asked.
        """
        everyone, gate, looks = range(len(x0)), self.method.gate, None
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
            self.in_force(max(self.due))  # only what was answered counts as seen
            looks = gate.looks(x0, lambda: shown(everyone))
            asked = gate.moved(looks, self.seen)
        if not asked:
            return asked, pictures, None
        seen, said = shown(asked), Said([None] * len(x0), [None] * len(x0))
        if self.foreseen is not None:  # of all images: such a policy has no gate
            seen = self.foreseen(self.run, i, latents, *self.cfg)
        self.due[i + self.method.lag] = self.start(partial(self._ask, i, asked, seen, looks, said))
        return asked, pictures, said

    def _ask(
        self,
        i: int,
        asked: Sequence[int],
        seen: Sequence[Image.Image],
        looks: Sequence | None,
        said: Said,
    ) -> list[Negative]:
        """What the answers make of the negatives; `said` is filled in."""
        latest = list(self.latest)
        answered = self.method.negatives.updated(seen, [latest[row].at(i) for row in asked])
        for row, negative in zip(asked, answered, strict=True):
            latest[row] = negative
            said.answers[row], said.failures[row] = negative.answer, negative.failure
            if looks is not None and negative.failure is None:
                self.seen[row] = looks[row]
        self.latest = latest
        return latest

    def in_force(self, i: int) -> list[Negative]:
        """The negatives of step i: by the last answers that are `lag` steps old or older."""
        return self.due[max(step for step in self.due if step <= i)]()


def _at_once(work: Callable) -> Callable:
    """What gives the result of `work`, which is done now."""
    result = work()
    return lambda: result


def _beside() -> Callable:
    """`_at_once` for what is done in a thread, where the result is waited for when it is asked for.

    The thread ends with the function that is returned here.
    """
    thread = ThreadPoolExecutor(1, "vldnp-vlm")
    # Each thread has its own switch for gradients.
    return lambda work: thread.submit(torch.no_grad()(work)).result
