"""Controls: stand-ins for the VLM that say what of VL-DNP's effect comes from what it sees.

Each is a VLM as `vldnp.VLDNP` takes it. `AnswersNone` must leave plain CFG; `RandomConcepts`
steers as often and as broadly as a VLM does, but from the wrong things; `Oracle` knows what plain
CFG will have shown in the end. The last two go by the image's identity (its prompt and seed), so
that an image is answered alike in every batch; ordinary VLMs never learn it.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
from PIL import Image

from vldnp.core.concepts import ConceptSet, load_concepts
from vldnp.core.methods import CFG
from vldnp.core.negatives import SampleId
from vldnp.core.sampler import sample
from vldnp.models import vlm as vlms
from vldnp.models.backbone import Backbone
from vldnp.models.judges import FOUND, Judge

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
        if image not in self.seen:
            raise ValueError(
                f"the oracle does not know the image of {image.prompt!r} with seed {image.seed}; "
                "give it that of plain CFG, with vldnp.baselines.controls.foresee"
            )
        return self.seen[image]

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


def _generator(seed: int, image: SampleId) -> np.random.Generator:
    if image.seed is None:
        raise ValueError(
            "random concepts need an image's seed; call sample with seeds, not with a generator"
        )
    digest = hashlib.sha256(f"{image.seed} {image.prompt}".encode()).digest()
    return np.random.default_rng([seed, *digest[:8]])
