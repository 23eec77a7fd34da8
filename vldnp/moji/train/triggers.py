"""What SAFREE's trigger test fires on: restricted and harmless things, places, or stop words."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from vldnp.baselines.safree import Safree
from vldnp.models import load
from vldnp.models.run import Run
from vldnp.moji.train.evaluate import STEPS
from vldnp.moji.train.second_opinion import CATEGORIES, PROMPT_SETS
from vldnp.moji.world.icons import HARMLESS, RESTRICTED
from vldnp.moji.world.scenes import PLACES
from vldnp.prompts.table import load_prompts

STOP_WORDS = frozenset("a an and at by in on the ,".split())
TABLE = "safree-triggers.csv"
"""In `data/results`."""
KINDS = ("restricted", "harmless", "place", "stop word")


def kind_of(token: str) -> str:
    """The kind of a caption's word; `"dark"` of "in the dark alley" belongs to the place.

    Raises:
        ValueError: a word that is in no caption.
    """
    if token in STOP_WORDS:
        return "stop word"
    if token in RESTRICTED:
        return "restricted"
    if token in HARMLESS:
        return "harmless"
    if any(token in words.split() for words in PLACES):
        return "place"
    raise ValueError(f"{token!r} is no word of a caption")


def fired(
    prompts: Sequence[str], model: str = "moji-sd", alpha: float = 0.01, **options
) -> pd.DataFrame:
    """Every token of the prompts, its kind, and whether it is a trigger.

    Args:
        prompts: captions.
        model: as `vldnp.load` takes it.
        alpha: α of `vldnp.baselines.safree.trigger_tokens`.
        options: of `vldnp.baselines.safree.Safree`, such as how a token is masked.

    Returns:
        One row per token: `prompt` (its number), `token`, `kind`, `trigger`.
    """
    run = Run(load.load(model), STEPS)
    found = Safree(tuple(CATEGORIES.split(", ")), alpha=alpha, **options).filtered(run, prompts)
    tokenizer = run.backbone.pipe.tokenizer
    return pd.DataFrame(
        {"prompt": number, "token": token, "kind": kind_of(token), "trigger": bool(trigger)}
        for number, (prompt, one) in enumerate(zip(prompts, found, strict=True))
        for token, trigger in zip(_words(tokenizer, prompt), one.triggers, strict=True)
    )


def _words(tokenizer, prompt: str) -> list[str]:
    return [token.removesuffix("</w>") for token in tokenizer.tokenize(prompt)]


def table(alphas: Sequence[float] = (0.01, 0.015), **options) -> pd.DataFrame:
    """Triggers by prompt set and kind of token, on the tuning prompts.

    `fires` is the share of the kind's tokens that are triggers, `of_all` the kind's share of all
    triggers of the set, and `prompts` the share of prompts in which one of the kind is a trigger.
    """
    rows = []
    for alpha in alphas:
        for name in PROMPT_SETS:
            tokens = fired(list(load_prompts(name)["prompt"]), alpha=alpha, **options)
            count, every = tokens["prompt"].nunique(), int(tokens["trigger"].sum())
            for kind in KINDS:
                of = tokens[tokens["kind"] == kind]
                hits = of[of["trigger"]]
                rows.append(
                    {
                        "mask": options.get("mask", "token id 0"),
                        "alpha": alpha,
                        "prompt_set": name,
                        "kind": kind,
                        "tokens": len(of),
                        "triggers": len(hits),
                        "fires": len(hits) / len(of) if len(of) else None,
                        "of_all": len(hits) / every if every else None,
                        "prompts": hits["prompt"].nunique() / count,
                    }
                )
    return pd.DataFrame(rows).round(4)
