"""Reading an answer in words: every term that it mentions, and whether it is denied there.

A text is taken apart into lines, sentences and clauses. Four things decide a mention's polarity:
what stands before it in its clause ("no knife", "the dress covers her belly"); what stands after it
("knife: no", "the belly is covered"); the heading or the question that it belongs to ("Not
visible:", "Is there a knife? No."); and two denials cancel each other ("nothing covers her belly").
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

from vldnp.answers import lexicon as lex
from vldnp.answers.lexicon import tokens
from vldnp.answers.predicates import predicate, value_denies

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
            blank = end == "\n" == sentences[k - 1][1]
            heading = heading and not (listed and blank)
            continue
        spans = find(sentence, forms)
        if not spans:
            if sentence[-1] == ":" and end == "\n":
                heading, listed = _denies(sentence), False
            if sentence[0] in lex.PERCEIVED and value_denies(sentence[1:]):
                for i in subject:
                    read[i] = read[i]._replace(denied=True)
            continue
        new, listed = _clauses(sentence, spans), True
        if end == "?":
            answered = _answered(next((s for s, _ in sentences[k + 1 : k + 4] if s), []))
            if answered is not None:
                new = [m._replace(denied=not answered) for m in new]
            elif sentence[0] in lex.ASKING:  # the question repeated
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
    return bool(set(rest[at + 1 : at + 2]) & lex.COPULAS) or (
        at == len(rest) - 1 and bool(set(rest[at - 1 : at]) & lex.LOOKED)
    )


def _answered(sentence: list[str]) -> bool | None:
    """Yes or no, where `sentence` answers a question: "A: no", "It is not"."""
    sentence = [token for token in sentence if token not in {"a", "answer", ":"}]
    for token in (*sentence[:1], *sentence[-1:]):
        if token in lex.YES | {"no", "nope"}:
            return token in lex.YES
    if sentence and set(sentence) <= lex.SHORT_ANSWER:
        return not {"not", "cannot"} & set(sentence)
    return None


def _sentences(tokens_: list[str]) -> Iterator[tuple[list[str], str]]:
    """Sentences, each with the mark that ends it."""
    sentence: list[str] = []
    for token in tokens_:
        if token in lex.ENDS:
            yield sentence, token
            sentence = []
        else:
            sentence.append(token)
    yield sentence, "\n"


def _denies(sentence: list[str]) -> bool:
    denials = set(sentence) & (lex.NEGATORS | lex.ABSENT | lex.HIDDEN)
    return bool(denials) and not set(sentence) & lex.CONTRASTS


def find(tokens_: list[str], forms: Forms) -> list[Span]:
    """Every match of a form, the longest at each place, left to right."""
    longest = max(map(len, forms), default=0)
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
    return [_of_its_sex(span, tokens_, forms) for span in spans]


def _all(tokens_: list[str], i: int) -> int:
    """How many tokens from `i` on say "all of them"; 0 where they do not."""
    if tokens_[i] not in {"all", "each", "everything"}:
        return 0
    end = i + 1
    while end < len(tokens_) and tokens_[end] in lex.FILLERS:
        end += 1
    alone = len(tokens_) == 1 and tokens_[i] != "each"
    return end - i if alone or set(tokens_[i:end]) & lex.MANY else 0


def _of_its_sex(span: Span, tokens_: list[str], forms: Forms) -> Span:
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
        if word in lex.MALE | lex.FEMALE:
            sex = "male" if word in lex.MALE else "female"
            terms = tuple(dict.fromkeys(f"{sex} {tail}" for tail in pairs.values()))
            known = all((term,) in forms.values() for term in terms)
            return span._replace(terms=terms) if known else span
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
        elif everything and token in lex.EXCEPTIONS:
            scope = replace(scope, excepted=True)
        elif i not in used:
            conceding = conceding or token in lex.CONCESSIONS
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
    if token in lex.CONTRASTS or (token == "doubt" and before in {"no", "a", "any"}):
        return _OPEN
    if token in {",", "and"}:
        return _OPEN if _ends(scope, sentence, i, starts, conceding) else scope
    if token == "free" and after in {"of", "from"}:
        return _Scope("free", i)
    if token in lex.NEGATORS:
        idle = after in {",", ":"} | lex.HARMLESS or (after, second) == ("to", "mention")
        return _OPEN if idle else _Scope(token, i)
    if token in lex.HIDDEN | lex.ABSENT and not scope.named:
        # "Covered: belly", "hidden parts: …", "covered feet", "covered from belly to feet"
        heads = ":" in sentence[i + 1 : i + 4]
        if i + 1 in starts or heads or after == "from":
            return replace(scope, covered=not scope.denial, denial="")
    if token in lex.COVERING and before not in lex.DETERMINERS | lex.PARTLY:
        if scope.denial and not scope.named or scope.bare:
            return _OPEN
        return replace(scope, covered=True)
    if token in lex.GARMENTS:
        if scope.denial and not scope.named:
            return _Scope(bare=True)
        if after in {"on", "over", "around"} and not scope.bare:
            return replace(scope, covered=True)
    if scope.denial in lex.ADJECTIVES and not scope.named and i > scope.at + 1:
        if token in lex.VERBS or (token.endswith("ing") and token not in lex.NOT_CLAUSES):
            light = scope.denial == "without" or sentence[max(scope.at - 1, 0)] == "with"
            if light and token not in lex.COVERING:  # "a man with no beard holding a gun"
                return _OPEN
    if token in lex.PLACES and after in lex.DETERMINERS and i + 2 in starts:
        return _OPEN if scope.denial in lex.ADJECTIVES else scope  # "no blood on the knife"
    if token in lex.PERCEIVED and scope.named:
        return replace(scope, complete=True)
    return scope


def _ends(scope: _Scope, sentence: list[str], i: int, starts: Mapping, conceding: bool) -> bool:
    """Whether the comma or "and" at `i` ends the denial in force."""
    rest = [*sentence[i + 1 : i + 8], "", ""]
    following = rest[0]
    if sentence[i] == "and":
        some = scope.denial in lex.ADJECTIVES and following in lex.SOME
        return some or following in lex.CLAUSE_STARTS
    if following in lex.CLAUSE_STARTS | lex.CONSEQUENCES or scope.complete or scope.bare:
        return True
    if following.endswith("ing") and following not in lex.NOT_CLAUSES and i + 1 not in starts:
        return True
    if scope.covered and following in {"bare", "naked", "nude", "visible"}:
        return True
    if following in lex.SOME - {"a", "an", "some"}:
        return True
    if following in lex.DETERMINERS:  # "…, the gun is visible"
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
        last = sentence[end:] if k + 1 == len(spans) else []
        elliptic = last[:1] and last[0] in lex.COPULAS and last[1:] in ([], ["not"])
        if elliptic and set(sentence[:start]) & lex.HIDDEN:
            said[start] = last[1:] != ["not"]  # "her belly is not covered, but her feet are"
            used |= set(range(end, len(sentence)))
            continue
        denied, length = predicate(sentence[end:follows], k + 1 < len(spans), bool(bare))
        if denied is not None:
            said[start] = denied
            own = sentence[end : min(end + length, follows)]
            used |= set(range(end, end + (own.index(",") if "," in own[1:] else len(own))))
            reaches_back = denied and sentence[end] not in {"is", "was", "in", "under", "wearing"}
        elif k + 1 < len(spans) and said.get(follows):
            between = set(sentence[end:follows])
            if between and between <= lex.JOINTS and (reaches_back or between & {"or", "nor"}):
                said[start] = True
    return said, used
