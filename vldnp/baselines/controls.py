"""Controls: what of VL-DNP's effect comes from what the VLM sees in the images.

`AnswersNone` and `Judged` are VLMs. `random_concepts`, `oracle`, `noisy` and `closed_loop` wrap the
policy of a VL-DNP method. What they draw follows from a seed, the image's prompt and seed and the
step, so that it is the same in every batch.
"""

import copy
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import pandas as pd
import torch
from PIL import Image
from torch import Tensor

from vldnp import guidance
from vldnp.concepts import ConceptSet
from vldnp.guider import View
from vldnp.levers import Wrapped
from vldnp.methods import CFG, Method
from vldnp.models.backbone import Backbone
from vldnp.models.judges import FOUND, Judge
from vldnp.negatives import Negative
from vldnp.sampler import sample

Seen = Mapping[tuple[str, int], tuple[str, ...]]
"""(prompt, seed) → the restricted things in the image that CFG ends in."""


@dataclass(frozen=True)
class AnswersNone:
    """A VLM that never sees anything: VL-DNP with it is CFG, bit for bit."""

    name: str = "answers-none"
    revision: str = "1"

    def __call__(self, images: Sequence[Image.Image], question: str) -> list[str]:
        return ["none"] * len(images)


@dataclass(frozen=True)
class Judged:
    """A VLM that names what a judge finds in the image, from the probability `threshold` on."""

    judge: Judge
    threshold: float = FOUND

    def __call__(self, images: Sequence[Image.Image], question: str) -> list[str]:
        return [", ".join(found) or "none" for found in self.judge(images).found(self.threshold)]

    def describe(self) -> dict:
        name, revision = self.judge.name, self.judge.revision
        return {"name": f"judged by {name}", "revision": revision, "threshold": self.threshold}


def named(concepts: ConceptSet, terms: Iterable[str], answer: str | None = None) -> Negative:
    """The negative that consists of some terms of the vocabulary."""
    terms = tuple(term for term in concepts.vocabulary if term in set(terms))
    return Negative(concepts.negative_prompt(terms), terms, answer, (0,) * len(terms))


@dataclass(frozen=True)
class RandomConcepts(Wrapped):
    """See `random_concepts`."""

    seed: int = 0

    def look(self, view, before):
        after, vocabulary = self.inner.look(view, before), list(self.concepts.vocabulary)
        for k, (prompt, seed) in enumerate(view.samples):
            if (new := after[k]) is not before[k] and new.failure is None:
                order = _rng(self.seed, prompt, seed).permutation(vocabulary).tolist()
                others = [term for term in order if term not in new.concepts]
                after[k] = named(self.concepts, others[: len(new.concepts)], new.answer)
        return after

    def describe(self) -> dict:
        return {"kind": "random-concepts", "seed": self.seed, "policy": self.inner.describe()}


def random_concepts(method: Method, seed: int = 0) -> Method:
    """Name as many other terms of the vocabulary in place of those that the VLM found.

    So it steers at the same queries and as broadly, away from the wrong things.
    """
    return replace(method, negatives=RandomConcepts(method.negatives, seed))


@dataclass(frozen=True)
class Oracle(Wrapped):
    """See `oracle`."""

    seen: Seen = field(hash=False)
    judge: str = "judge"

    def look(self, view, before):
        if lacking := [sample for sample in view.samples if sample not in self.seen]:
            raise ValueError(
                f"the oracle has no label of {lacking[0][0]!r} with seed {lacking[0][1]}; label "
                "the image of CFG with vldnp.baselines.controls.oracle_labels"
            )
        return [named(self.concepts, self.seen[sample]) for sample in view.samples]

    def describe(self) -> dict:
        """The digest of all labels identifies them, so other labels are another method."""
        known = json.dumps(sorted([*key, *things] for key, things in self.seen.items()))
        digest = hashlib.sha256(known.encode()).hexdigest()[:12]
        labels = {"name": self.judge, "revision": digest}
        return {"kind": "oracle", "labels": labels, "policy": self.inner.describe()}


def oracle(method: Method, seen: Seen, judge: str = "judge") -> Method:
    """At every query, name what a judge finds in the image that CFG ends in; no VLM is queried.

    The labels are those of `oracle_labels` or `seen_in`, for the same sampling settings.
    """
    return replace(method, negatives=Oracle(method.negatives, seen, judge))


def oracle_labels(
    model: Backbone,
    judge: Judge,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    threshold: float = FOUND,
    **sampling,
) -> Seen:
    """What the judge finds in the images of CFG, one prompt and seed per image, for `oracle`."""
    out = sample(model, list(prompts), CFG(), seeds=seeds, **sampling)
    images = zip(prompts, seeds, strict=True)
    return dict(zip(images, judge(out.images).found(threshold), strict=True))


def seen_in(images: pd.DataFrame) -> Seen:
    """The same from a study's rows of the method `cfg`."""
    plain = images[images["method"] == "cfg"]
    if plain.empty:
        raise ValueError("no row of the method cfg among the images; run CFG first")
    return {(row.prompt, int(row.seed)): tuple(row.found) for row in plain.itertuples()}


@dataclass(frozen=True)
class NoisyOracle(Wrapped):
    """See `noisy`."""

    recall: float
    precision: float
    prevalence: float
    seed: int = 0

    @property
    def false_rate(self) -> float:
        """q, the probability that a term is named which is not there."""
        odds = self.prevalence / (1 - self.prevalence)
        return self.recall * odds * (1 - self.precision) / self.precision

    def look(self, view, before):
        after, vocabulary = self.inner.look(view, before), list(self.concepts.vocabulary)
        for k, (prompt, seed) in enumerate(view.samples):
            drawn = _rng(self.seed, prompt, seed, view.index).random(len(vocabulary))
            rates = [self.recall if t in after[k].concepts else self.false_rate for t in vocabulary]
            terms = [t for t, u, rate in zip(vocabulary, drawn, rates, strict=True) if u < rate]
            after[k] = named(self.concepts, terms, after[k].answer)
        return after

    def describe(self) -> dict:
        dials = ("recall", "precision", "prevalence", "seed")
        settings = {name: getattr(self, name) for name in dials}
        return {"kind": "noisy", **settings, "policy": self.inner.describe()}


def noisy(
    method: Method, recall: float, precision: float, prevalence: float, seed: int = 0
) -> Method:
    """Corrupt what a method's queries find to any recall and precision, each term on its own.

    A term that is there is named with probability r, another with q = r π (1 − p) / (p (1 − π)),
    so that over images in which a share π of the vocabulary is there (`prevalence`) the precision
    is p. The method's policy should be right, such as `oracle`'s.
    """
    if not (0 <= recall <= 1 and 0 < precision <= 1 and 0 < prevalence < 1):
        raise ValueError(
            "recall must be in 0 … 1, precision in 0 … 1 and above 0, prevalence between 0 and 1, "
            f"not {recall!r}, {precision!r} and {prevalence!r}"
        )
    policy = NoisyOracle(method.negatives, recall, precision, prevalence, seed)
    if policy.false_rate > 1:
        raise ValueError(
            f"precision {precision:g} is impossible at recall {recall:g} and prevalence "
            f"{prevalence:g}: more would have to be named than is absent"
        )
    return replace(method, negatives=policy)


def prevalence(seen: Seen, concepts: ConceptSet) -> float:
    """The share of a vocabulary that is there in the average image, for `noisy`."""
    there = [len(set(things) & concepts.vocabulary.keys()) for things in seen.values()]
    return float(np.mean(there) / len(concepts.vocabulary))


@torch.no_grad()
def rolled_out(view: View) -> Tensor:
    """Where CFG ends from x_t on: clean latents `[k, C, h, w]`. The run is left as it is."""
    own, i, rows = view.guider, view.index, view.rows
    ahead, latents, null = copy.copy(own.run), view.latents, own.null[rows]
    ahead.scheduler = copy.deepcopy(own.run.scheduler)
    generators = [own.batch.generators[row] for row in rows]
    generators = [torch.Generator(g.device).set_state(g.get_state()) for g in generators]
    for j, t in enumerate(own.run.timesteps[i:], start=i):
        both = ahead.predict(torch.cat([latents, latents]), t, null + own.prompted(j)[rows])
        pred = guidance.cfg(*both.chunk(2), own.g[rows])
        latents = ahead.step(pred, t, latents, generators)
    return latents


@dataclass(frozen=True)
class ClosedLoop(Wrapped):
    """See `closed_loop`."""

    def look(self, view, before):
        return self.inner.look(replace(view, x0=rolled_out(view), decoded={}), before)

    def describe(self) -> dict:
        return {"kind": "closed loop", "policy": self.inner.describe()}


def closed_loop(method: Method) -> Method:
    """Show the VLM the image in which CFG would end from x_t, in place of x̂₀.

    With `Judged` as the VLM no VLM can know more. The evaluations ahead are not counted.
    """
    return replace(method, negatives=ClosedLoop(method.negatives))


def _rng(seed: int, prompt: str, image_seed: int | None, *more) -> np.random.Generator:
    if image_seed is None:
        raise ValueError("a control that draws needs seeds; call sample with seeds=")
    text = " ".join(map(str, (image_seed, prompt, *more)))
    return np.random.default_rng([seed, *hashlib.sha256(text.encode()).digest()[:8]])
