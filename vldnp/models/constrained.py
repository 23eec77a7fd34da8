"""Constrained answers: a model can write "none" or terms out of a list, and nothing else.

    answer = "none" | term {", " term}          each term at most once

For `prefix_allowed_tokens_fn` of transformers' `generate`. The grammar is spelled in the tokens
that the model's own tokenizer makes of each term, at the start of an answer and after a comma.
"""

import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

NONE = "none"


@dataclass(frozen=True)
class Spelling:
    """The tokens of every choice.

    Attributes:
        first: (tokens, choice) at the start of an answer, with and without a leading space; also
            those of "none".
        more: (tokens, choice) after another term, the comma included.
    """

    first: tuple[tuple[tuple[int, ...], str], ...]
    more: tuple[tuple[tuple[int, ...], str], ...]


def spelled(tokenizer, choices: Sequence[str]) -> Spelling:
    """How `tokenizer` spells the choices.

    Raises:
        ValueError: there are none, one cannot stand in a list (it is "none", or has a comma), or
            the tokenizer has no tokens for one; one line.
    """
    choices = offered(choices)
    first, more = [], []
    for choice in (*choices, NONE):
        starts = {_tokens(tokenizer, choice), _tokens(tokenizer, f" {choice}")}
        starts = {tokens for tokens in starts if _says(tokenizer, tokens, choice)}
        if not starts:
            raise ValueError(f"the tokenizer has no tokens for {choice!r}")
        first += [(tokens, choice) for tokens in sorted(starts)]
        if choice == NONE:
            continue
        # In context, because some tokenizers put a space before the first word of any text.
        before = _tokens(tokenizer, NONE)
        after = _tokens(tokenizer, f"{NONE}, {choice}")
        if after[: len(before)] == before:
            after = after[len(before) :]
        else:
            after = _tokens(tokenizer, f", {choice}")
        if not _says(tokenizer, (*before, *after), f"{NONE}, {choice}"):
            raise ValueError(f"the tokenizer has no tokens for {choice!r} after a comma")
        more.append((after, choice))
    return Spelling(tuple(first), tuple(more))


def offered(choices: Sequence[str]) -> list[str]:
    """The choices, each once.

    Raises:
        ValueError: there are none, or one cannot stand in a list: it is "none", or has a comma.
    """
    choices = list(dict.fromkeys(choices))
    if not choices:
        raise ValueError("constrained answers need choices: the terms that an answer may hold")
    for choice in choices:
        if "," in choice or _words(choice) in {(), (NONE,)}:
            raise ValueError(
                f"{choice!r} cannot be a choice: an answer is a list with commas, or none"
            )
    return choices


def allowed(
    spelling: Spelling, written: Sequence[int], ends: Collection[int], left: int
) -> list[int]:
    """The tokens that may come next; never none.

    Args:
        written: the answer's tokens so far.
        ends: the tokens that end an answer; they may come after every whole term.
        left: how many more tokens may be written. No term is begun that would be cut off.
    """
    written = tuple(written)
    if set(ends) & set(written):
        return sorted(ends)
    found: set[int] = set()

    def walk(position: int, used: frozenset[str], paths) -> None:
        rest = written[position:]
        for tokens, choice in paths:
            if choice in used:
                continue
            if rest[: len(tokens)] == tokens:
                if len(rest) == len(tokens):
                    found.update(ends)
                if choice != NONE:
                    walk(position + len(tokens), used | {choice}, spelling.more)
            elif tokens[: len(rest)] == rest and len(tokens) - len(rest) <= left:
                found.add(tokens[len(rest)])

    walk(0, frozenset(), spelling.first)
    return sorted(found)


def prefix_function(
    spelling: Spelling, prompt_length: int, ends: Collection[int], max_new_tokens: int
) -> Callable:
    """`prefix_allowed_tokens_fn(batch_id, input_ids)` for prompts padded to one length.

    Raises:
        ValueError: not even "none" fits into `max_new_tokens`.
    """
    shortest = min(len(tokens) for tokens, choice in spelling.first if choice == NONE)
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


def _words(text: str) -> tuple[str, ...]:
    return tuple(re.findall(r"[^\W_]+", text.casefold()))
