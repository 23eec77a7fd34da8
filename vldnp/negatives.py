"""Negatives: which negative prompt each image has at each step; none, static or dynamic.

A policy says what they are before the first step, at which steps it wants to see x̂₀, and what they
are after it saw x̂₀.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import inf
from typing import TYPE_CHECKING

from PIL import Image

from vldnp._files import first_line, unknown
from vldnp.answers import NotUnderstood
from vldnp.concepts import ConceptSet
from vldnp.models import vlm as vlms
from vldnp.schedules import Schedule

if TYPE_CHECKING:
    from vldnp.guider import View


@dataclass(frozen=True)
class Negative:
    """What one image is steered away from now, and why.

    Attributes:
        prompt: the negative prompt; None means there is none, and ε_n is not evaluated.
        concepts: the terms in it, as far as they come from a concept set.
        answer: the VLM's last answer, verbatim; None before the first and where it gave none.
        since_seen: for each of `concepts`, how many queries ago the VLM last named it.
        failure: why the last query brought no answer that is understood; None where it did.
        candidates: several negative prompts, for rules that take them; `prompt` then lists all.
    """

    prompt: str | None = None
    concepts: tuple[str, ...] = ()
    answer: str | None = None
    since_seen: tuple[int, ...] = ()
    failure: str | None = None
    candidates: tuple[str, ...] = ()

    @property
    def prompts(self) -> tuple[str, ...]:
        """What an ε_n is evaluated for: the candidates, the prompt, or nothing."""
        return self.candidates or (() if self.prompt is None else (self.prompt,))


class Policy:
    """No negative prompts; the base of all policies."""

    def initial(self, prompts: Sequence[str], seeds: Sequence[int | None]) -> list[Negative]:
        """The negatives before the first step, one per image."""
        return [Negative() for _ in prompts]

    def query_steps_of(self, num_inference_steps: int) -> tuple[int, ...]:
        """The step indices at which `look` is called."""
        return ()

    def look(self, view: "View", before: Sequence[Negative]) -> list[Negative]:
        """The negatives after x̂₀ was seen, one for each image of the view.

        An image that was not queried keeps the very object that it had `before`.
        """
        return list(before)

    def describe(self) -> dict:
        """JSON-able; everything that decides the negatives."""
        return {"kind": "none"}


@dataclass(frozen=True)
class Static(Policy):
    """One static negative prompt, always on. An empty one is none."""

    prompt: str

    def initial(self, prompts, seeds):
        return [Negative(self.prompt if self.prompt.strip() else None) for _ in prompts]

    def describe(self) -> dict:
        return {"kind": "static", "prompt": self.prompt}


UPDATE_POLICIES = {"replaced": 0, "accumulated": inf}
"""For how many further queries a concept stays that the VLM no longer names. `replaced` is VL-DNP's;
`accumulated` is that of arXiv 2510.10715."""

FAILURES = ("raise", "keep", "static")
"""What happens when the VLM gives no answer: an error, the last negative prompt, the static one."""


@dataclass(frozen=True)
class Dynamic(Policy):
    """The VLM is queried; what it names is the negative prompt until the next query.

    An answer that is not understood is asked for once more, with the list of terms in the
    question. If that is not understood either, the static negative prompt is used until the next
    query (the last one, for `keep`), and `Negative.failure` says so.

    Attributes:
        vlm: `(images, question) -> answers`; see `vldnp.models.vlm`.
        concepts: the question and the vocabulary.
        query_steps: when to query.
        update_policy: a name in `UPDATE_POLICIES`, or a number of queries.
        on_failure: one of `FAILURES`, for a VLM that raises an error or gives no text.
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
        update = self.update_policy
        if not (update in UPDATE_POLICIES or type(update) is int and update >= 0):
            raise ValueError(
                f"update_policy must be replaced, accumulated or a number of queries, 0 or more, "
                f"not {update!r}"
            )

    def query_steps_of(self, num_inference_steps):
        return self.query_steps.steps(num_inference_steps)

    def look(self, view, before):
        after = self._answered(view.images, self.concepts.question, before)
        if again := [k for k, n in enumerate(after) if n.failure and n.answer is not None]:
            images, own = [view.images[k] for k in again], [before[k] for k in again]
            for k, negative in zip(
                again, self._answered(images, self.concepts.again(), own), strict=True
            ):
                after[k] = negative
        return after

    def _answered(
        self, images: Sequence[Image.Image], question: str, before: Sequence[Negative]
    ) -> list[Negative]:
        """The negatives by the VLM's answers to the question."""
        failures: Sequence[str | None] = [None] * len(images)
        try:
            answers = vlms.ask(self.vlm, images, question, self.concepts.vocabulary)
        except Exception as error:  # any callable may be a VLM, and fail in any way
            answers = vlms.texts(getattr(error, "answers", None), len(images))
            unseen = any(
                a is None and b == Negative() for a, b in zip(answers, before, strict=True)
            )
            if self.on_failure == "raise" or self.on_failure == "keep" and unseen:
                raise  # with nothing to keep, an image would go on unguided
            reason = vlms.cleaned(f"{type(error).__name__}: {first_line(error)}")
            given = getattr(error, "failures", None) or [None] * len(images)
            failures = [failure or reason for failure in given]
            warnings.warn(f"no answer about {answers.count(None)} images: {reason}", stacklevel=2)
        return [self._negative(*one) for one in zip(answers, failures, before, strict=True)]

    def _negative(self, answer: str | None, failure: str | None, before: Negative) -> Negative:
        """The negative by one answer, or by the reason why there is none."""
        if answer is not None:
            try:
                return self._of(self.concepts.parse(answer), answer, before)
            except NotUnderstood as error:
                failure = str(error)
        failed = replace(before, answer=answer, failure=failure)
        if self.on_failure == "keep":
            return failed
        static = self.static_prompt or self.concepts.negative_prompt(self.concepts.vocabulary)
        return replace(failed, prompt=static)

    def _of(self, terms: Sequence[str], answer: str, before: Negative) -> Negative:
        longest = UPDATE_POLICIES.get(self.update_policy, self.update_policy)
        last = {
            term: since + 1
            for term, since in zip(before.concepts, before.since_seen, strict=True)
            if since < longest
        }
        last |= dict.fromkeys(terms, 0)
        named = tuple(term for term in self.concepts.terms if term in last)
        since_seen = tuple(last[term] for term in named)
        return Negative(self.concepts.negative_prompt(named), named, answer, since_seen)

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
