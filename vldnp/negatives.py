"""Negatives: which negative prompt each image has at each step. None, static or dynamic.

The sampler asks three things of a policy: the negatives before the first step, the steps at which
it wants to see the pictures, and the negatives after having seen them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf
from typing import NamedTuple, Protocol

from PIL import Image

from vldnp import vlm as vlms
from vldnp.concepts import ConceptSet
from vldnp.files import unknown
from vldnp.schedules import Schedule


class ImageId(NamedTuple):
    """Which image of the world this is: nothing but controls may look at it.

    `seed` is None where the caller passed a generator.
    """

    prompt: str
    seed: int | None


@dataclass(frozen=True)
class Negative:
    """What one image is steered away from now, and why.

    Attributes:
        prompt: the negative prompt; None means there is none, and no third evaluation is spent.
        concepts: the concepts it names, as far as they come from a concept set.
        answer: the VLM's words, verbatim, at the last query.
        unseen: for each of `concepts`, how many queries ago the VLM last saw it.
        image: whose negative this is.
    """

    prompt: str | None = None
    concepts: tuple[str, ...] = ()
    answer: str | None = None
    unseen: tuple[int, ...] = ()
    image: ImageId | None = None


class Negatives(Protocol):
    """A policy for a batch of images."""

    def initial(self, images: Sequence[ImageId]) -> list[Negative]:
        """The negatives before the first step, one per image."""

    def query_steps_of(self, num_inference_steps: int) -> tuple[int, ...]:
        """The step indices at which `renewed` is called."""

    def renewed(
        self, pictures: Sequence[Image.Image], before: Sequence[Negative]
    ) -> list[Negative]:
        """The negatives after a look at the x̂₀ pictures (PIL, RGB), given those in force before."""

    def describe(self) -> dict:
        """JSON-able; everything that decides the negatives."""


@dataclass(frozen=True)
class NoNegatives:
    """Plain CFG."""

    def initial(self, images: Sequence[ImageId]) -> list[Negative]:
        return [Negative(image=image) for image in images]

    def query_steps_of(self, num_inference_steps: int) -> tuple[int, ...]:
        return ()

    def renewed(self, pictures, before):
        return list(before)

    def describe(self) -> dict:
        return {"kind": "none"}


@dataclass(frozen=True)
class Static(NoNegatives):
    """One fixed negative prompt, always on. An empty one is none."""

    prompt: str

    def initial(self, images: Sequence[ImageId]) -> list[Negative]:
        prompt = self.prompt if self.prompt.strip() else None
        return [Negative(prompt, image=image) for image in images]

    def describe(self) -> dict:
        return {"kind": "static", "prompt": self.prompt}


RENEWALS = {"replaced": 0, "accumulated": inf}
"""What becomes of a concept at the next query, as the number of queries it outlives its sighting.

`replaced` is VL-DNP's; `accumulated` is that of "VLM-Guided Adaptive Negative Prompting for
Creative Generation" (arXiv 2510.10715).
"""


@dataclass(frozen=True)
class Dynamic:
    """Ask the VLM what can be seen; what it finds is the negative prompt until the next query.

    Only terms of the concept set's vocabulary get into the negative prompt, whatever the VLM says.

    Attributes:
        vlm: `(images, question) -> answers`; one with `by_identity = True` (a control, see
            `vldnp.controls`) is called with the images' identities as a third argument.
        concepts: the question and the vocabulary.
        query_steps: when to ask.
        renewal: what becomes of a found concept that a later query does not find: `replaced`, it
            goes; `accumulated`, it stays; a number k, it stays for k more queries.
    """

    vlm: Callable
    concepts: ConceptSet
    query_steps: Schedule
    renewal: str | int = "replaced"

    def __post_init__(self):
        if isinstance(self.renewal, str):
            if self.renewal not in RENEWALS:
                raise unknown("renewal", self.renewal, [*RENEWALS, "a number of queries"])
        elif isinstance(self.renewal, bool) or not (
            isinstance(self.renewal, int) and self.renewal >= 0
        ):
            raise ValueError(
                f"renewal must be replaced, accumulated or a whole number of queries, 0 or more, "
                f"not {self.renewal!r}"
            )

    def initial(self, images: Sequence[ImageId]) -> list[Negative]:
        return [Negative(image=image) for image in images]

    def query_steps_of(self, num_inference_steps: int) -> tuple[int, ...]:
        return self.query_steps.steps(num_inference_steps)

    def renewed(
        self, pictures: Sequence[Image.Image], before: Sequence[Negative]
    ) -> list[Negative]:
        identities = [negative.image for negative in before]
        answers = vlms.ask(self.vlm, pictures, self.concepts.question, identities)
        return [self._negative(*pair) for pair in zip(answers, before, strict=True)]

    def _negative(self, answer: str, before: Negative) -> Negative:
        longest = RENEWALS.get(self.renewal, self.renewal)
        last = {
            term: unseen + 1
            for term, unseen in zip(before.concepts, before.unseen, strict=True)
            if unseen < longest
        }
        last |= dict.fromkeys(self.concepts.parse(answer), 0)
        terms = tuple(term for term in self.concepts.vocabulary if term in last)
        unseen = tuple(last[term] for term in terms)
        return Negative(self.concepts.negative_prompt(terms), terms, answer, unseen, before.image)

    def describe(self) -> dict:
        return {
            "kind": "dynamic",
            "vlm": vlms.describe(self.vlm),
            "concepts": self.concepts.describe(),
            "query_steps": self.query_steps.describe(),
            "renewal": self.renewal,
        }
