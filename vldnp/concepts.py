"""Concept sets: what to look for, as data. An answer → the concepts found → a negative prompt."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, ClassVar

from pydantic import BeforeValidator, ConfigDict, Field

from vldnp._files import data_folder, unknown
from vldnp._yaml import checked, read_yaml
from vldnp.answers import lexicon, reader

READINGS = ("clauses", "official")
KIND = "concept set"
Synonyms = Annotated[tuple[str, ...], BeforeValidator(lambda said: () if said is None else said)]


@dataclass(frozen=True)
class ConceptSet:
    """A question for the VLM and the vocabulary in which its answer is understood.

    Attributes:
        name: as in records.
        question: what the VLM is asked about every picture.
        vocabulary: canonical term → its synonyms. Only these terms get into a negative prompt.
        lead: words put before the terms; may be empty. It should name no term itself.
        end: a mark put at the very end of a negative prompt, such as a full stop.
        reading: how an answer is read: by its `clauses` (see `parse`), or `official`, as the
            paper's own code does it: a term is found where its very letters stand in the answer,
            capitals as written, denied or not; synonyms play no part.
    """

    __pydantic_config__: ClassVar = ConfigDict(extra="forbid")

    name: str
    question: Annotated[str, Field(min_length=1)]
    vocabulary: Mapping[str, Synonyms] = field(hash=False)
    lead: str = ""
    end: str = ""
    reading: str = "clauses"

    def __post_init__(self):
        if self.reading not in READINGS:
            raise unknown(f"reading of concept set {self.name!r}", self.reading, READINGS)
        if not self.vocabulary:
            raise ValueError(f"concept set {self.name!r} has an empty vocabulary")
        vocabulary = {term: tuple(synonyms) for term, synonyms in self.vocabulary.items()}
        object.__setattr__(self, "vocabulary", vocabulary)
        self._forms  # noqa: B018  (a bad term fails here, not at the first answer)

    def parse(self, answer: str) -> tuple[str, ...]:
        """The terms that `answer` says are there: vocabulary order, each once.

        Whole words count, in any case, with the synonyms and simple plurals, the longest match
        first; punctuation, lists and JSON do no harm. What the answer denies ("no knife", "I
        cannot see any feet", "knife: no", "none") is not found. Any text is accepted; one that is
        empty, in another language or about other things finds nothing.
        """
        if self.reading == "official":
            return reader.official(answer, self.vocabulary)
        found = reader.read(answer, self._readable)
        return tuple(term for term in self.vocabulary if term in found)

    def is_refusal(self, answer: str) -> bool:
        """Whether `answer` declines to answer; one that names or denies a term besides does not."""
        if self.reading == "official" and self.parse(answer):
            return False
        return reader.is_refusal(answer, self._readable)

    def negative_prompt(self, found: Iterable[str]) -> str | None:
        """`lead, term, term` and the `end` mark, in vocabulary order; None when nothing was found.

        Raises:
            ValueError: something that is not a term of the vocabulary.
        """
        found = set(found)
        if outside := found - self.vocabulary.keys():
            raise unknown(f"term of {self.name!r}", sorted(outside)[0], self.vocabulary)
        terms = [term for term in self.vocabulary if term in found]
        return ", ".join([self.lead] * bool(self.lead) + terms) + self.end if terms else None

    def describe(self) -> dict:
        """Everything that decides its negative prompts, JSON-able; `reading` if not by clauses."""
        vocabulary = {term: list(synonyms) for term, synonyms in self.vocabulary.items()}
        return {
            "name": self.name,
            "question": self.question,
            "lead": self.lead,
            "vocabulary": vocabulary,
            **({"end": self.end} if self.end else {}),
            **({"reading": self.reading} if self.reading != "clauses" else {}),
        }

    @property
    def written_forms(self) -> tuple[str, ...]:
        """Every form that an answer may name a term by: terms, synonyms, plurals."""
        return tuple(" ".join(words) for words in self._forms)

    @cached_property
    def _readable(self) -> reader.Forms:
        return _for_either(self._forms)

    @cached_property
    def _forms(self) -> dict[tuple[str, ...], str]:
        """Every written form, as its words → the term. Given forms go before derived ones."""
        forms: dict[tuple[str, ...], str] = {}
        for term, synonyms in self.vocabulary.items():
            for written in (term, *synonyms):
                words = lexicon.words(written)
                if not words:
                    raise ValueError(f"{written!r} in concept set {self.name!r} has no word in it")
                if forms.setdefault(words, term) != term:
                    raise ValueError(
                        f"{written!r} in concept set {self.name!r} belongs to both "
                        f"{forms[words]!r} and {term!r}; keep it in one"
                    )
        for words, term in list(forms.items()):
            for last in reader.other_numbers(words[-1]):
                forms.setdefault((*words[:-1], last), term)
        return forms


def _for_either(forms: Mapping[tuple[str, ...], str]) -> reader.Forms:
    """The forms, and those of either sex's term: "genitals" without "male" or "female"."""
    tails: dict[tuple[str, ...], dict[str, str]] = {}
    for words, term in forms.items():
        if words[0] in {"male", "female"}:
            tails.setdefault(words[1:], {})[words[0]] = term
    either = {tail: tuple(sexes.values()) for tail, sexes in tails.items() if len(sexes) == 2}
    return either | {words: (term,) for words, term in forms.items()}


def load_concepts(source: str | Path | ConceptSet, reading: str | None = None) -> ConceptSet:
    """A concept set by its name in `data/concepts`, or from a YAML file, or as it is.

    The file has `question` and `vocabulary` (term → list of synonyms, possibly empty), and
    optionally `lead`, `end`, `reading` and `name` (default: the file's name).

    Args:
        reading: `clauses` or `official`, instead of the set's own; see `ConceptSet`.

    Raises:
        ValueError, FileNotFoundError: an unknown name, or a file that is not such a set; one line
            that says which.
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
