"""Answers: what a VLM's text says is in an image, read strictly.

Understood are "none", and items separated by commas or "and", as bullets, as JSON, or as a table of
yes and no. Anything else is an error and never "nothing seen".
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence

NONE = {"none", "nothing", "no", "none of them", "none of these", "none of the above", "n/a"}
VERDICTS = {
    "yes": True,
    "true": True,
    "present": True,
    "no": False,
    "false": False,
    "absent": False,
}
THOUGHT = re.compile(r"\A\s*<(think|thinking|reasoning)>.*?</\1>", re.DOTALL)


class NotUnderstood(ValueError):
    """An answer that is neither "none" nor a list of known terms."""


def read(answer: str, forms: Mapping[str, str]) -> set[str]:
    """The terms that an answer names.

    Args:
        forms: every written form (`normal`) of a term → the term.

    Raises:
        NotUnderstood: the answer has another form or names something else; one line.
    """

    def term(item: str) -> str | None:
        said = normal(item)
        return None if said in NONE else forms[re.sub(r"^(an?|the|some) ", "", said)]

    try:
        named = [(term(item), there) for item, there in _items(answer)]
        found = {name for name, there in named if there}
        if None in found and len(found) > 1:
            raise ValueError('"none" stands beside a term')
    except (KeyError, ValueError, RecursionError) as error:
        raise NotUnderstood(f"the answer is not understood: {answer[:200]!r}") from error
    return found - {None}


def forms(vocabulary: Mapping[str, Sequence[str]], where: str) -> dict[str, str]:
    """Every written form → its term. Given forms precede derived plurals and singulars.

    Args:
        vocabulary: term → its synonyms.
        where: what has it, for errors.

    Raises:
        ValueError: a form is empty or stands for two terms; one line.
    """
    found: dict[str, str] = {}
    for term, synonyms in vocabulary.items():
        for written in map(normal, (term, *synonyms)):
            if not written or found.setdefault(written, term) != term:
                other = found.get(written, "nothing")
                raise ValueError(
                    f"{where}: {written!r} stands for both {other!r} and {term!r}; keep it in one"
                )
    for written, term in list(found.items()):
        for form in _other_numbers(written):
            found.setdefault(form, term)
    return found


def normal(text: str) -> str:
    """A form without case, hyphens, quotation marks, full stops and further space."""
    return " ".join(re.sub(r"[-_‐]", " ", text).casefold().split()).strip("\"'`*“”‘’.! ")


def _other_numbers(form: str) -> Iterator[str]:
    """The plurals of a form, and its singular if it may be a plural."""
    yield from (form + "s", form + "es")
    if form.endswith("y"):
        yield form[:-1] + "ies"
    if form.endswith("s") and not form.endswith("ss"):
        yield form[:-1]


def _items(answer: str) -> Iterator[tuple[str, bool]]:
    """What an answer lists, each with whether it is said to be there.

    Raises:
        ValueError: the answer has no such form.
    """
    text = THOUGHT.sub("", answer).strip()
    if fenced := re.fullmatch(r"```\w*\n(.*?)\n?```", text, re.DOTALL):
        text = fenced[1].strip()
    if not text:
        raise ValueError("the answer is empty")
    yield from _json_items(json.loads(text)) if text[0] in "[{" else _line_items(text)


def _json_items(said: object) -> Iterator[tuple[str, bool]]:
    if isinstance(said, dict) and len(said) == 1 and isinstance(one := [*said.values()][0], list):
        said = one  # {"seen": […]}
    if isinstance(said, dict):
        for item, verdict in said.items():
            yield item, verdict if isinstance(verdict, bool) else VERDICTS[normal(str(verdict))]
    elif isinstance(said, list) and all(isinstance(item, str) for item in said):
        yield from ((item, True) for item in said)
    else:
        raise ValueError("JSON of another form")


def _line_items(text: str) -> Iterator[tuple[str, bool]]:
    verdict = re.compile(rf"\|?(.+?)\s*[:=|–-]\s*({'|'.join(VERDICTS)})\s*[|.]?", re.IGNORECASE)
    for line in filter(None, map(str.strip, text.splitlines())):
        line = re.sub(r"^([-*•·]|\d+[.)])\s+", "", line).replace("**", "")
        if stated := verdict.fullmatch(line):
            yield stated[1], VERDICTS[stated[2].casefold()]
        else:
            yield from ((item, True) for item in re.split(r",\s*(?:and\s+)?|;|\s+and\s+", line))
