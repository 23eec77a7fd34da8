"""Shared by the searches: the tokens that a prompt may hold, and prompts drawn from them."""

import itertools
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from vldnp.models.backbone import Backbone

Words = Sequence[str]
"""A prompt as a list of its tokens' texts."""


class Forbidden:
    """The words that a prompt may not hold, in any spelling.

    Args:
        words: written forms; only their letters count, in any case.
        in_pieces: words of which no token may be a part either, single letters aside: of "cove"
            neither "cov" nor "ve". Those of one or two letters ("in") are forbidden as tokens
            only, as they are spelled across the tokens of nearly every prompt.
    """

    def __init__(self, words: Iterable[str], in_pieces: Iterable[str] = ()):
        self.broken = tuple(sorted({_letters(word) for word in in_pieces} - {""}))
        forms = {_letters(word) for word in words} | {w for w in self.broken if len(w) > 2}
        self.forms = tuple(sorted(forms - {""}))
        if not self.forms:
            raise ValueError("no forbidden words are given; give at least one with a letter")
        self._anywhere = re.compile("|".join(map(re.escape, self.forms)))

    def in_prompt(self, prompt: str) -> bool:
        """Whether a form occurs in the letters of a text, as in "sk ul l"."""
        return self._anywhere.search(_letters(prompt)) is not None

    def in_token(self, token: str) -> bool:
        """Whether a token holds a form; or is a part of a word of `in_pieces`; or is a piece of
        3 letters or more that makes up half of a form or more, such as "dagge"."""
        letters = _letters(token)
        return (
            self.in_prompt(letters)
            or any(len(letters) >= 2 and letters in word for word in self.broken)
            or any(3 <= len(letters) >= len(form) / 2 and letters in form for form in self.forms)
        )


def _letters(text: str) -> str:
    return re.sub(r"[\W_]", "", text.casefold())


@dataclass(frozen=True)
class Attack:
    """A text-to-image model under attack, and the words that no prompt may hold."""

    model: Backbone
    forbidden: Forbidden

    @cached_property
    def tokens(self) -> dict[str, int]:
        """The tokens to search in: text → id, of those that are a word when they stand alone."""
        tokenizer = self.model.pipe.tokenizer
        special = set(tokenizer.all_special_ids)
        found = {}
        for i in sorted(tokenizer.get_vocab().values()):
            text = tokenizer.decode([i]).strip()
            if i in special or not (text and text.isprintable()) or self.forbidden.in_token(text):
                continue
            if tokenizer(text).input_ids[1:-1] == [i]:
                found.setdefault(text, i)
        return found

    def allowed(self, words: Words) -> bool:
        """Whether these tokens, written side by side, hold nothing forbidden and are tokenized as
        just these tokens."""
        prompt = " ".join(words)
        ids = self.model.pipe.tokenizer(prompt).input_ids[1:-1]
        return not self.forbidden.in_prompt(prompt) and ids == [self.tokens[w] for w in words]

    def random(self, count: int, length: int, rng: np.random.Generator) -> list[Words]:
        """`count` allowed prompts of `length` tokens drawn uniformly."""
        words = list(self.tokens)
        return self.accepted(
            lambda: [words[i] for i in rng.integers(len(words), size=length)], count
        )

    def accepted(self, draw: Callable[[], Words], count: int) -> list[Words]:
        """The first `count` draws that are allowed.

        Raises:
            ValueError: fewer than one in a thousand is allowed.
        """
        draws = (draw() for _ in range(1000 * count))
        found = list(itertools.islice(filter(self.allowed, draws), count))
        if len(found) < count:
            raise ValueError("hardly any prompt is free of the forbidden words; forbid fewer")
        return found

    def child(
        self, parents: Sequence[Words], rng: np.random.Generator, crossover: float, mutation: float
    ) -> Words:
        """A prompt of prompts of equal length: with the probability `crossover` of two of them,
        cut at one place, and with the probability `mutation` with one random token."""
        words = list(self.tokens)
        child = list(parents[rng.integers(len(parents))])
        if len(child) > 1 and rng.random() < crossover:
            cut = rng.integers(1, len(child))
            child[cut:] = parents[rng.integers(len(parents))][cut:]
        if rng.random() < mutation:
            word = words[rng.integers(len(words))]
            child[rng.integers(len(child))] = word
        return child
