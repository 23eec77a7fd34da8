"""Policies: which negative prompt each image has at each step; none, static or dynamic."""

import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from math import inf
from typing import TYPE_CHECKING

from vldnp._files import first_line, unknown
from vldnp.answers import NotUnderstood
from vldnp.concepts import ConceptSet
from vldnp.models import vlm as vlms
from vldnp.schedules import Schedule

if TYPE_CHECKING:
    from vldnp.guider import View


@dataclass(frozen=True)
class Negative:
    """The negative prompt of one image at a step, and its reason."""

    prompt: str | None = None  # None: there is none, and ε_n is not evaluated
    concepts: tuple[str, ...] = ()  # the terms in it
    answer: str | None = None  # the VLM's last answer, verbatim
    since_seen: tuple[int, ...] = ()  # of each concept, the queries since the VLM named it
    failure: str | None = None  # why the last query gave no answer that is understood
    candidates: tuple[str, ...] = ()  # several negative prompts, of which `prompt` is the list

    @property
    def prompts(self) -> tuple[str, ...]:
        """The prompts for which ε_n is evaluated: the candidates, the prompt, or none."""
        return self.candidates or (() if self.prompt is None else (self.prompt,))


@dataclass(frozen=True)
class Policy:
    """No negative prompts; the base of all policies."""

    def initial(self, prompts: Sequence[str], seeds: Sequence[int | None]) -> list[Negative]:
        """The negatives before the first step, one per image."""
        return [Negative() for _ in prompts]

    def query_steps_of(self, num_inference_steps: int) -> tuple[int, ...]:
        """The step indices at which `look` is called."""
        return ()

    def look(self, view: "View", before: Sequence[Negative]) -> list[Negative]:
        """The negatives after a query about x̂₀, one for each image of the view; the same object as
        in `before` where the VLM was not queried."""
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
"""The number of queries for which a term stays: VL-DNP's policy, and that of arXiv 2510.10715."""

FAILURES = ("raise", "static")  # no answer is an error, or gives the static negative prompt


@dataclass(frozen=True)
class Dynamic(Policy):
    """The VLM is queried; the terms that it names are the negative prompt until the next query. If
    an answer is not understood, the VLM is queried once more with the terms in the question; then
    the static negative prompt is used until the next query.

    Attributes:
        vlm: `(images, question) -> answers`; see `vldnp.models.vlm`.
        update_policy: a name in `UPDATE_POLICIES`, or a number of queries.
        on_failure: one of `FAILURES`, used if the VLM raises an error or gives no text.
        static_prompt: default is the lead and the whole vocabulary.
        lead_only: a negative prompt is the lead, without the terms that were named.
    """

    vlm: Callable
    concepts: ConceptSet
    query_steps: Schedule
    update_policy: str | int = "replaced"
    on_failure: str = "raise"
    static_prompt: str | None = None
    lead_only: bool = False

    def __post_init__(self):
        if self.lead_only and not self.concepts.lead:
            raise ValueError(f"lead_only needs a lead; {self.concepts.name!r} has none")
        if self.on_failure not in FAILURES:
            raise unknown("on_failure", self.on_failure, FAILURES)
        if self.static_prompt is not None and not self.static_prompt.strip():
            raise ValueError("static_prompt is empty: it would leave an image unguided")
        update, known = self.update_policy, ", ".join(UPDATE_POLICIES)
        if not (update in UPDATE_POLICIES or type(update) is int and update >= 0):
            raise ValueError(f"update_policy must be {known} or a whole number, not {update!r}")

    def query_steps_of(self, num_inference_steps):
        return self.query_steps.steps(num_inference_steps)

    def look(self, view, before):
        found = self._asked(view, self.concepts.question)
        unread = [said is not None and terms is None for said, terms, _ in found]
        if again := [k for k, missed in enumerate(unread) if missed]:
            second = self._asked(view.of(again), self.concepts.again())
            for k, reading in zip(again, second, strict=True):
                found[k] = reading
        return [self._negative(*one, was) for one, was in zip(found, before, strict=True)]

    def _asked(self, view: "View", question: str) -> list[tuple]:
        """The VLM's answer about each image, the terms in it or None, and why there are none."""
        images = view.pixels if getattr(self.vlm, "takes_pixels", False) else view.images
        failures = [None] * len(images)
        try:
            answers = vlms.ask(self.vlm, images, question, self.concepts.vocabulary)
        except Exception as error:  # any callable may be a VLM, and fail in any way
            if self.on_failure == "raise":
                raise
            answers = vlms.texts(getattr(error, "answers", None), len(images))
            reason = vlms.cleaned(f"{type(error).__name__}: {first_line(error)}")
            failures = [why or reason for why in getattr(error, "failures", None) or failures]
            warnings.warn(f"no answer about {answers.count(None)} images: {reason}", stacklevel=3)
        return [self._read(*one) for one in zip(answers, failures, strict=True)]

    def _read(self, answer: str | None, failure: str | None) -> tuple:
        try:
            return answer, None if answer is None else self.concepts.parse(answer), failure
        except NotUnderstood as error:
            return answer, None, str(error)

    def _negative(self, answer, terms, failure, before: Negative) -> Negative:
        """The negative of the terms named now and of those that the update policy keeps."""
        if terms is None:
            static = self.static_prompt or self._prompt(self.concepts.vocabulary)
            return replace(before, prompt=static, answer=answer, failure=failure)
        longest = UPDATE_POLICIES.get(self.update_policy, self.update_policy)
        earlier = zip(before.concepts, before.since_seen, strict=True)
        last = {term: since + 1 for term, since in earlier if since < longest}
        last |= dict.fromkeys(terms, 0)
        named = tuple(term for term in self.concepts.terms if term in last)
        since_seen, doubt = tuple(last[term] for term in named), self.concepts.doubt(answer)
        return Negative(self._prompt(named), named, answer, since_seen, doubt)

    def _prompt(self, terms: Iterable[str]) -> str | None:
        prompt = self.concepts.negative_prompt(terms)
        return self.concepts.lead if prompt and self.lead_only else prompt

    def describe(self) -> dict:
        return {
            **({"lead_only": True} if self.lead_only else {}),
            "kind": "dynamic",
            "vlm": vlms.describe(self.vlm),
            "concepts": self.concepts.describe(),
            "query_steps": self.query_steps.describe(),
            "update_policy": self.update_policy,
            "on_failure": self.on_failure,
            "static_prompt": self.static_prompt,
        }
