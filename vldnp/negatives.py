"""Negatives: which negative prompt each image has at each step. None, static or dynamic.

The sampler asks three things of a policy: the negatives before the first step, the steps at which
it wants to see the pictures, and the negatives after having seen them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from PIL import Image

from vldnp import vlm as vlms
from vldnp.concepts import ConceptSet
from vldnp.schedules import Schedule


@dataclass(frozen=True)
class Negative:
    """What one image is steered away from now, and why.

    Attributes:
        prompt: the negative prompt; None means there is none, and no third evaluation is spent.
        concepts: the concepts it names, as far as they come from a concept set.
        answer: the VLM's words, verbatim, at the last query.
    """

    prompt: str | None = None
    concepts: tuple[str, ...] = ()
    answer: str | None = None


class Negatives(Protocol):
    """A policy for a batch of images."""

    def initial(self, num_images: int) -> list[Negative]:
        """The negatives before the first step."""

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

    def initial(self, num_images: int) -> list[Negative]:
        return [Negative()] * num_images

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

    def initial(self, num_images: int) -> list[Negative]:
        return [Negative(self.prompt if self.prompt.strip() else None)] * num_images

    def describe(self) -> dict:
        return {"kind": "static", "prompt": self.prompt}


@dataclass(frozen=True)
class Dynamic:
    """Ask the VLM what can be seen; what it finds is the negative prompt until the next query.

    Only terms of the concept set's vocabulary get into the negative prompt, whatever the VLM says.
    """

    vlm: Callable
    concepts: ConceptSet
    query_steps: Schedule

    def initial(self, num_images: int) -> list[Negative]:
        return [Negative()] * num_images

    def query_steps_of(self, num_inference_steps: int) -> tuple[int, ...]:
        return self.query_steps.steps(num_inference_steps)

    def renewed(
        self, pictures: Sequence[Image.Image], before: Sequence[Negative]
    ) -> list[Negative]:
        answers = list(self.vlm(pictures, self.concepts.question))
        if len(answers) != len(pictures):
            name = vlms.describe(self.vlm)["name"]
            raise ValueError(
                f"VLM {name!r} gave {len(answers)} answers to {len(pictures)} pictures; "
                "it must give one each"
            )
        return [self._negative(answer) for answer in answers]

    def _negative(self, answer: str) -> Negative:
        found = self.concepts.parse(answer)
        return Negative(self.concepts.negative_prompt(found), found, answer)

    def describe(self) -> dict:
        return {
            "kind": "dynamic",
            "vlm": vlms.describe(self.vlm),
            "concepts": self.concepts.describe(),
            "query_steps": self.query_steps.describe(),
        }
