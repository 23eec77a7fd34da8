"""Constrained answers: "none", or term {", " term} with each term at most once, and nothing else,
in the tokens of the model's own tokenizer."""

import re
from collections.abc import Collection, Sequence

NONE = "none"

# (tokens, choice) at the start of an answer, also of "none"; and after a term, with the comma.
Spelling = tuple[list[tuple[tuple[int, ...], str]], list[tuple[tuple[int, ...], str]]]


def offered(choices: Sequence[str]) -> list[str]:
    """The choices, each once; `ValueError` for one that cannot stand in a list."""
    choices = list(dict.fromkeys(choices))
    if wrong := [c for c in choices if "," in c or _words(c) in ([], [NONE])]:
        raise ValueError(f"{wrong[0]!r} cannot be a choice: an answer is none or a list")
    return choices


def spelled(tokenizer, choices: Sequence[str]) -> Spelling:
    """How `tokenizer` spells the choices; `ValueError` of `offered`, or if it has no tokens."""

    def tokens(text: str) -> tuple[int, ...]:
        return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])

    def says(ids: Sequence[int], text: str) -> bool:
        return _words(tokenizer.decode(list(ids), skip_special_tokens=True)) == _words(text)

    first, more, before = [], [], tokens(NONE)
    for choice in (*offered(choices), NONE):
        starts = {start for start in (tokens(choice), tokens(f" {choice}")) if says(start, choice)}
        # In context, because some tokenizers put a space before the first word of any text.
        both = tokens(f"{NONE}, {choice}")
        whole = both[: len(before)] == before
        after = both[len(before) :] if whole else tokens(f", {choice}")
        if not starts or not says((*before, *after), f"{NONE}, {choice}"):
            raise ValueError(f"the tokenizer has no tokens for {choice!r} in a list")
        first += [(start, choice) for start in sorted(starts)]
        more += [(after, choice)] if choice != NONE else []
    return first, more


def allowed(spelling: Spelling, written: Sequence[int], ends: Collection[int], left: int) -> list:
    """The tokens that may come after those `written`; a `ValueError` where there are none. An end
    may come after every whole term; no term is begun that has not room in `left` tokens."""
    written, found = tuple(written), set()
    if set(ends) & set(written):
        return sorted(ends)

    def walk(position: int, used: frozenset[str], paths) -> None:
        rest = written[position:]
        for tokens, choice in paths:
            if choice in used:
                continue
            if rest[: len(tokens)] == tokens:
                if len(rest) == len(tokens):
                    found.update(ends)
                if choice != NONE:
                    walk(position + len(tokens), used | {choice}, spelling[1])
            elif tokens[: len(rest)] == rest and len(tokens) - len(rest) <= left:
                found.add(tokens[len(rest)])

    walk(0, frozenset(), spelling[0])
    if not found:
        raise ValueError(f"max_new_tokens leaves {left} tokens, and no answer is as short")
    return sorted(found)


def _words(text: str) -> list[str]:
    return re.findall(r"[^\W_]+", text.casefold())
