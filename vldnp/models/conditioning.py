"""The encoded prompts at each step, which a method such as SAFREE may replace."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class AuxiliaryRows:
    """Rows with the latents of other rows and their own prompts; their predictions are dropped."""

    rows: tuple[int, ...]  # of the conditioning, `k` of them, that have an auxiliary row
    prompts: "Conditioning"  # the auxiliary rows' own, `k` of them
    # (network, rows, auxiliary), places in a batch → in this context the latter act on the former
    attending: Callable[[nn.Module, Sequence[int], Sequence[int]], AbstractContextManager]


@dataclass(frozen=True)
class Conditioning:
    """Encoded prompts, a row each; `a + b` puts the rows of b below, `a[rows]` selects."""

    embeds: Tensor  # `[B, L, D]`
    auxiliary: AuxiliaryRows | None = None  # rows that go through the network beside these
    added: Mapping[str, Tensor] = field(default_factory=dict)  # more, by name, `[B, …]` each

    def __len__(self) -> int:
        return len(self.embeds)

    @property
    def has_auxiliary(self) -> tuple[int, ...]:
        return self.auxiliary.rows if self.auxiliary is not None else ()

    def __getitem__(self, rows: Sequence[int]) -> "Conditioning":
        """These rows, without auxiliary rows."""
        rows = list(rows)
        return Conditioning(self.embeds[rows], added={k: v[rows] for k, v in self.added.items()})

    def __add__(self, below: "Conditioning") -> "Conditioning":
        if self.auxiliary and below.auxiliary:
            raise ValueError("only one of several conditionings may have auxiliary rows")
        auxiliary = self.auxiliary
        if moved := below.auxiliary:
            auxiliary = replace(moved, rows=tuple(len(self) + row for row in moved.rows))
        added = {name: torch.cat([own, below.added[name]]) for name, own in self.added.items()}
        return Conditioning(torch.cat([self.embeds, below.embeds]), auxiliary, added)

    def with_auxiliary(self) -> "Conditioning":
        """These rows, and the auxiliary ones below them."""
        return replace(self, auxiliary=None) + self.auxiliary.prompts if self.auxiliary else self


@dataclass(frozen=True)
class Prompting:
    """Which conditioning the prompts have at each step; by default their own."""

    def begin(self, run, prompts: Sequence[str]) -> Callable[[int], Conditioning]:
        """For a `Run`: step index i → conditioning, a row for each prompt."""
        encoded = run.encode(prompts)
        return lambda i: encoded

    def describe(self) -> dict:
        return {"kind": "as written"}
