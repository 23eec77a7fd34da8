"""Concept sets: what to look for, as data. An answer → the concepts found → a negative prompt."""

import re
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import yaml

from vldnp.files import data_folder, unknown


@dataclass(frozen=True)
class ConceptSet:
    """A question for the VLM and the vocabulary in which its answer is understood.

    Attributes:
        name: as in records.
        question: what the VLM is asked about every picture.
        vocabulary: canonical term → its synonyms. Only these terms get into a negative prompt.
        lead: words put before the terms; may be empty. It should name no term itself.
        end: a mark put at the very end of a negative prompt, such as a full stop.
    """

    name: str
    question: str
    vocabulary: Mapping[str, tuple[str, ...]] = field(hash=False)
    lead: str = ""
    end: str = ""

    def __post_init__(self):
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
        found = {term for term, denied in _mentions(_tokens(answer), self._forms) if not denied}
        return tuple(term for term in self.vocabulary if term in found)

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
        """Everything that decides its negative prompts, JSON-able."""
        vocabulary = {term: list(synonyms) for term, synonyms in self.vocabulary.items()}
        return {
            "name": self.name,
            "question": self.question,
            "lead": self.lead,
            "vocabulary": vocabulary,
            **({"end": self.end} if self.end else {}),
        }

    @property
    def written_forms(self) -> tuple[str, ...]:
        """Every form that an answer may name a term by: terms, synonyms, plurals."""
        return tuple(" ".join(words) for words in self._forms)

    @cached_property
    def _forms(self) -> dict[tuple[str, ...], str]:
        """Every written form, as its words → the term. Given forms go before derived ones."""
        forms: dict[tuple[str, ...], str] = {}
        for term, synonyms in self.vocabulary.items():
            for written in (term, *synonyms):
                words = tuple(_words(written))
                if not words:
                    raise ValueError(f"{written!r} in concept set {self.name!r} has no word in it")
                if forms.setdefault(words, term) != term:
                    raise ValueError(
                        f"{written!r} in concept set {self.name!r} belongs to both "
                        f"{forms[words]!r} and {term!r}; keep it in one"
                    )
        for words, term in list(forms.items()):
            for last in _other_numbers(words[-1]):
                forms.setdefault((*words[:-1], last), term)
        return forms


def load_concepts(source: str | Path | ConceptSet) -> ConceptSet:
    """A concept set by its name in `data/concepts`, or from a YAML file, or as it is.

    The file has `question` and `vocabulary` (term → list of synonyms, possibly empty), and
    optionally `lead`, `end` and `name` (default: the file's name).

    Raises:
        ValueError, FileNotFoundError: an unknown name, or a file that is not such a set; one line
            that says which.
    """
    if isinstance(source, ConceptSet):
        return source
    path = Path(source)
    if path.suffix not in {".yaml", ".yml"}:
        folder = data_folder() / "concepts"
        path = folder / f"{source}.yaml"
        if not path.is_file():
            raise unknown("concept set", str(source), (file.stem for file in folder.glob("*.yaml")))
    if not path.is_file():
        raise FileNotFoundError(f"no concept set {path}: there is no such file")
    try:
        data = yaml.load(path.read_text(encoding="utf-8"), _UniqueKeys)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"concept set {path} cannot be read: {reason}") from error
    return _from_yaml(data, path)


class _UniqueKeys(yaml.SafeLoader):
    """YAML keeps the last of two equal keys in silence; a term written twice is a mistake."""

    def construct_mapping(self, node, deep=False):
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for position, key in enumerate(keys):
            if key in keys[:position]:
                line = node.value[position][0].start_mark.line + 1
                raise yaml.YAMLError(f"{key!r} stands twice, the second time in line {line}")
        return super().construct_mapping(node, deep)


def _from_yaml(data: object, path: Path) -> ConceptSet:
    if not isinstance(data, dict):
        raise ValueError(f"concept set {path} must be a mapping with question and vocabulary")
    known = {"name", "question", "vocabulary", "lead", "end"}
    if extra := data.keys() - known:
        raise unknown(f"key in concept set {path.name}", sorted(map(str, extra))[0], known)
    for key in ("question", "vocabulary"):
        if not data.get(key):
            raise ValueError(f"concept set {path} has no {key}")
    texts = {"name": path.stem, "lead": "", "end": "", **data}
    vocabulary = texts.pop("vocabulary")
    for key, text in texts.items():
        if not isinstance(text, str):
            raise ValueError(f"concept set {path}: {key} must be a text, not {text!r}")
    if not isinstance(vocabulary, dict):
        raise ValueError(f"concept set {path}: vocabulary must map each term to its synonyms")
    for term, synonyms in vocabulary.items():
        # YAML reads an unquoted `no` as a boolean and `7` as a number.
        if not isinstance(synonyms, list | None) or not all(
            isinstance(written, str) for written in (term, *(synonyms or ()))
        ):
            raise ValueError(f"concept set {path}: {term!r} must map to a list of texts")
    return ConceptSet(vocabulary={t: tuple(s or ()) for t, s in vocabulary.items()}, **texts)


# Reading an answer. Tokens are words and the few marks that mean something for negation.

_TOKEN = re.compile(r"[^\W_]+|[.!?;\n\]}]|,|[:=]")
_SENTENCE_ENDS = frozenset(".!?;\n]}")
_VALUE_MARKS = frozenset(":=?")

_NEGATORS = frozenset(
    "no not none without never cannot cant dont doesnt isnt arent neither nor nothing zero "
    "lack lacks lacking absence unable devoid nobody".split()
)
"""These deny what follows them in their clause."""
_CONTRASTS = frozenset(
    "but however though although except besides apart aside yet only just doubt instead while "
    "whereas yes".split()
)
"""These end a denial: "no knife but a skull", "not only a knife"."""
_CLAUSE_STARTS = frozenset("there i it this that he she they we you".split())
"""After a comma or "and", these begin a new clause, which ends a denial."""
_CONSEQUENCES = frozenset("so thus revealing exposing leaving showing".split())
"""After a comma, these tell what follows from the denied thing: "no top, so her breasts …"."""
_CONCESSIONS = frozenset("while although though whereas".split())
"""In their sentence, a comma and a determiner end a denial: "although there is no …, the …"."""
_DETERMINERS = frozenset("a an the his her its their".split())
_COPULAS = frozenset("is are was were can could do does did has have be".split())
_DENYING_VALUES = frozenset("no none not false absent missing never null nil 0".split())
_ABSENT = frozenset({"absent", "missing", "nowhere"})
_HIDDEN = frozenset("covered hidden concealed obscured clothed".split())
_WHOLLY = frozenset("fully completely entirely totally all".split())
_PERCEIVED = frozenset("visible seen present found shown detected depicted be apparent".split())
_JOINTS = frozenset(", and or nor a an the any".split())


def _tokens(text: str) -> list[str]:
    text = unicodedata.normalize("NFKC", str(text)).casefold().replace("’", "'")
    text = re.sub(r"n't\b", " not", text)
    text = re.sub(r"[❌✗✘🚫]", " no ", text)
    text = re.sub(r"[✅✓✔]", " yes ", text)
    text = re.sub(r"\s[-–—]+\s|[–—]", " : ", text)  # "knife - none" reads like "knife: none"
    return _TOKEN.findall(text)


def _words(text: str) -> list[str]:
    return [token for token in _tokens(text) if token[0].isalnum()]


def _other_numbers(word: str) -> list[str]:
    """Simple plurals of `word`, and its singular where it looks like a plural."""
    if word.endswith(("s", "x", "z", "ch", "sh")):
        forms = [word + "es"]
    elif word.endswith("y") and word[-2:-1] not in tuple("aeiou"):
        forms = [word[:-1] + "ies"]
    elif word.endswith("fe"):
        forms = [word[:-2] + "ves"]
    else:
        forms = [word + "s"]
    if len(word) > 3 and word.endswith("s") and not word.endswith(("ss", "us", "is")):
        forms.append(word[:-1])
    return forms


def _mentions(tokens: list[str], forms: Mapping[tuple[str, ...], str]) -> list[tuple[str, bool]]:
    """The terms that `tokens` mention, in order, each with whether it is denied there."""
    spans = _spans(tokens, forms)
    denied_after, used = _denied_afterwards(tokens, spans)
    mentions = []
    ends = {start: (end, term) for start, end, term in spans}
    denying, i = False, 0
    conceding = predicated = named = False  # in this sentence; in this denial
    while i < len(tokens):
        token, following = tokens[i], tokens[i + 1] if i + 1 < len(tokens) else "."
        if i in ends:
            end, term = ends[i]
            mentions.append((term, denying or i in denied_after))
            named = True
            i = end
            continue
        if token in _SENTENCE_ENDS:
            denying = conceding = False
        elif token in _CONTRASTS:
            denying, conceding = False, conceding or token in _CONCESSIONS
        elif token in {",", "and"} and following in _CLAUSE_STARTS:
            denying = False
        elif token == "," and (
            predicated or following in _CONSEQUENCES or (conceding and following in _DETERMINERS)
        ):
            denying = False
        elif token == "free" and following == "of":
            denying, predicated, named = True, False, False
        elif token in _NEGATORS and i not in used:
            # "No, …" and "…: no" answer a question; they deny nothing that follows.
            denying = following != "," and (i == 0 or tokens[i - 1] not in _VALUE_MARKS)
            predicated = named = False
        elif token in _PERCEIVED:
            # "No knife is visible, …": the denial is complete; "no visible knife, …": it is not.
            predicated = predicated or named
        i += 1
    return mentions


def _spans(tokens: list[str], forms: Mapping[tuple[str, ...], str]) -> list[tuple[int, int, str]]:
    """(start, end, term) of every match, the longest at each place, left to right."""
    longest = max(map(len, forms))
    spans, i = [], 0
    while i < len(tokens):
        for length in range(min(longest, len(tokens) - i), 0, -1):
            if (term := forms.get(tuple(tokens[i : i + length]))) is not None:
                spans.append((i, i + length, term))
                i += length
                break
        else:
            i += 1
    return spans


def _denied_afterwards(
    tokens: list[str], spans: list[tuple[int, int, str]]
) -> tuple[set[int], set[int]]:
    """Starts of the matches denied by what follows them, and the negators that did it.

    "Knife: no", "a knife is not visible", "knife (none)"; a denied plural or "or" reaches back
    over its list: "knives and guns are not visible".
    """
    denied: set[int] = set()
    used: set[int] = set()
    reach_back = False
    for k in range(len(spans) - 1, -1, -1):
        start, end, _ = spans[k]
        rest = tokens[end : end + 4] + ["."] * 4
        denial = _denial(rest)
        if denial is not None:
            denied.add(start)
            used.add(end + denial)
            reach_back = rest[0] not in {"is", "was"} and rest[0] not in _VALUE_MARKS
        elif k + 1 < len(spans) and spans[k + 1][0] in denied:
            between = tokens[end : spans[k + 1][0]]
            joined = bool(between) and set(between) <= _JOINTS
            if joined and (reach_back or {"or", "nor"} & set(between)):
                denied.add(start)
    return denied, used


def _denial(rest: list[str]) -> int | None:
    """Where in the tokens after a match its denial stands; None if it is not denied."""
    if rest[0] in _VALUE_MARKS:
        return 1 if rest[1] in _DENYING_VALUES else None
    if rest[0] in {"no", "none", "false"}:  # "knife (none), skull (yes)"
        return 0 if rest[1] in _SENTENCE_ENDS or rest[1] == "," else None
    if rest[0] in _ABSENT:
        return 0
    if rest[0] in {"not", "cannot"}:
        return 0 if rest[1] in _PERCEIVED else None
    if rest[0] in _COPULAS:
        if rest[1] in _ABSENT:
            return 1
        wholly = rest[1] in _WHOLLY
        if rest[1 + wholly] in _HIDDEN and rest[2 + wholly] not in {"in", "with"}:
            return 1 + wholly  # but "covered in blood" is there to be seen
        if rest[1:4] == ["out", "of", "frame"] or rest[1:4] == ["out", "of", "view"]:
            return 1
        if rest[1] in {"not", "never"} and rest[2] not in {"a", "an", "the", "only", "just"}:
            return 1
    return None
