"""Controls: which part of VL-DNP's effect comes from the VLM's detections. `AnswersNone` and
`Judged` are VLMs; `random_concepts` and `closed_loop` wrap a method's policy."""

import copy
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vldnp import guidance
from vldnp.guider import View
from vldnp.levers import Wrapped
from vldnp.methods import Method
from vldnp.models.judges import FOUND, Judge, check_threshold
from vldnp.negatives import Negative


@dataclass(frozen=True)
class AnswersNone:
    """A VLM that always answers "none": VL-DNP with it is CFG, bit for bit."""

    name, revision = "answers-none", "1"

    def __call__(self, images: Sequence[Image.Image], question: str) -> list[str]:
        return ["none"] * len(images)


@dataclass(frozen=True)
class Judged:
    """A VLM that names what a judge finds in the image, from the probability `threshold` on."""

    judge: Judge
    threshold: float = FOUND

    def __call__(self, images: Sequence[Image.Image], question: str) -> list[str]:
        found = self.judge(images).found(check_threshold(self.judge, self.threshold))
        return [", ".join(terms) or "none" for terms in found]

    def describe(self) -> dict:
        own = {"name": f"judged by {self.judge.name}", "revision": self.judge.revision}
        return own | {"threshold": self.threshold}


@dataclass(frozen=True)
class RandomConcepts(Wrapped):
    seed: int = 0

    def look(self, view, before):
        after, vocabulary = self.inner.look(view, before), list(self.concepts.vocabulary)
        batch = view.guider.batch
        for k, row in enumerate(view.rows):
            if (new := after[k]) is not before[k] and new.failure is None:
                rng = image_rng(self.seed, batch.prompts[row], batch.seeds[row])
                order = rng.permutation(vocabulary).tolist()
                others = [term for term in order if term not in new.concepts]
                terms = tuple(t for t in vocabulary if t in others[: len(new.concepts)])
                prompt = self.concepts.negative_prompt(terms)
                after[k] = Negative(prompt, terms, new.answer, (0,) * len(terms))
        return after

    def describe(self) -> dict:
        return {"kind": "random-concepts", "seed": self.seed, "policy": self.inner.describe()}


def random_concepts(method: Method, seed: int = 0) -> Method:
    """Replace the terms that the VLM found by as many other terms: the method steers after the
    same queries, away from as many wrong things."""
    return replace(method, negatives=RandomConcepts(method.negatives, seed))


@torch.no_grad()
def rolled_out(view: View) -> Tensor:
    """The end of CFG from x_t on: clean latents `[k, C, h, w]`. The run does not change."""
    own, i, rows = view.guider, view.index, view.rows
    ahead, latents, null = copy.copy(own.run), view.latents, own.null[rows]
    ahead.scheduler = copy.deepcopy(own.run.scheduler)
    generators = [own.batch.generators[row].clone_state() for row in rows]
    for j, t in enumerate(own.run.timesteps[i:], start=i):
        both = ahead.predict(torch.cat([latents, latents]), t, null + own.prompted(j)[rows])
        latents = ahead.step(guidance.cfg(*both.chunk(2), own.g[rows]), t, latents, generators)
    return latents


@dataclass(frozen=True)
class ClosedLoop(Wrapped):
    def look(self, view, before):
        return self.inner.look(replace(view, x0=rolled_out(view), decoded={}), before)

    def describe(self) -> dict:
        return {"kind": "closed loop", "policy": self.inner.describe()}


def closed_loop(method: Method) -> Method:
    """Query the VLM about the image at which CFG would end from x_t, in place of x̂₀. With `Judged`
    this is an upper bound for VLMs. The evaluations ahead are not counted."""
    return replace(method, negatives=ClosedLoop(method.negatives))


def image_rng(seed: int, prompt: str, image_seed: int | None) -> np.random.Generator:
    if image_seed is None:
        raise ValueError("a random control needs seeds; call sample with seeds=")
    digest = hashlib.sha256(f"{image_seed} {prompt}".encode()).digest()
    return np.random.default_rng([seed, *digest[:8]])
