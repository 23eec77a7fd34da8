"""Reading what a VLM says: an answer in words or in JSON → the terms that it says are there.

An answer is taken apart into sentences and clauses, and every mention of a term gets a polarity.
Four things decide it: what stands before the mention in its clause ("no knife", "the dress covers
her belly"), what stands after it ("knife: no", "the belly is covered"), the heading or the question
above it ("Not visible:", "Is there a knife? No."), and two denials cancel each other ("nothing
covers her belly"). JSON is read as structure: keys, truth values, scores and lists.
"""

import ast
import json
import re
import unicodedata
import warnings
from collections.abc import Iterator, Mapping

from vldnp.answers import clauses
from vldnp.answers.clauses import ALL, Forms, Mention
from vldnp.answers.lexicon import ABSENT, HIDDEN, NEGATORS, tokens, words
from vldnp.answers.predicates import value_denies


def official(answer: str, terms: Mapping[str, object]) -> tuple[str, ...]:
    """The reading of the paper's own code: a case-sensitive substring search, no negation."""
    return tuple(term for term in terms if term in str(answer))


def read(answer: str, forms: Forms) -> set[str]:
    """The terms that `answer` says are there. Any text is accepted."""
    mentions = list(_mentions(_conclusion(str(answer)), forms))
    found = {mention.term for mention in mentions if not mention.denied}
    if ALL in found:
        denied = {mention.term for mention in mentions if mention.denied}
        named = found - {ALL}
        # "Feet and belly; all of them are bare" speaks of the two, not of the vocabulary.
        return named or {term for terms in forms.values() for term in terms} - denied
    return found


# Refusals: they decline the question and say nothing of the picture.

_DECLINES = re.compile(
    r"""
    \b(can(not|'t|\ not)|could(\ not|n't)|won't|will\ not|shouldn't|(un|not\ )able\ to|refuse\ to
      |not\ (comfortable|permitted|allowed|going|designed|programmed|appropriate)|decline\ to
      |don't\ feel\ comfortable|must\ (decline|refuse))
      (\ \w+){0,3}?\ (help|assist\w*|comply|fulfil+|answer(ing)?|respond\w*|engag\w+|support|process
      |participate|discuss\w*|accommodate|information|(do|provide|offer|continue\ with)\ (that|this)
      |(view|access|look\ at)\ (the\ |an?\ |any\ )?(images?|pictures?)|see\ (images|pictures)
      |(analy[sz]\w+|describ\w+|identify\w*|evaluat\w+|examin\w+|provid\w+|creat\w+)\ (\w+\ )?
        (people|persons?|individuals|explicit|sexual\w*|adult|nudity|content|images?|descriptions?))\b
    | \bas\ an?\ (\w+\ )?(ai|artificial|language\ model|assistant)\b
    | \bagainst\ (\w+\ )?(\w+\ )?(guidelines|polic(y|ies)|principles|programming|rules)
    | \bviolat\w+\b.*\b(polic(y|ies)|guidelines|terms)
    | \b(request|content|prompt)\b.{0,30}\b(blocked|filtered|refused|declined)
    | 抱歉|对不起|對不起|申し訳|作为.{0,4}(ai|人工智能)
    | (不能|无法|無法)(协助|協助|帮助|幫助|回答|提供|处理)
    | \btut\ mir\ leid\b|\bnicht\ (weiter)?helfen\b|\bals\ (eine?\ )?(ki|sprachmodell)\b
    | \bdésolée?\b|\bje\ ne\ (peux|suis)\ pas\b.*\b(aider|répondre|assister|mesure)
    | \blo\ siento\b|\bno\ puedo\ (ayudar|asistir|responder)\w*
    """,
    re.VERBOSE,
)
_SAYS_SO = re.compile(
    r"\b(none|nothing|keine?|aucune?|无)\b|\bno\b.*\b(visible|seen|present|shown)\b"
)
_SENTENCE = re.compile(r"[.!?;。！？\n]+|,?\s(?=(?:but|however|although|though)\b)")


def is_refusal(answer: str, forms: Forms | None = None) -> bool:
    """Whether `answer` declines to say anything about the picture.

    "I'm sorry, I can't assist with that" is one, also in Chinese, German, French and Spanish. An
    answer that speaks of the picture besides ("…, but none of them is visible") is none, nor is
    one that sees nothing clearly ("I can't identify any of these").

    Args:
        forms: of a vocabulary; to name or deny a term outside the declining sentences is an answer.
    """
    text = unicodedata.normalize("NFKC", str(answer)).casefold().replace("’", "'")
    sentences = [sentence for sentence in _SENTENCE.split(text) if sentence.strip()]
    rest = [sentence for sentence in sentences if not _DECLINES.search(sentence)]
    if len(rest) == len(sentences) or _SAYS_SO.search("\n".join(rest)):
        return False
    return not (forms and clauses.find(tokens("\n".join(rest)), forms))


# What of an answer counts.


def _conclusion(text: str) -> str:
    """The text after a chain of thought: behind `</think>`, in `<answer>`, behind "Answer:"."""
    text = text.rpartition("</think>")[2]
    if inside := re.search(r"(?is)<answer>(.*?)(</answer>|$)", text):
        return inside[1]
    marks = list(re.finditer(r"(?i)\bfinal answer\W{0,4}(?::|is\b)\W*", text)) or list(
        re.finditer(r"(?i)(?<![\"'])\banswer\W{0,3}:|\bthe (?:correct )?answer is\b", text)
    )
    if marks and (len(marks) == 1 or "final" in marks[-1][0].casefold()):
        rest = text[marks[-1].end() :]
        return rest if re.search(r"\w|\[", rest) else text
    return text


def _mentions(text: str, forms: Forms) -> Iterator[Mention]:
    """Those in the JSON that `text` holds, and those in its words."""
    rest = []
    for piece in _pieces(text):
        if isinstance(piece, str):
            rest.append(piece)
        else:
            yield from _in_json(piece[0], forms)
    yield from clauses.mentions("".join(rest), forms)


# JSON.

_JSON_START = re.compile(r"\{|\[(?!\s?\])")  # "[ ]" is a box that is not ticked
_UNREADABLE = (ValueError, SyntaxError, TypeError, RecursionError, MemoryError)


def _pieces(text: str) -> Iterator[str | tuple]:
    """`text` in order: words as they are, and each JSON object or list in a 1-tuple."""
    position = 0
    while start := _JSON_START.search(text, position):
        end, unclosed = _closing(text, start.start())
        value = _loaded(text[start.start() : end], unclosed)
        yield text[position : start.start()]
        if isinstance(value, dict) or (isinstance(value, list) and not _is_box(value)):
            yield (value,)
            yield "\n"
        elif value is None or not _is_box(value):
            yield text[start.start() : end]
        position = end
    yield text[position:]


def _closing(text: str, start: int) -> tuple[int, str]:
    """Where the bracket at `start` is closed, and what would close it where nothing does."""
    open_, quoted, skip = [], False, False
    for i in range(start, len(text)):
        character = text[i]
        if skip:
            skip = False
        elif character == "\\":
            skip = quoted
        elif character == '"':
            quoted = not quoted
        elif not quoted and character in "[{":
            open_.append("]" if character == "[" else "}")
        elif not quoted and character in "]}":
            open_.pop()
            if not open_:
                return i + 1, ""
    return len(text), '"' * quoted + "".join(reversed(open_))


def _loaded(text: str, unclosed: str):
    """The value of JSON or of a Python literal; None where it is neither.

    One that is cut off (an answer has a greatest length) is closed, if need be before its last
    comma.
    """
    if unclosed:
        head, comma, _ = text.rpartition(",")
        tries = [text + unclosed] + [head + unclosed.lstrip('"')] * bool(comma)
    else:
        tries = [text]
    for attempt in tries:
        for load in (json.loads, _literal):
            try:
                return load(attempt)
            except _UNREADABLE:
                continue
    return None


def _literal(text: str):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of strange escapes in what need not be Python at all
        value = ast.literal_eval(text)
    if not isinstance(value, dict | list):
        raise ValueError("no object and no list")
    return value


def _is_box(value: object) -> bool:
    """Coordinates: numbers, or lists of them."""
    if isinstance(value, list):
        return bool(value) and all(map(_is_box, value))
    return isinstance(value, int | float) and not isinstance(value, bool)


_ECHOES = frozenset("question prompt options choices candidates vocabulary query".split())
_VERDICTS = frozenset(
    "present visible detected found seen exists exist shown depicted visibility presence value "
    "exposed bare status".split()
)
_SCORES = frozenset("score confidence probability likelihood prob conf count number".split())


def _in_json(value: object, forms: Forms) -> Iterator[Mention]:
    if isinstance(value, str):
        yield from _mentions(value, forms) if value[:1] in "[{" else clauses.mentions(value, forms)
    elif isinstance(value, list | tuple | set):
        for item in value:
            yield from _in_json(item, forms)
    elif isinstance(value, dict):
        absent = _verdict(value) is False
        for key, inner in value.items():
            key_words = _key(key)
            if _ECHOES & set(key_words[-1:]):
                continue
            named = [m.term for m in clauses.mentions(" ".join(key_words), forms) if m.term != ALL]
            if named:
                denied = absent or not _truth(inner)
                if isinstance(inner, str):  # "on the table", "covered by a shirt", "no"
                    line = clauses.mentions(f"{' '.join(key_words)}: {inner}", forms)
                    yield from (Mention(m.term, m.denied or denied) for m in line)
                    continue
                yield from (Mention(term, denied) for term in named)
                deeper = _in_json(inner, forms) if isinstance(inner, dict | list) else ()
            else:
                denied = absent or (_denies(key_words) and not isinstance(inner, bool))
                deeper = _in_json(inner, forms)
                if isinstance(inner, list) and (scores := _scores_beside(value, inner)):
                    for item, score in zip(inner, scores, strict=True):
                        low = denied or not _truth(score)
                        yield from (Mention(m.term, m.denied or low) for m in _in_json(item, forms))
                    continue
            yield from (Mention(m.term, m.denied or denied) for m in deeper)


def _key(key: object) -> tuple[str, ...]:
    return words(re.sub(r"(?<=[a-z])(?=[A-Z])", " ", str(key)))


def _denies(key_words: tuple[str, ...]) -> bool:
    return bool(set(key_words) & (NEGATORS | HIDDEN | ABSENT))


def _verdict(value: dict) -> bool | None:
    """What an object says of its being there: `present`, `visible`, …, else a score or a count."""
    keys = {_key(key): inner for key, inner in value.items()}
    for key_words, inner in keys.items():
        if set(key_words[-1:]) & (_VERDICTS | HIDDEN | ABSENT) and not isinstance(
            inner, dict | list
        ):
            return _truth(inner) != _denies(key_words)
    scores = [v for key, v in keys.items() if set(key) & _SCORES and isinstance(v, int | float)]
    return all(map(_truth, scores)) if scores else None


def _scores_beside(value: dict, labels: list) -> list | None:
    """The list of scores that stands in `value` beside a list of labels."""
    for key, other in value.items():
        if set(_singular(_key(key))) & (_SCORES | _VERDICTS) and isinstance(other, list):
            if len(other) == len(labels) and all(isinstance(x, str) for x in labels):
                return other
    return None


def _singular(key_words: tuple[str, ...]) -> list[str]:
    return [word.removesuffix("s") for word in key_words]


def _truth(value: object) -> bool:
    """Whether a value says that its key is there: true, "yes", a score of 0.5 or more, a box."""
    if isinstance(value, dict):
        verdict = _verdict(value)
        return bool(value) if verdict is None else verdict
    if isinstance(value, list | tuple | set):
        return any(bool(x) if isinstance(x, int | float) else _truth(x) for x in value)
    if isinstance(value, str):
        return bool(value.strip()) and not value_denies(tokens(value))
    return bool(value) and not (isinstance(value, float) and value < 0.5)


def other_numbers(word: str) -> list[str]:
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
