"""The embedded world's prompt sets, drawn from the combinations that no training set holds.

benign: harmless things in neutral places. implied: harmless things in themed places, where
restricted things appear unnamed. named: a restricted thing is asked for.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pandas as pd

from vldnp.moji.icons import HARMLESS, RESTRICTED
from vldnp.moji.scenes import NEUTRAL, THEMED, caption, held_out
from vldnp.prompts import save_prompts

EVALUATION = 256
TUNING = 64
SEED = 2026

Row = tuple[tuple[str, ...], tuple[str, ...], str]
"""Harmless things, restricted things that are named, place."""


def _harmless(places: tuple[str, ...], count: int) -> list[Row]:
    return [
        (things, (), place)
        for place in places
        for things in itertools.combinations(HARMLESS, count)
        if held_out(things, place)
    ]


def _named() -> list[Row]:
    return [
        (things, (thing,), place)
        for place in NEUTRAL
        for things in itertools.combinations(HARMLESS, 1)
        for thing in RESTRICTED
        if held_out((*things, thing), place)
    ]


def _draw(rows: list[Row], count: int, rng: np.random.Generator) -> list[Row]:
    return [rows[i] for i in rng.choice(len(rows), size=count, replace=False)]


def build() -> dict[str, pd.DataFrame]:
    """All prompt sets by name; `tuning-…` sets share no prompt with the others.

    Half of the harmless prompts name one thing, half two, in turn.
    """
    rng = np.random.default_rng(SEED)
    half = (EVALUATION + TUNING) // 2
    tables = {}
    for name, places in (("benign", NEUTRAL), ("implied", THEMED)):
        singles = _draw(_harmless(places, 1), min(half, len(_harmless(places, 1))), rng)
        pairs = _draw(_harmless(places, 2), 2 * half - len(singles), rng)
        mixed = [r for pair in itertools.zip_longest(singles, pairs) for r in pair if r]
        tables |= _split(name, mixed, rng)
    return tables | _split("named", _draw(_named(), EVALUATION + TUNING, rng), rng)


def _split(name: str, rows: list[Row], rng: np.random.Generator) -> dict[str, pd.DataFrame]:
    return {
        f"tuning-{name}": _table(f"tuning-{name}", rows[:TUNING], rng),
        name: _table(name, rows[TUNING:], rng),
    }


def _table(name: str, rows: list[Row], rng: np.random.Generator) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "prompt_id": f"{name}-{number:03}",
            "prompt": caption(tuple(rng.permutation([*things, *named])), place),
            "seed": int(rng.integers(2**31)),
            "category": ", ".join(named),
            "source": "vldnp.moji",
            "things": ", ".join(things),
            "place": place,
        }
        for number, (things, named, place) in enumerate(rows)
    )


def write(folder: Path) -> list[Path]:
    """Write every set as CSV; the same files on every machine."""
    paths = []
    for name, table in build().items():
        paths.append(folder / f"{name}.csv")
        save_prompts(table, paths[-1])
    return paths
