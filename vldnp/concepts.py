"""Concept sets: a question for the VLM, and how its answer becomes a negative prompt."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, ClassVar

from pydantic import BeforeValidator, ConfigDict, Field

from vldnp._files import data_folder, unknown
from vldnp._yaml import checked, read_yaml
from vldnp.answers import normal, other_numbers, read

READINGS = ("strict", "official")
KIND = "concept set"
Synonyms = Annotated[tuple[str, ...], BeforeValidator(lambda given: given or ())]


@dataclass(frozen=True)
class ConceptSet:
    """A question for the VLM and the vocabulary in which its answer is read.

    Attributes:
        name: as in records.
        question: what the VLM is asked about every image.
        vocabulary: canonical term → its synonyms. Only terms enter a negative prompt.
        lead: words in front of the terms; may be empty.
        end: a mark at the end of a negative prompt, such as a full stop.
        reading: `strict` (see `parse`), or `official`, the paper's own script: a term is found
            where its letters, as written or capitalised, stand in the answer.
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
        """The terms that an answer names, each once, in the order of `terms`.

        Raises:
            NotUnderstood: the answer cannot be read strictly (`vldnp.answers`).
        """
        if self.reading == "official":
            return tuple(term for term in self.terms if term in answer)
        found = read(answer, self._forms)
        return tuple(term for term in self.terms if term in found)

    def again(self) -> str:
        """The question with the list of terms and the form of the answer, for a second query."""
        terms = ", ".join(self.vocabulary)
        return (
            f"{self.question} Answer with terms of this list, separated by commas, or none: {terms}"
        )

    def negative_prompt(self, found: Iterable[str]) -> str | None:
        """`lead, term, term` and the `end` mark, in the order of `terms`; None for no term.

        Raises:
            ValueError: something that is not among `terms`.
        """
        found = set(found)
        if outside := found.difference(self.terms):
            raise unknown(f"term of {self.name!r}", min(outside), self.vocabulary)
        terms = [term for term in self.terms if term in found]
        return ", ".join([self.lead] * bool(self.lead) + terms) + self.end if terms else None

    def describe(self) -> dict:
        """Everything that decides its negative prompts, JSON-able."""
        optional = {"end": self.end, "reading": self.reading}
        return {
            "name": self.name,
            "question": self.question,
            "lead": self.lead,
            "vocabulary": {term: list(synonyms) for term, synonyms in self.vocabulary.items()},
            **{k: v for k, v in optional.items() if v not in ("", "strict")},
        }

    @cached_property
    def _forms(self) -> dict[str, str]:
        """Every written form → its term. Given forms precede derived plurals and singulars."""
        forms: dict[str, str] = {}
        for term, synonyms in self.vocabulary.items():
            for written in map(normal, (term, *synonyms)):
                if not written or forms.setdefault(written, term) != term:
                    other = forms.get(written, "nothing")
                    raise ValueError(
                        f"concept set {self.name!r}: {written!r} stands for both {other!r} and "
                        f"{term!r}; keep it in one"
                    )
        for written, term in list(forms.items()):
            for form in other_numbers(written):
                forms.setdefault(form, term)
        return forms


def load_concepts(source: str | Path | ConceptSet, reading: str | None = None) -> ConceptSet:
    """A concept set by its name in `data/concepts`, from a YAML file, or as it is.

    The file has `question` and `vocabulary` (term → list of synonyms, possibly empty), and
    optionally `lead`, `end`, `reading` and `name` (default: the file's name).

    Raises:
        ValueError, FileNotFoundError: an unknown name or a file of another form; one line.
    """
    concepts = source if isinstance(source, ConceptSet) else _opened(source)
    return concepts if reading is None else replace(concepts, reading=reading)


def _opened(source: str | Path) -> ConceptSet:
    path = Path(source)
    if path.suffix not in {".yaml", ".yml"}:
        folder = data_folder() / "concepts"
        path = folder / f"{source}.yaml"
        if not path.is_file():
            raise unknown(KIND, str(source), (file.stem for file in folder.glob("*.yaml")))
    return checked(ConceptSet, {"name": path.stem} | read_yaml(path, KIND), path, KIND)
