"""Constrained answers: a model can generate "none" or terms out of a list, and nothing else.

    answer = "none" | term {", " term}          each term at most once

For `prefix_allowed_tokens_fn` of transformers' `generate`. The grammar is spelled in the tokens
that the model's own tokenizer makes of each term, at the start of an answer and after a comma.
"""

import re
from collections.abc import Callable, Collection, Sequence

NONE = "none"

Spelling = tuple[list[tuple[tuple[int, ...], str]], list[tuple[tuple[int, ...], str]]]
"""(tokens, choice) at the start of an answer, with and without a space, also of "none"; and after
another term, the comma included."""


def spelled(tokenizer, choices: Sequence[str]) -> Spelling:
    """How `tokenizer` spells the choices.

    Raises:
        ValueError: those of `offered`, or the tokenizer has no tokens for one; one line.
    """
    first, more = [], []
    before = _tokens(tokenizer, NONE)
    for choice in (*offered(choices), NONE):
        starts = {_tokens(tokenizer, choice), _tokens(tokenizer, f" {choice}")}
        starts = {tokens for tokens in starts if _says(tokenizer, tokens, choice)}
        # In context, because some tokenizers put a space before the first word of any text.
        after = _tokens(tokenizer, f"{NONE}, {choice}")
        whole = after[: len(before)] == before
        after = after[len(before) :] if whole else _tokens(tokenizer, f", {choice}")
        if not starts or not _says(tokenizer, (*before, *after), f"{NONE}, {choice}"):
            raise ValueError(f"the tokenizer has no tokens for {choice!r} in a list")
        first += [(tokens, choice) for tokens in sorted(starts)]
        more += [(after, choice)] if choice != NONE else []
    return first, more


def offered(choices: Sequence[str]) -> list[str]:
    """The choices, each once; `ValueError` for one that cannot stand in a list with commas."""
    choices = list(dict.fromkeys(choices))
    if wrong := [c for c in choices if "," in c or _words(c) in ([], [NONE])]:
        raise ValueError(
            f"{wrong[0]!r} cannot be a choice: an answer is a list with commas or none"
        )
    return choices


def allowed(
    spelling: Spelling, written: Sequence[int], ends: Collection[int], left: int
) -> list[int]:
    """The tokens that may come after those `written`; never none.

    An end may come after every whole term; no term is begun that has not room in `left` tokens.
    """
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
    return sorted(found)


def prefix_function(
    spelling: Spelling, prompt_length: int, ends: Collection[int], max_new_tokens: int
) -> Callable:
    """`prefix_allowed_tokens_fn` for prompts padded to one length; "none" must have room."""
    shortest = min(len(tokens) for tokens, choice in spelling[0] if choice == NONE)
    if shortest > max_new_tokens:
        raise ValueError(f"max_new_tokens must be {shortest} or more, not {max_new_tokens}")

    def function(batch_id: int, input_ids) -> list[int]:
        written = input_ids[prompt_length:].tolist()
        return allowed(spelling, written, ends, max_new_tokens - len(written))

    return function


def _tokens(tokenizer, text: str) -> tuple[int, ...]:
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])


def _says(tokenizer, tokens: Sequence[int], text: str) -> bool:
    return _words(tokenizer.decode(list(tokens), skip_special_tokens=True)) == _words(text)


def _words(text: str) -> list[str]:
    return re.findall(r"[^\W_]+", text.casefold())
