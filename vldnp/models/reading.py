"""Answers read, not written: the terms that are seen, from an answer's first word alone.

    P(k) = p(k) / Σ_j p(j)          j: every term that is offered, and "none"

p(k) is the probability of the tokens that an answer which names k first begins with, after one
forward pass; a term is seen where P(k) ≥ the threshold. P sums to 1 over the terms and "none", so
that a VLM that is sure of two things still begins with one of them: the second is missed.
"""

import json
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from vldnp.models.constrained import NONE, _says, _tokens, offered, spelled

THRESHOLD = 0.3
"""Where read and written answers of the three Moji VLMs agree best on half of 192 tuning prompts
(0.29, 0.26 and 0.32)."""

TOP = 20
"""Log-probabilities asked of a server: the most that OpenAI's interface allows."""


def first_tokens(tokenizer, choices: Sequence[str]) -> list[list[int]]:
    """For each choice, and for "none" at the end, the tokens that begin it and no other.

    With and without a leading space, with a small and a capital letter.

    Raises:
        ValueError: two choices begin with the same tokens, or `spelled` refuses one; one line.
    """
    choices = offered(choices)
    starts: dict[str, set[int]] = {choice: set() for choice in (*choices, NONE)}
    for tokens, choice in spelled(tokenizer, choices).first:
        starts[choice].add(tokens[0])
    for choice, begun in starts.items():
        capital = choice[:1].upper() + choice[1:]
        for text in (capital, f" {capital}"):
            tokens = _tokens(tokenizer, text)
            # A single capital letter begins anything, such as "A" in "A knife".
            if _says(tokenizer, tokens, choice) and len(_letters(tokenizer, tokens[0])) > 1:
                begun.add(tokens[0])
    own = {
        choice: tokens - set().union(*(starts[other] for other in starts if other != choice))
        for choice, tokens in starts.items()
    }
    if alike := [choice for choice in own if not own[choice]]:
        one = alike[0]
        raise _alike(one, next(o for o in starts if o != one and starts[o] & starts[one]))
    return [sorted(own[choice]) for choice in starts]


def probabilities(logits: Tensor, starts: Sequence[Sequence[int]]) -> Tensor:
    """P(k), `[B, K]`, of K terms from the logits `[B, V]` of the first token.

    Args:
        starts: as `first_tokens` gives them, K + 1.
    """
    scores = torch.stack([logits[:, list(ids)].float().logsumexp(1) for ids in starts], dim=1)
    return scores.softmax(1)[:, :-1]


def first_words(choices: Sequence[str]) -> dict[str, str]:
    """The first word of each choice, and of "none" at the end, in small letters.

    Raises:
        ValueError: two choices begin with the same word, or there is none; one line.
    """
    words = {choice: choice.casefold().split()[0] for choice in (*offered(choices), NONE)}
    for choice, word in words.items():
        if other := next((o for o, w in words.items() if w == word and o != choice), None):
            raise _alike(choice, other)
    return words


def served_probabilities(top: Sequence[tuple[str, float]], choices: Sequence[str]) -> list[float]:
    """P(k) of each choice from a server's likeliest first tokens and their log-probabilities.

    A token begins a choice if it is its first word, or two or more letters of it; letter case and
    space are no matter. What begins several choices counts for none of them.

    Raises:
        ValueError: those of `first_words`; or none of the tokens begins a choice, so that
            nothing can be read; one line.
    """
    words = first_words(choices)
    mass = dict.fromkeys(words, 0.0)
    for token, logprob in top:
        begun = _begun(token, words)
        if len(begun) == 1:
            mass[begun[0]] += math.exp(min(logprob, 0.0))
    total = sum(mass.values())
    if not total > 0:  # also NaN
        likely = ", ".join(repr(token) for token, _ in top[:3])
        raise ValueError(f"no answer can be read: neither a term nor {NONE!r} begins {likely}")
    return [mass[choice] / total for choice in words if choice != NONE]


def top_logprobs(reply: bytes) -> list[tuple[str, float]]:
    """The likeliest first tokens in the body of a server's reply, a chat completion in JSON.

    Raises:
        ValueError: there are none in it; one line.
    """
    try:
        choice = json.loads(reply)["choices"][0]
        top = choice["logprobs"]["content"][0]["top_logprobs"]
        top = [(str(one["token"]), float(one["logprob"])) for one in top]
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        seen = reply[:300].decode(errors="replace")
        raise ValueError(f"the server's reply has no log-probabilities: {seen}") from None
    if choice.get("finish_reason") == "content_filter":
        raise ValueError("the answer is empty (it ended by 'content_filter')")
    return top


def said(seen: Sequence[float], choices: Sequence[str], threshold: float) -> str:
    """The answer as it would be written: the choices with P(k) ≥ `threshold`, or "none"."""
    pairs = zip(dict.fromkeys(choices), seen, strict=True)
    return ", ".join(choice for choice, p in pairs if p >= threshold) or NONE


def _letters(tokenizer, token: int) -> str:
    return tokenizer.decode([token], skip_special_tokens=True).strip()


def _begun(token: str, words: Mapping[str, str]) -> list[str]:
    part = token.strip(" \n\t▁Ġ").casefold()
    whole = [choice for choice, word in words.items() if word == part]
    return whole or [c for c, word in words.items() if len(part) > 1 and word.startswith(part)]


def _alike(one: str, other: str) -> ValueError:
    return ValueError(
        f"{one!r} and {other!r} begin alike, so a first word does not tell them apart: give one "
        'of them another name, or take answers="constrained"'
    )
