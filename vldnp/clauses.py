"""Reading an answer in words: every term that it mentions, and whether it is denied there.

A text is taken apart into lines, sentences and clauses. Four things decide a mention's polarity:
what stands before it in its clause ("no knife", "the dress covers her belly"); what stands after it
("knife: no", "the belly is covered"); the heading or the question that it belongs to ("Not
visible:", "Is there a knife? No."); and two denials cancel each other ("nothing covers her belly").
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

from vldnp.lexicon import (
    ABSENT,
    ADJECTIVES,
    ASKING,
    BEFORE_VALUES,
    CLAUSE_STARTS,
    CONCESSIONS,
    CONSEQUENCES,
    CONTRASTS,
    COPULAS,
    COVERING,
    DENYING_VALUES,
    DETERMINERS,
    ENDS,
    EXCEPTIONS,
    FEMALE,
    FILLERS,
    GARMENTS,
    HARMLESS,
    HIDDEN,
    JOINTS,
    LOOKED,
    MALE,
    MANY,
    NEGATORS,
    NOT_CLAUSES,
    PARTLY,
    PERCEIVED,
    PLACES,
    SHORT_ANSWER,
    SOME,
    VERBS,
    YES,
    tokens,
)

Forms = Mapping[tuple[str, ...], tuple[str, ...]]
"""A written form, as its words → the terms that it stands for: one, or the two sexes' ("genitals"
where the vocabulary has those of both)."""

ALL = "*"
"""What "all of them" mentions."""


class Mention(NamedTuple):
    """A term that an answer names, and whether it is denied there."""

    term: str
    denied: bool


class Span(NamedTuple):
    """The tokens from `start` to before `end` name `terms`."""

    start: int
    end: int
    terms: tuple[str, ...]


# Lines and sentences.


def mentions(text: str, forms: Forms) -> list[Mention]:
    """The terms that `text` mentions, in order, each with whether it is denied there."""
    sentences = list(_sentences(tokens(text)))
    read: list[Mention] = []
    heading = listed = False  # whether the heading above denies its items; whether it has any
    subject: list[int] = []  # the mentions that a line consists of, which the next may speak of
    for k, (sentence, end) in enumerate(sentences):
        if not sentence:
            heading = heading and not (
                listed and end == "\n" == sentences[k - 1][1]
            )  # a blank line
            continue
        spans = find(sentence, forms)
        if not spans:
            if sentence[-1] == ":" and end == "\n":
                heading, listed = _denies(sentence), False
            if sentence[0] in PERCEIVED and value_denies(sentence[1:]):
                for i in subject:
                    read[i] = read[i]._replace(denied=True)
            continue
        new, listed = _clauses(sentence, spans), True
        if end == "?":
            answered = _answered(next((s for s, _ in sentences[k + 1 : k + 4] if s), []))
            if answered is not None:
                new = [m._replace(denied=not answered) for m in new]
            elif sentence[0] in ASKING:  # the question repeated
                new = [m._replace(denied=True) for m in new]
        elif heading or _found_none(sentence[spans[-1].end :]):
            new = [m._replace(denied=True) for m in new]
        alone = sum(span.end - span.start for span in spans) + sentence.count(":") == len(sentence)
        subject = list(range(len(read), len(read) + len(new))) if alone else []
        read += new
    return read


def _found_none(rest: list[str]) -> bool:
    """Whether a sentence ends in "and found none" or "but none are visible"."""
    if "none" not in rest:
        return False
    at = rest.index("none")
    return bool(set(rest[at + 1 : at + 2]) & COPULAS) or (
        at == len(rest) - 1 and bool(set(rest[at - 1 : at]) & LOOKED)
    )


def _answered(sentence: list[str]) -> bool | None:
    """Yes or no, where `sentence` answers a question: "A: no", "It is not"."""
    sentence = [token for token in sentence if token not in {"a", "answer", ":"}]
    for token in (*sentence[:1], *sentence[-1:]):
        if token in YES | {"no", "nope"}:
            return token in YES
    if sentence and set(sentence) <= SHORT_ANSWER:
        return not {"not", "cannot"} & set(sentence)
    return None


def _sentences(tokens_: list[str]) -> Iterator[tuple[list[str], str]]:
    """Sentences, each with the mark that ends it."""
    sentence: list[str] = []
    for token in tokens_:
        if token in ENDS:
            yield sentence, token
            sentence = []
        else:
            sentence.append(token)
    yield sentence, "\n"


def _denies(sentence: list[str]) -> bool:
    return bool(set(sentence) & (NEGATORS | ABSENT | HIDDEN)) and not set(sentence) & CONTRASTS


def find(tokens_: list[str], forms: Forms) -> list[Span]:
    """Every match of a form, the longest at each place, left to right."""
    longest = max(map(len, forms), default=0)
    known = {term for terms in forms.values() for term in terms}
    spans, i = [], 0
    while i < len(tokens_):
        for length in range(min(longest, len(tokens_) - i), 0, -1):
            if (terms := forms.get(tuple(tokens_[i : i + length]))) is not None:
                spans.append(Span(i, i + length, terms))
                break
        else:
            if (length := _all(tokens_, i)) > 0:
                spans.append(Span(i, i + length, (ALL,)))
        i += max(length, 1)
    return [_of_its_sex(span, tokens_, known) for span in spans]


def _all(tokens_: list[str], i: int) -> int:
    """How many tokens from `i` on say "all of them"; 0 where they do not."""
    if tokens_[i] not in {"all", "each", "everything"}:
        return 0
    end = i + 1
    while end < len(tokens_) and tokens_[end] in FILLERS:
        end += 1
    alone = len(tokens_) == 1 and tokens_[i] != "each"
    return end - i if alone or set(tokens_[i:end]) & MANY else 0


def _of_its_sex(span: Span, tokens_: list[str], known: set[str]) -> Span:
    """ "The man's breasts" are male, "her bare chest" is female, where the vocabulary has both."""
    pairs = {term: term.partition("male ")[2] for term in span.terms if "male " in term}
    if not pairs or {"male", "female"} & set(tokens_[span.start : span.end]):
        return span
    after = [t for t in tokens_[span.end : span.end + 4] if t not in {"of", "a", "an", "the", "on"}]
    near = after[1:2] if after[:1] and after[0] in "(:" else after[:1]
    near = near if after[:1] == near or after[0] in "(:" else []
    before = [t for t in tokens_[: span.start] if t not in {"male", "female"}]
    adjacent = tokens_[max(span.start - 2, 0) : span.start]
    inside = tokens_[span.start : span.end]
    for word in (*near, *reversed(inside), *reversed(adjacent), *reversed(before)):
        if word in MALE | FEMALE:
            sex = "male" if word in MALE else "female"
            terms = tuple(dict.fromkeys(f"{sex} {tail}" for tail in pairs.values()))
            return span._replace(terms=terms) if set(terms) <= known else span
    return span


# Clauses.


@dataclass(frozen=True)
class _Scope:
    """What is in force at a place of a sentence.

    Attributes:
        denial: the negator in force, "" where there is none.
        covered: something covers what follows.
        named: a term was named since the denial began.
        complete: the denial has its predicate ("no knife is visible").
        bare: a garment was denied, so that what it would cover is bare.
        excepted: what follows is excepted from all.
    """

    denial: str = ""
    at: int = 0
    covered: bool = False
    named: bool = False
    complete: bool = False
    bare: bool = False
    excepted: bool = False

    @property
    def denies(self) -> bool:
        return bool(self.denial) or self.covered or self.excepted


_OPEN = _Scope()


def _clauses(sentence: list[str], spans: list[Span]) -> list[Mention]:
    after, used = _denied_afterwards(sentence, spans)
    starts = {span.start: span for span in spans}
    scope, outer, everything = _OPEN, [], False
    read: list[Mention] = []
    conceding, i = False, 0
    while i < len(sentence):
        token = sentence[i]
        if span := starts.get(i):
            denied = after.get(i)
            denied = scope.denies if denied is None else denied
            read += [Mention(term, denied) for term in span.terms]
            everything = everything or span.terms == (ALL,)
            scope = replace(scope, named=True)
            i = span.end
            continue
        if token == "(":
            outer.append(scope)
        elif token == ")":
            scope = outer.pop() if outer else _OPEN
        elif everything and token in EXCEPTIONS:
            scope = replace(scope, excepted=True)
        elif i not in used:
            conceding = conceding or token in CONCESSIONS
            scope = _next(scope, sentence, i, starts, conceding)
        i += 1
    return read


def _next(scope: _Scope, sentence: list[str], i: int, starts: Mapping, conceding: bool) -> _Scope:
    """The scope after the token at `i`, which is no mention."""
    token = sentence[i]
    before = sentence[i - 1] if i else ""
    after, second = [*sentence[i + 1 : i + 3], "", ""][:2]
    if scope.excepted:
        return scope
    if token in {"instead", "rather"} and after in {"of", "than"}:
        return _Scope("not", i)
    if token == "other" and after == "than":
        return _OPEN
    if token in CONTRASTS or (token == "doubt" and before in {"no", "a", "any"}):
        return _OPEN
    if token in {",", "and"}:
        return _OPEN if _ends(scope, sentence, i, starts, conceding) else scope
    if token == "free" and after in {"of", "from"}:
        return _Scope("free", i)
    if token in NEGATORS:
        idle = after in {",", ":"} | HARMLESS or (after, second) == ("to", "mention")
        return _OPEN if idle else _Scope(token, i)
    if token in HIDDEN | ABSENT and not scope.named:
        # "Covered: belly", "hidden parts: …", "covered feet", "covered from belly to feet"
        heads = ":" in sentence[i + 1 : i + 4]
        if i + 1 in starts or heads or after == "from":
            return replace(scope, covered=not scope.denial, denial="")
    if token in COVERING and before not in DETERMINERS | PARTLY:
        if scope.denial and not scope.named or scope.bare:
            return _OPEN
        return replace(scope, covered=True)
    if token in GARMENTS:
        if scope.denial and not scope.named:
            return _Scope(bare=True)
        if after in {"on", "over", "around"} and not scope.bare:
            return replace(scope, covered=True)
    if scope.denial in ADJECTIVES and not scope.named and i > scope.at + 1:
        if token in VERBS or (token.endswith("ing") and token not in NOT_CLAUSES):
            light = scope.denial == "without" or sentence[max(scope.at - 1, 0)] == "with"
            if light and token not in COVERING:  # "a man with no beard holding a gun"
                return _OPEN
    if token in PLACES and after in DETERMINERS and i + 2 in starts:
        return _OPEN if scope.denial in ADJECTIVES else scope  # "no blood on the knife"
    if token in PERCEIVED and scope.named:
        return replace(scope, complete=True)
    return scope


def _ends(scope: _Scope, sentence: list[str], i: int, starts: Mapping, conceding: bool) -> bool:
    """Whether the comma or "and" at `i` ends the denial in force."""
    rest = [*sentence[i + 1 : i + 8], "", ""]
    following = rest[0]
    if sentence[i] == "and":
        some = scope.denial in ADJECTIVES and following in SOME
        return some or following in CLAUSE_STARTS
    if following in CLAUSE_STARTS | CONSEQUENCES or scope.complete or scope.bare:
        return True
    if following.endswith("ing") and following not in NOT_CLAUSES and i + 1 not in starts:
        return True
    if scope.covered and following in {"bare", "naked", "nude", "visible"}:
        return True
    if following in SOME - {"a", "an", "some"}:
        return True
    if following in DETERMINERS:  # "…, the gun is visible"
        own = rest[: rest.index(",")] if "," in rest else rest
        return conceding or bool(set(own) & {"is", "are"}) and not set(own) & {"or", "nor"}
    return False


# What follows a mention.


def _denied_afterwards(sentence: list[str], spans: list[Span]) -> tuple[dict[int, bool], set[int]]:
    """For the mentions' starts what the words after them say, and the tokens that were used.

    A denied plural or "or" reaches back over its list: "knives and guns are not visible".
    """
    said: dict[int, bool] = {}
    used: set[int] = set()
    reaches_back = False
    for k in range(len(spans) - 1, -1, -1):
        start, end = spans[k].start, spans[k].end
        follows = spans[k + 1].start if k + 1 < len(spans) else len(sentence)
        bare = start and sentence[start - 1] in {"bare", "naked", "exposed", "visible"}
        last = sentence[end:]
        if len(last) in {1, 2} and last[0] in COPULAS and set(sentence[:start]) & HIDDEN:
            said[start] = last[1:] != ["not"]  # "her belly is not covered, but her feet are"
            used |= set(range(end, len(sentence)))
            continue
        denied, length = _predicate(sentence[end:follows], k + 1 < len(spans), bool(bare))
        if denied is not None:
            said[start] = denied
            used |= set(range(end, end + length))
            reaches_back = denied and sentence[end] not in {"is", "was", "in", "under", "wearing"}
        elif k + 1 < len(spans) and said.get(follows):
            between = set(sentence[end:follows])
            if between and between <= JOINTS and (reaches_back or between & {"or", "nor"}):
                said[start] = True
    return said, used


def _predicate(rest: list[str], more: bool, bare: bool) -> tuple[bool | None, int]:
    """What `rest`, between a mention and the next, says of it, and how many tokens say it.

    Args:
        more: another mention follows.
        bare: the mention is called bare.
    """
    skipped = 0
    if rest[:1] and rest[0] in {"of", "in", "on"}:  # "the breasts of the woman are covered"
        for n, token in enumerate(rest[:6]):
            if token in COPULAS:
                skipped = n
                break
            if not token.isalnum():
                break
    elif len(rest) > 2 and rest[1] in COPULAS and rest[0].isalpha() and rest[0] not in COPULAS:
        skipped = 1  # "the knife blade is not visible"
    rest = rest[skipped:]
    if rest in ([",", "no"], [",", "none"]) and not more:
        return True, skipped + 2
    first = rest[0] if rest else ""
    if first in {":", "=", "("}:
        n = next((n for n, token in enumerate(rest) if token not in BEFORE_VALUES), 0)
        denied = _value(rest[n:], strict=first == "(", more=more)
        return denied, skipped + n + 3 if denied is not None else 0
    denied = _state(rest, more, bare)
    return denied, skipped + 4 if denied is not None else 0


def value_denies(rest: list[str]) -> bool:
    """Whether a value, with or without its colon, says no."""
    rest = [token for token in rest if token not in {":", "="}]
    return _value(rest) is True


def _value(rest: list[str], strict: bool = False, more: bool = False) -> bool | None:
    first, second, *_ = [*rest, "", ""]
    if first[:1].isdigit():
        share = "." in first or first.endswith("%")
        value = float(re.match(r"\d+(\.\d+)?", first.replace(",", "."))[0])
        value = value / 100 if first.endswith("%") else value
        return True if value == 0 or (share and value < 0.5) else None
    if first in {"no", "none", "nope"}:
        if set(rest[1:4]) & GARMENTS:
            return False  # "belly: no shirt"
        attached = second in {")", ",", *PERCEIVED} or (second == "" and not more)
        if second in {"other", "others", "of"} or (strict and not attached):
            return None  # "skull (no knife)"
        return True
    if (first, second) == ("n", "a"):
        return True
    if first in DENYING_VALUES:
        return True
    return _state(rest, more, False)


def _state(rest: list[str], more: bool, bare: bool) -> bool | None:
    """What a predicate says of its subject: "is not visible", "are covered by …", "in boots"."""
    first, second, third, *_ = [*rest, "", "", ""]
    if first in {"no", "none", "false"}:  # "knife none"
        return True if second in {"", ","} and not (second == "" and more) else None
    if first in {"not", "cannot", "never"}:
        if second in HIDDEN:
            return False
        return True if second in PERCEIVED or second == "clearly" else None
    if first in COPULAS:
        while second in {"also", "therefore", "thus", "hence", "all", "both", "still"}:
            rest = [first, *rest[2:]]
            first, second, third, *_ = [*rest, "", "", ""]
        if second in {"not", "never", "neither", "cannot"}:
            if third in HIDDEN or third in {"fully", "completely", "entirely"}:
                return False
            seen = third in PERCEIVED | {
                "",
                ",",
                "in",
                "on",
                "within",
                "part",
                "captured",
                "included",
            }
            seen = seen or third.endswith("ly") and third != "only"
            return True if seen or first in {"do", "does", "did", "has", "have"} else None
        if second in {"cut", "cropped", "out", "off", "outside", "unclear", "nowhere", "neither"}:
            return True
        rest = rest[1:]
    first = rest[0] if rest else ""
    if first in {"cut", "cropped", "out", "outside", "off"}:
        return (
            True if set(rest[1:4]) & {"off", "out", "frame", "view", "picture", "image"} else None
        )
    while rest and (rest[0].endswith("ly") or rest[0] in {"all", "both", "also", "well"}):
        if rest[0] in PARTLY:
            return None
        rest = rest[1:]
    first, second, *_ = [*rest, "", ""]
    if first in ABSENT:
        return True
    worn = bool(set(rest[1:6]) & GARMENTS)
    if first in {"in", "inside", "under", "underneath", "beneath", "behind", "within", "wearing"}:
        return True if worn and not bare and not set(rest) & {",", "and", "("} else None
    if first in HIDDEN:
        if more and len(rest) == 1:  # "a blood covered knife"
            return None
        by = worn or set(rest[1:6]) & {"hair", "hands", "hand", "arms", "arm"}
        # "Covered in blood" is there to be seen, "covered with a shirt" is not.
        return None if first == "covered" and second in {"in", "with"} and not by else True
    return None
