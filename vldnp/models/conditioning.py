"""The encoded prompts at each step, which a method such as SAFREE may replace."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class AuxiliaryRows:
    """Rows with latents of other rows and prompts of their own, whose predictions are dropped."""

    rows: tuple[int, ...]  # of the conditioning, `k` of them, that have an auxiliary row
    embeds: Tensor  # the auxiliary rows' prompts, `[k, L, D]`
    # (unet, rows, auxiliary) → a context in which the U-Net lets the features of the auxiliary
    # rows (their places in the batch) act on those of the rows
    attending: Callable[[torch.nn.Module, Sequence[int], Sequence[int]], AbstractContextManager]


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
        return concatenated([self, below])

    def with_auxiliary(self) -> "Conditioning":
        """These rows, and the auxiliary ones below them with the further conditioning of theirs."""
        if self.auxiliary is None:
            return self
        return replace(self, auxiliary=None) + replace(
            self[self.auxiliary.rows], embeds=self.auxiliary.embeds
        )


def concatenated(parts: Sequence[Conditioning]) -> Conditioning:
    """The rows of all parts, one below the other; at most one part has auxiliary rows."""
    if sum(part.auxiliary is not None for part in parts) > 1:
        raise ValueError("only one of several conditionings may have auxiliary rows")
    auxiliary, start = None, 0
    for part in parts:
        if part.auxiliary is not None:
            rows = tuple(start + row for row in part.auxiliary.rows)
            auxiliary = replace(part.auxiliary, rows=rows)
        start += len(part)
    added = {name: torch.cat([part.added[name] for part in parts]) for name in parts[0].added}
    return Conditioning(torch.cat([part.embeds for part in parts]), auxiliary, added)


class Prompting(Protocol):
    """A policy: for a `Run` and its prompts, step index i → conditioning, a row for each prompt."""

    def begin(self, run, prompts: Sequence[str]) -> Callable[[int], Conditioning]: ...

    def describe(self) -> dict: ...


@dataclass(frozen=True)
class AsWritten:
    """The prompts themselves, at every step."""

    def begin(self, run, prompts: Sequence[str]) -> Callable[[int], Conditioning]:
        encoded = run.encode(prompts)
        return lambda i: encoded

    def describe(self) -> dict:
        return {"kind": "as written"}
