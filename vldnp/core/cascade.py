"""A cascade of VLMs: a small one screens the pictures, a large one confirms what it saw."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from PIL import Image

from vldnp.core.concepts import ConceptSet, load_concepts
from vldnp.core.negatives import SampleId
from vldnp.models import vlm as vlms


@dataclass(frozen=True)
class Cascade:
    """Asks `screen` about all pictures, and `confirm` about those in which it saw something.

    An answer is `confirm`'s where it was asked, else `screen`'s. So what `screen` misses is
    missed, and what it imagines is put right: its recall counts, and one whose answers are `read`
    with a low `threshold` has more of it than its written answers. Where `screen` gives no answer
    or declines to, `confirm` is asked too.

    Attributes:
        screen, confirm: VLMs.
        concepts: the concept set in which `screen`'s answers are understood (a name or a
            `ConceptSet`).
    """

    screen: Callable
    confirm: Callable
    concepts: str | ConceptSet
    by_identity = takes_choices = True

    def __post_init__(self):
        object.__setattr__(self, "concepts", load_concepts(self.concepts))

    def __call__(
        self,
        images: Sequence[Image.Image],
        question: str,
        identities: Sequence[SampleId] = (),
        choices: Sequence[str] = (),
    ) -> list[str]:
        """One answer per picture.

        Raises:
            VLMError: `confirm` gave none about some of those that it was asked about.
        """
        try:
            answers = vlms.ask(self.screen, images, question, identities, choices)
        except vlms.VLMError as error:
            answers = vlms.texts(error.answers, len(images))
        doubtful = [i for i, answer in enumerate(answers) if self._calls_for_more(answer)]
        if not doubtful:
            return answers
        pictures = [images[i] for i in doubtful]
        theirs = [identities[i] for i in doubtful] if identities else ()
        failures: list[str | None] = [None] * len(images)
        try:
            confirmed, failed = vlms.ask(self.confirm, pictures, question, theirs, choices), None
        except vlms.VLMError as error:
            confirmed, failed = vlms.texts(error.answers, len(doubtful)), error
        for i, answer in zip(doubtful, confirmed, strict=True):
            answers[i], failures[i] = answer, str(failed) if answer is None else None
        if failed is not None:
            raise vlms.VLMError(str(failed), answers, failures) from failed
        return answers

    def _calls_for_more(self, answer: str | None) -> bool:
        return (
            answer is None or self.concepts.is_refusal(answer) or bool(self.concepts.parse(answer))
        )

    def describe(self) -> dict:
        """Both VLMs, and how the first is understood; JSON-able."""
        return {
            "name": "cascade",
            "revision": "1",
            "screen": vlms.describe(self.screen),
            "confirm": vlms.describe(self.confirm),
            "concepts": self.concepts.describe(),
        }
