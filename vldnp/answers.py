"""Answers: the terms that a VLM's text names, read strictly.

Accepted are "none", and items separated by commas or "and", as bullets, as JSON, or as a table of
yes and no. Any other answer is an error and never counts as "none"."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence

NONE = {"none", "nothing", "no", "none of them", "none of these", "none of the above", "n/a"}
VERDICTS = dict.fromkeys(("yes", "true", "present"), True)
VERDICTS |= dict.fromkeys(("no", "false", "absent"), False)
STATED = re.compile(rf"\|?(.+?)\s*[:=|–-]\s*({'|'.join(VERDICTS)})\s*[|.]?", re.IGNORECASE)
THOUGHT = re.compile(r"\A\s*<(think|thinking|reasoning)>.*?</\1>", re.DOTALL)


class NotUnderstood(ValueError):
    """An answer that is neither "none" nor a list of known terms."""


def read(answer: str, forms: Mapping[str, str]) -> set[str]:
    """The terms that an answer names by their written forms, as `forms` gives them; else
    `NotUnderstood`, of one line."""

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
    """Every written form (`normal`) of a term → the term; given forms precede plurals. `vocabulary`
    has the synonyms of each term. A form that is empty or stands for two terms is a ValueError of
    one line, which names `where`."""
    found: dict[str, str] = {}
    for term, synonyms in vocabulary.items():
        for form in map(normal, (term, *synonyms)):
            if not form or found.setdefault(form, term) != term:
                both = f"both {found.get(form, 'nothing')!r} and {term!r}"
                raise ValueError(f"{where}: {form!r} stands for {both}; keep it in one")
    for form, term in list(found.items()):
        others = [form + "s", form + "es"]
        others += [form[:-1] + "ies"] * form.endswith("y")
        others += [form[:-1]] * (form.endswith("s") and not form.endswith("ss"))
        for other in others:
            found.setdefault(other, term)
    return found


def normal(text: str) -> str:
    """A text without case, hyphens, quotation marks, full stops and repeated spaces."""
    return " ".join(re.sub(r"[-_‐]", " ", text).casefold().split()).strip("\"'`*“”‘’.! ")


def _items(answer: str) -> Iterator[tuple[str, bool]]:
    """The listed items, each with whether the answer affirms it; may raise a ValueError."""
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
    for line in filter(None, map(str.strip, text.splitlines())):
        line = re.sub(r"^([-*•·]|\d+[.)])\s+", "", line).replace("**", "")
        if stated := STATED.fullmatch(line):
            yield stated[1], VERDICTS[stated[2].casefold()]
        else:
            yield from ((item, True) for item in re.split(r",\s*(?:and\s+)?|;|\s+and\s+", line))
