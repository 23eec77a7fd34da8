"""Controls: stand-ins for the VLM that say what of VL-DNP's effect comes from what it sees.

Each is a VLM as `vldnp.VLDNP` takes it. `AnswersNone` must leave plain CFG; `RandomConcepts`
steers as often and as broadly as a VLM does, but from the wrong things; `Oracle` knows what plain
CFG will have shown in the end, and `Judged` is the judge itself, which `closed_loop` shows where
plain CFG would end from the present latents. `Dialled` makes of any of them one of a given recall
and precision. Those that go by the image's identity (its prompt, seed, and the query's step)
answer about an image alike in every batch; ordinary VLMs never learn it.
"""

import copy
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace

import numpy as np
import pandas as pd
import torch
from PIL import Image
from torch import Tensor

from vldnp import guidance
from vldnp.concepts import ConceptSet, load_concepts
from vldnp.methods import CFG, Method
from vldnp.models import vlm as vlms
from vldnp.models.backbone import Backbone, to_pil
from vldnp.models.conditioning import Conditioning
from vldnp.models.judges import FOUND, Judge
from vldnp.models.run import Run
from vldnp.negatives import Dynamic, SampleId
from vldnp.sampler import sample

NONE = "none"


@dataclass(frozen=True)
class AnswersNone:
    """A VLM that never sees anything: VL-DNP with it is plain CFG, bit for bit."""

    name: str = "answers-none"
    revision: str = "1"

    def __call__(self, images: Sequence[Image.Image], question: str) -> list[str]:
        return [NONE] * len(images)


@dataclass(frozen=True)
class RandomConcepts:
    """Asks a VLM, and names as many other concepts of the vocabulary instead of those it found.

    So it steers the same images at the same queries as long as their pictures agree, and only the
    content is wrong. Every image has an order of the vocabulary, drawn from a generator seeded
    with `seed` and the image's identity; the first terms that the VLM did not find are named.
    Where it found more than half of the vocabulary, fewer are left to name.

    Attributes:
        vlm: the VLM whose answers decide how many.
        concepts: the concept set in which they are understood (a name or a `ConceptSet`).
        seed: another seed draws other concepts.
    """

    vlm: Callable
    concepts: str | ConceptSet
    seed: int = 0
    by_identity = True

    def __post_init__(self):
        object.__setattr__(self, "concepts", load_concepts(self.concepts))

    def __call__(
        self, images: Sequence[Image.Image], question: str, identities: Sequence[SampleId]
    ) -> list[str]:
        try:
            answers = vlms.ask(self.vlm, images, question, identities, self.concepts.vocabulary)
        except vlms.VLMError as error:  # those that it has must not steer as they are
            known = vlms.texts(error.answers, len(images))
            raise vlms.VLMError(str(error), self._others(known, identities)) from error
        return self._others(answers, identities)

    def _others(
        self, answers: Sequence[str | None], images: Sequence[SampleId]
    ) -> list[str | None]:
        pairs = zip(answers, images, strict=True)
        return [None if answer is None else self._other(answer, image) for answer, image in pairs]

    def _other(self, answer: str, image: SampleId) -> str:
        found = self.concepts.parse(answer)
        order = _generator(self.seed, image).permutation(list(self.concepts.vocabulary))
        others = [term for term in order if term not in found]
        return ", ".join(others[: len(found)]) or NONE

    def describe(self) -> dict:
        return {
            "name": "random-concepts",
            "revision": "1",
            "vlm": vlms.describe(self.vlm),
            "concepts": self.concepts.describe(),
            "seed": self.seed,
        }


@dataclass(frozen=True)
class Oracle:
    """Names, at every query, what a judge saw in the image that plain CFG ends in.

    A control and no method: it needs that image before it is made, and here, against the
    rule for methods, the judge is the guide. Get `seen` from `foresee`, or from a study that has
    plain CFG with `seen_in`.

    Attributes:
        seen: (prompt, seed) → the restricted things in plain CFG's image, with the same model,
            guidance scale, scheduler and steps as the run that it guides.
        judge: who saw them; for records.
    """

    seen: Mapping[tuple[str, int], tuple[str, ...]] = field(hash=False)
    judge: str = "judge"
    by_identity = True

    def __call__(
        self, images: Sequence[Image.Image], question: str, identities: Sequence[SampleId]
    ) -> list[str]:
        return [", ".join(self._seen(image)) or NONE for image in identities]

    def _seen(self, image: SampleId) -> tuple[str, ...]:
        if (image.prompt, image.seed) not in self.seen:
            raise ValueError(
                f"the oracle does not know the image of {image.prompt!r} with seed {image.seed}; "
                "give it that of plain CFG, with vldnp.baselines.controls.foresee"
            )
        return self.seen[image.prompt, image.seed]

    def describe(self) -> dict:
        """The digest of all that it knows stands for it, so other knowledge is another method."""
        known = json.dumps(sorted([*key, *things] for key, things in self.seen.items()))
        digest = hashlib.sha256(known.encode()).hexdigest()[:12]
        return {"name": "oracle", "revision": digest, "judge": self.judge}


def foresee(
    model: Backbone,
    judge: Judge,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    threshold: float = FOUND,
    **sampling,
) -> dict[tuple[str, int], tuple[str, ...]]:
    """What the judge sees in plain CFG's images, for `Oracle`.

    Args:
        prompts, seeds: one each per image.
        threshold: a thing counts as seen from this probability on.
        sampling: further arguments of `vldnp.sample`, those of the run to be guided.
    """
    out = sample(model, list(prompts), CFG(), seeds=seeds, **sampling)
    images = zip(prompts, seeds, strict=True)
    return dict(zip(images, judge(out.images).found(threshold), strict=True))


def seen_in(images: pd.DataFrame) -> dict[tuple[str, int], tuple[str, ...]]:
    """The same from a study's `images.parquet`, whose rows of the method `cfg` are plain CFG's."""
    plain = images[images["method"] == "cfg"]
    if plain.empty:
        raise ValueError("no row of the method cfg among the images; run plain CFG first")
    return {(row.prompt, int(row.seed)): tuple(row.found) for row in plain.itertuples()}


@dataclass(frozen=True)
class Judged:
    """Names what a judge sees in the very picture that is shown.

    Attributes:
        judge: who sees it.
        threshold: a thing counts as seen from this probability on.
    """

    judge: Judge
    threshold: float = FOUND

    def __call__(self, images: Sequence[Image.Image], question: str) -> list[str]:
        return [", ".join(found) or NONE for found in self.judge(images).found(self.threshold)]

    def describe(self) -> dict:
        name, revision = self.judge.name, self.judge.revision
        return {"name": f"judged by {name}", "revision": revision, "threshold": self.threshold}


@dataclass(frozen=True)
class Dialled:
    """Corrupts the truth to any recall and precision, each term of the vocabulary on its own.

    A term that is there is named with probability r, one that is not with probability
    q = r π (1 − p) / (p (1 − π)), so that over images in which a share π of the vocabulary is there
    the precision r π / (r π + q (1 − π)) is p. On images with less of it there is more falsely
    named than p says, as with any VLM. What is drawn follows from `seed`, the image and the step.

    Attributes:
        vlm: says the truth: an `Oracle`, or `Judged` in a closed loop.
        concepts: the concept set in which it is understood (a name or a `ConceptSet`).
        recall, precision: r in 0 … 1 and p in 0 … 1, p > 0.
        prevalence: π in 0 … 1, both excluded; see `prevalence`.
        seed: another seed makes other mistakes.
    """

    vlm: Callable
    concepts: str | ConceptSet
    recall: float
    precision: float
    prevalence: float
    seed: int = 0
    by_identity = True

    def __post_init__(self):
        object.__setattr__(self, "concepts", load_concepts(self.concepts))
        if not (0 <= self.recall <= 1 and 0 < self.precision <= 1 and 0 < self.prevalence < 1):
            raise ValueError(
                "recall must be in 0 … 1, precision and prevalence above 0 and up to 1 and below "
                f"1, not {self.recall!r}, {self.precision!r} and {self.prevalence!r}"
            )
        if self.false_rate > 1:
            raise ValueError(
                f"precision {self.precision:g} cannot be had at recall {self.recall:g} and "
                f"prevalence {self.prevalence:g}: naming everything absent leaves more"
            )

    @property
    def false_rate(self) -> float:
        """q, the probability that a term is named which is not there."""
        odds = self.prevalence / (1 - self.prevalence)
        return self.recall * odds * (1 - self.precision) / self.precision

    def __call__(
        self, images: Sequence[Image.Image], question: str, identities: Sequence[SampleId]
    ) -> list[str]:
        answers = vlms.ask(self.vlm, images, question, identities, self.concepts.vocabulary)
        pairs = zip(answers, identities, strict=True)
        return [self._corrupted(self.concepts.parse(answer), image) for answer, image in pairs]

    def _corrupted(self, truth: Sequence[str], image: SampleId) -> str:
        drawn = _generator(self.seed, image, image.step).random(len(self.concepts.vocabulary))
        named = [
            term
            for term, u in zip(self.concepts.vocabulary, drawn, strict=True)
            if u < (self.recall if term in truth else self.false_rate)
        ]
        return ", ".join(named) or NONE

    def describe(self) -> dict:
        dials = ("recall", "precision", "prevalence", "seed")
        return {
            "name": f"recall {self.recall:g}, precision {self.precision:g}",
            "revision": "1",
            "vlm": vlms.describe(self.vlm),
            "concepts": self.concepts.describe(),
            **{name: getattr(self, name) for name in dials},
        }


def prevalence(seen: Mapping[SampleId, Sequence[str]], concepts: str | ConceptSet) -> float:
    """The share of a vocabulary that is there in the average image, for `Dialled`.

    Args:
        seen: image → what is there, as `foresee` and `seen_in` give it.
    """
    vocabulary = load_concepts(concepts).vocabulary
    there = [len(set(things) & vocabulary.keys()) for things in seen.values()]
    return float(np.mean(there) / len(vocabulary))


@torch.no_grad()
def rolled_out(
    run: Run,
    i: int,
    latents: Tensor,
    prompted: Callable[[int], Conditioning],
    guidance_scale: Tensor,
    generators: Sequence[torch.Generator],
) -> Tensor:
    """Where plain CFG ends from x_t on: clean latents `[B, C, h, w]`. The run is left as it is.

    Args:
        run, prompted, generators: as the sampler has them; noise is drawn from copies.
        i: the index of the step at whose start the latents are x_t.
        latents: x_t.
        guidance_scale: g, `[B, 1, 1, 1]`.
    """
    ahead, B = copy.copy(run), len(latents)
    ahead.scheduler = copy.deepcopy(run.scheduler)
    generators = [torch.Generator(g.device).set_state(g.get_state()) for g in generators]
    nothing = run.null_conditioning(B)
    for j, t in enumerate(run.timesteps[i:], start=i):
        both = ahead.predict(torch.cat([latents, latents]), t, nothing + prompted(j))
        latents = ahead.step(guidance.cfg(*both.chunk(2), guidance_scale), t, latents, generators)
    return latents


@dataclass(frozen=True)
class ClosedLoop(Dynamic):
    """VL-DNP's policy, whose VLM is shown where plain CFG would end instead of x̂₀.

    The evaluations that this takes are not counted in the trace: it is a bound, and no method.
    """

    def foreseen(self, run: Run, *at) -> list[Image.Image]:
        """The pictures in which plain CFG would end; arguments as in `rolled_out`."""
        return to_pil(run.decode(rolled_out(run, *at)))

    def describe(self) -> dict:
        return {**super().describe(), "kind": "closed loop"}


def closed_loop(method: Method) -> Method:
    """VL-DNP whose VLM is shown, at every query, the picture that plain CFG would end in.

    With `Judged` as its VLM it is the closed-loop oracle: nothing that looks can know more.

    Args:
        method: as `vldnp.VLDNP` makes it.
    """
    policy = method.negatives
    if not isinstance(policy, Dynamic):
        raise ValueError(f"{method.name!r} asks no VLM; a closed loop is made of VLDNP(...)")
    own = {f.name: getattr(policy, f.name) for f in fields(policy)}
    return replace(method, negatives=ClosedLoop(**own))


def _generator(seed: int, image: SampleId, *more) -> np.random.Generator:
    if image.seed is None:
        raise ValueError(
            "a control that draws needs an image's seed; call sample with seeds, not with a "
            "generator"
        )
    text = " ".join(map(str, (image.seed, image.prompt, *more)))
    return np.random.default_rng([seed, *hashlib.sha256(text.encode()).digest()[:8]])
