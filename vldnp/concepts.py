"""Concept sets: a question for the VLM, and how its answer becomes a negative prompt."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, ClassVar

from pydantic import BeforeValidator, ConfigDict, Field

from vldnp._files import checked, data_folder, read_yaml, unknown
from vldnp.answers import NotUnderstood, forms, read

READINGS = ("strict", "official")
Synonyms = Annotated[tuple[str, ...], BeforeValidator(lambda given: given or ())]


@dataclass(frozen=True)
class ConceptSet:
    """A question for the VLM and the vocabulary in which its answer is read.

    Attributes:
        question: the text of a query about an image.
        vocabulary: term → its synonyms. Only terms enter a negative prompt.
        lead, end: texts before and after the terms; may be empty.
        reading: `strict` (`vldnp.answers`), or `official`, as the paper's own script reads: a term
            is found where its letters, as written or capitalised, stand in the answer.
    """

    __pydantic_config__: ClassVar = ConfigDict(extra="forbid")

    name: str
    question: Annotated[str, Field(min_length=1)]
    vocabulary: Mapping[str, Synonyms] = field(hash=False)
    lead: str = ""
    end: str = ""
    reading: str = "strict"

    def __post_init__(self):
        if self.reading not in READINGS:
            raise unknown(f"reading of concept set {self.name!r}", self.reading, READINGS)
        if not self.vocabulary:
            raise ValueError(f"concept set {self.name!r} has an empty vocabulary")
        vocabulary = {term: tuple(synonyms) for term, synonyms in self.vocabulary.items()}
        object.__setattr__(self, "vocabulary", vocabulary)
        self._forms  # noqa: B018  (a bad term is an error here, not at the first answer)

    @property
    def terms(self) -> tuple[str, ...]:
        """What a negative prompt may name, in its order; `official` adds capitalised terms."""
        terms = tuple(self.vocabulary)
        return terms + tuple(map(str.capitalize, terms)) * (self.reading == "official")

    def parse(self, answer: str) -> tuple[str, ...]:
        """The terms that an answer names, in the order of `terms`; may raise `NotUnderstood`."""
        if self.reading == "official":
            return tuple(term for term in self.terms if term in answer)
        found = read(answer, self._forms)
        return tuple(term for term in self.terms if term in found)

    def doubt(self, answer: str) -> str | None:
        """Why the official reading, which finds no term, may be wrong; else None."""
        if self.reading == "official" and not self.parse(answer):
            try:
                read(answer, {})
            except NotUnderstood as error:
                return str(error)
        return None

    def again(self) -> str:
        """The question with the form of the answer and the terms, for a second query."""
        form = "Answer with terms of this list, separated by commas, or none:"
        return f"{self.question} {form} {', '.join(self.vocabulary)}"

    def negative_prompt(self, found: Iterable[str]) -> str | None:
        """`lead, term, term` and `end`, in the order of `terms`; None for no term; a ValueError
        for what is not among them."""
        found = set(found)
        if outside := found.difference(self.terms):
            raise unknown(f"term of {self.name!r}", min(outside), self.vocabulary)
        terms = [term for term in self.terms if term in found]
        return ", ".join([self.lead] * bool(self.lead) + terms) + self.end if terms else None

    def describe(self) -> dict:
        """Everything that decides its negative prompts, JSON-able."""
        said = {"name": self.name, "question": self.question, "lead": self.lead}
        said["vocabulary"] = {term: list(synonyms) for term, synonyms in self.vocabulary.items()}
        optional = {"end": self.end, "reading": self.reading}
        return said | {k: v for k, v in optional.items() if v not in ("", "strict")}

    @cached_property
    def _forms(self) -> dict[str, str]:
        return forms(self.vocabulary, f"concept set {self.name!r}")


def load_concepts(source: str | Path | ConceptSet, reading: str | None = None) -> ConceptSet:
    """A concept set by its name in `data/concepts`, from a YAML file, or as it is. A file has
    `question` and `vocabulary` (term → list of synonyms, possibly empty), and optionally `lead`,
    `end`, `reading` and `name` (default: the file's name). An unknown name or a file of another
    form is a ValueError or FileNotFoundError of one line."""
    if not isinstance(source, ConceptSet):
        path, folder = Path(source), data_folder() / "concepts"
        if path.suffix not in {".yaml", ".yml"}:
            path = folder / f"{source}.yaml"
            if not path.is_file():
                raise unknown("concept set", str(source), (f.stem for f in folder.glob("*.yaml")))
        data = {"name": path.stem} | read_yaml(path, "concept set")
        source = checked(ConceptSet, data, path, "concept set")
    return source if reading is None else replace(source, reading=reading)
