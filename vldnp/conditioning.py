"""Conditioning: what the denoiser is told of the user's prompts, at each step.

Mostly the prompts as they are written. A method that changes them (`vldnp.safree`) is a policy
that says, for each step, which embeddings stand for the prompts.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class Companions:
    """Rows that go through the U-Net beside others, only for what their features tell.

    A companion has the latents of its row and a prompt of its own. Its prediction is dropped.

    Attributes:
        rows: which rows of the conditioning have a companion, `k` of them.
        embeds: the companions' prompts, `[k, L, D]`.
        attending: `(unet, rows, companions) -> context` in which the U-Net lets the features of
            the companions (their places in the batch) act on those of the rows.
    """

    rows: tuple[int, ...]
    embeds: Tensor
    attending: Callable[[torch.nn.Module, Sequence[int], Sequence[int]], AbstractContextManager]


@dataclass(frozen=True)
class Conditioning:
    """Encoded prompts, a row each. `embeds` is `[B, L, D]`; `a + b` puts the rows of b below."""

    embeds: Tensor
    companions: Companions | None = None

    def __len__(self) -> int:
        return len(self.embeds)

    @property
    def accompanied(self) -> tuple[int, ...]:
        """The rows that have a companion."""
        return self.companions.rows if self.companions is not None else ()

    def __add__(self, below: "Conditioning") -> "Conditioning":
        if below.companions is not None:
            if self.companions is not None:
                raise ValueError("only one of two conditionings may have companions")
            moved = tuple(len(self) + row for row in below.companions.rows)
            companions = Companions(moved, below.companions.embeds, below.companions.attending)
        else:
            companions = self.companions
        return Conditioning(torch.cat([self.embeds, below.embeds]), companions)


class Prompting(Protocol):
    """A policy for a batch of images."""

    def begin(self, run, prompts: Sequence[str]) -> Callable[[int], Conditioning]:
        """For this run (a `Backbone`) and its prompts: step index i → a row for each prompt."""

    def describe(self) -> dict:
        """JSON-able; everything that decides the conditioning."""


@dataclass(frozen=True)
class AsWritten:
    """The prompts themselves, at every step."""

    def begin(self, run, prompts: Sequence[str]) -> Callable[[int], Conditioning]:
        encoded = run.encode(prompts)
        return lambda i: encoded

    def describe(self) -> dict:
        return {"kind": "as written"}
