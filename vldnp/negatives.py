"""Negatives: which negative prompt each image has at each step. None, static or dynamic.

The sampler asks three things of a policy: the negatives before the first step, the steps at which
it wants to see the pictures, and the negatives after having seen them.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import inf
from typing import NamedTuple, Protocol

from PIL import Image

from vldnp._files import unknown
from vldnp.concepts import ConceptSet
from vldnp.models import vlm as vlms
from vldnp.schedules import Schedule


class SampleId(NamedTuple):
    """Sample identity: nothing but controls may look at it.

    `seed` is None where the caller passed a generator; `step` is that of a query.
    """

    prompt: str
    seed: int | None
    step: int | None = None


@dataclass(frozen=True)
class Negative:
    """What one image is steered away from now, and why.

    Attributes:
        prompt: the negative prompt; None means there is none, and no third evaluation is spent.
        concepts: the concepts it names, as far as they come from a concept set.
        answer: the VLM's words at the last query, verbatim (up to `vlm.ANSWER_LIMIT`); None before
            the first, and where it failed to answer.
        since_seen: for each of `concepts`, how many queries ago the VLM last saw it.
        image: whose negative this is.
        failure: why the last query got no answer; None where it got one.
        candidates: several negative prompts at a time, for rules that take them; `prompt` then
            names them all. A policy gives each of its images as many.
    """

    prompt: str | None = None
    concepts: tuple[str, ...] = ()
    answer: str | None = None
    since_seen: tuple[int, ...] = ()
    image: SampleId | None = None
    failure: str | None = None
    candidates: tuple[str, ...] = ()

    @property
    def prompts(self) -> tuple[str, ...]:
        """What a prediction ε_n is made for: the candidates, the prompt, or nothing."""
        return self.candidates or (() if self.prompt is None else (self.prompt,))

    def at(self, step: int) -> "Negative":
        """The same, its image known to be looked at in this step."""
        return self if self.image is None else replace(self, image=self.image._replace(step=step))


class Negatives(Protocol):
    """A policy for a batch of images.

    One that has `foreseen(run, i, latents, prompted, guidance_scale, generators) -> pictures` is
    shown those instead of x̂₀ (a control, see `vldnp.baselines.controls`). One that gives several
    `candidates` at a time has them as `categories`.
    """

    def initial(self, images: Sequence[SampleId]) -> list[Negative]:
        """The negatives before the first step, one per image."""

    def query_steps_of(self, num_inference_steps: int) -> tuple[int, ...]:
        """The step indices at which `updated` is called."""

    def updated(
        self, pictures: Sequence[Image.Image], before: Sequence[Negative]
    ) -> list[Negative]:
        """The negatives after a look at the x̂₀ pictures (PIL, RGB), given those in force before."""

    def describe(self) -> dict:
        """JSON-able; everything that decides the negatives."""


@dataclass(frozen=True)
class NoNegatives:
    """Plain CFG."""

    def initial(self, images: Sequence[SampleId]) -> list[Negative]:
        return [Negative(image=image) for image in images]

    def query_steps_of(self, num_inference_steps: int) -> tuple[int, ...]:
        return ()

    def updated(self, pictures, before):
        return list(before)

    def describe(self) -> dict:
        return {"kind": "none"}


@dataclass(frozen=True)
class Static(NoNegatives):
    """One fixed negative prompt, always on. An empty one is none."""

    prompt: str

    def initial(self, images: Sequence[SampleId]) -> list[Negative]:
        prompt = self.prompt if self.prompt.strip() else None
        return [Negative(prompt, image=image) for image in images]

    def describe(self) -> dict:
        return {"kind": "static", "prompt": self.prompt}


UPDATE_POLICIES = {"replaced": 0, "accumulated": inf}
"""What becomes of a concept at the next query, as the number of queries it outlives its sighting.

`replaced` is VL-DNP's; `accumulated` is that of "VLM-Guided Adaptive Negative Prompting for
Creative Generation" (arXiv 2510.10715).
"""


FAILURES = ("raise", "keep", "static")
"""What a run does when a query gets no answer: stop, keep the negative prompt, fall back."""


@dataclass(frozen=True)
class Dynamic:
    """Ask the VLM what can be seen; what it finds is the negative prompt until the next query.

    Only terms of the concept set's vocabulary get into the negative prompt, whatever the VLM says.

    Attributes:
        vlm: `(images, question) -> answers`; one with `by_identity = True` (a control, see
            `vldnp.baselines.controls`) is called with the images' identities as a third argument.
        concepts: the question and the vocabulary.
        query_steps: when to ask.
        update_policy: what becomes of a found concept that a later query does not find:
            `replaced`, it goes; `accumulated`, it stays; a number k, it stays for k more queries.
        on_failure: when the VLM gives no text about an image but an error or anything else, or
            declines to answer ("I'm sorry, I can't assist with that"): `raise`; `keep` the
            negative prompt as the last answer left it, which needs one; or
            until the next query use the `static` one, `static_prompt`. Both of the latter give a
            warning and are recorded (`Negative.failure`). A `VLMError` says which images have an
            answer all the same; after any other error none has.
        static_prompt: default is the lead and the whole vocabulary.
    """

    vlm: Callable
    concepts: ConceptSet
    query_steps: Schedule
    update_policy: str | int = "replaced"
    on_failure: str = "raise"
    static_prompt: str | None = None

    def __post_init__(self):
        if self.on_failure not in FAILURES:
            raise unknown("on_failure", self.on_failure, FAILURES)
        if self.static_prompt is not None and not self.static_prompt.strip():
            raise ValueError("static_prompt is empty: it would leave an image unguided")
        if isinstance(self.update_policy, str):
            if self.update_policy not in UPDATE_POLICIES:
                raise unknown(
                    "update_policy", self.update_policy, [*UPDATE_POLICIES, "a number of queries"]
                )
        elif isinstance(self.update_policy, bool) or not (
            isinstance(self.update_policy, int) and self.update_policy >= 0
        ):
            raise ValueError(
                f"update_policy must be replaced, accumulated or a whole number of queries, 0 or "
                f"more, not {self.update_policy!r}"
            )

    def initial(self, images: Sequence[SampleId]) -> list[Negative]:
        return [Negative(image=image) for image in images]

    def query_steps_of(self, num_inference_steps: int) -> tuple[int, ...]:
        return self.query_steps.steps(num_inference_steps)

    def updated(
        self, pictures: Sequence[Image.Image], before: Sequence[Negative]
    ) -> list[Negative]:
        identities, failure = [negative.image for negative in before], ""
        try:
            answers = self._asked(pictures, identities)
        except Exception as error:  # a user's VLM may fail in any way
            if self.on_failure == "raise":
                raise
            answers = vlms.texts(getattr(error, "answers", None), len(before))
            failure = _one_line(error)
            failures = getattr(error, "failures", None) or [failure] * len(before)
            missing = answers.count(None)
            warnings.warn(
                f"on_failure={self.on_failure!r} for {missing} images: {failure}", stacklevel=2
            )
            if self.on_failure == "keep":
                for answer, negative in zip(answers, before, strict=True):
                    if answer is None and negative.answer is None and negative.failure is None:
                        raise  # the VLM never saw this image: it would go on unguided
        return [
            self._negative(answer, negative)
            if answer is not None
            else self._without_answer(negative, failures[i])
            for i, (answer, negative) in enumerate(zip(answers, before, strict=True))
        ]

    def _asked(
        self, pictures: Sequence[Image.Image], identities: Sequence[SampleId | None]
    ) -> list[str]:
        """The VLM's answers; one that declines to answer is none.

        Raises:
            VLMError: there is none about some of the pictures.
        """
        concepts, failures, reason = self.concepts, [None] * len(pictures), ""
        try:
            answers = vlms.ask(
                self.vlm, pictures, concepts.question, identities, concepts.vocabulary
            )
        except vlms.VLMError as error:
            answers, reason = vlms.texts(error.answers, len(pictures)), _one_line(error)
            own = error.failures if len(error.failures) == len(pictures) else failures
            failures = [
                (failure or reason) if answer is None else None
                for answer, failure in zip(answers, own, strict=True)
            ]
        for i, answer in enumerate(answers):
            if answer is not None and concepts.is_refusal(answer):
                answers[i] = None
                failures[i] = f"the VLM declined: {answer[:200]!r}"
        if any(failures):
            raise vlms.VLMError(reason or next(filter(None, failures)), answers, failures)
        return answers

    def _without_answer(self, before: Negative, failure: str) -> Negative:
        # What was seen before stays, for an update policy that outlives this query.
        unanswered = replace(before, answer=None, failure=failure)
        if self.on_failure == "keep":
            return unanswered
        static = self.static_prompt or self.concepts.negative_prompt(self.concepts.vocabulary)
        return replace(unanswered, prompt=static)

    def _negative(self, answer: str, before: Negative) -> Negative:
        longest = UPDATE_POLICIES.get(self.update_policy, self.update_policy)
        last = {
            term: since_seen + 1
            for term, since_seen in zip(before.concepts, before.since_seen, strict=True)
            if since_seen < longest
        }
        last |= dict.fromkeys(self.concepts.parse(answer), 0)
        terms = tuple(term for term in self.concepts.vocabulary if term in last)
        since_seen = tuple(last[term] for term in terms)
        return Negative(
            self.concepts.negative_prompt(terms), terms, answer, since_seen, before.image
        )

    def describe(self) -> dict:
        return {
            "kind": "dynamic",
            "vlm": vlms.describe(self.vlm),
            "concepts": self.concepts.describe(),
            "query_steps": self.query_steps.describe(),
            "update_policy": self.update_policy,
            "on_failure": self.on_failure,
            "static_prompt": self.static_prompt,
        }


def _one_line(error: Exception) -> str:
    reason = next((line for line in str(error).splitlines() if line.strip()), "no reason given")
    kind = "" if isinstance(error, vlms.VLMError) else f"{type(error).__name__}: "
    return vlms.cleaned(kind + reason)
