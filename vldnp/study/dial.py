"""How good the VLM must be: the ablation in which its recall and precision are dialled."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path

import pandas as pd

from vldnp.baselines.controls import Dialled, Oracle, prevalence
from vldnp.concepts import load_concepts
from vldnp.models import vlm as vlms
from vldnp.study.profile import Profile, numbers
from vldnp.study.sweep import Ablation, sweep

THINGS = "nothing", "one thing", "several"
"""What plain CFG shows of a vocabulary, in words."""


def dial(
    profile: Profile,
    truth: Callable,
    oracle: Oracle,
    recalls: Sequence[float],
    precisions: Sequence[float],
    queries: Sequence[int],
    *,
    prompt_sets: Sequence[str | Path],
    max_prompts: int = 0,
) -> Ablation:
    """VL-DNP by a guide that is corrupted to each recall and precision, and the fixed prompt.

    Args:
        profile: gives all that does not vary, and the fixed prompt at its chosen setting.
        truth: what is corrupted: `Judged`, which is shown where plain CFG would end.
        oracle: knows plain CFG's images. The share of the vocabulary that is there is taken from
            those that show any of it, on which the precision is right.
        recalls, precisions: as `Dialled` takes them; none for the fixed prompt alone.
        queries: how often the guide is asked.
        prompt_sets, max_prompts: as in `sweep`.

    Returns:
        The ablation; its factors have `recall, precision` and `curve` (what one curve of a figure
        is called), which are empty for the fixed prompt.
    """
    vocabulary = load_concepts(profile.concepts).vocabulary
    shown = {
        image: things for image, things in oracle.seen.items() if set(things) & set(vocabulary)
    }
    # An oracle that knows nothing, as a plan's, names nothing, whatever this is.
    share = prevalence(shown, profile.concepts) if shown else 1 / len(vocabulary)
    dialled = [
        Dialled(truth, profile.concepts, recall, precision, share)
        for precision, recall in product(
            numbers(precisions, "precisions"), numbers(recalls, "recalls")
        )
    ]
    fixed = {
        "negatives": ["static"],
        "rule": [profile.static_rule],
        "omega": [profile.chosen_omega("static")],
    }
    grids = [{"guide": dialled, "queries": queries}, fixed]
    ablation = sweep(profile, "dial", *grids, prompt_sets=prompt_sets, max_prompts=max_prompts)
    named = pd.DataFrame(
        [(vlms.describe(vlm)["name"], vlm.recall, vlm.precision) for vlm in dialled],
        columns=["guide", "recall", "precision"],
    )
    factors = ablation.factors.merge(named, how="left", on="guide")
    curve = "precision " + factors["precision"].map("{:g}".format)
    curve += ", queries " + factors["queries"].astype(str)
    return replace(
        ablation, factors=factors.assign(curve=curve.where(factors["recall"].notna(), ""))
    )


def by_things(images: pd.DataFrame, seen: Mapping, concepts: str) -> pd.DataFrame:
    """The images with `prompt_set` told apart by how much of the vocabulary plain CFG shows.

    Args:
        images: rows of `images.parquet`.
        seen: image → what plain CFG's shows, as `controls.seen_in` gives it.
        concepts: the concept set.
    """
    vocabulary = set(load_concepts(concepts).vocabulary)
    count = [
        len(vocabulary & set(seen[prompt, seed]))
        for prompt, seed in zip(images["prompt"], images["seed"], strict=True)
    ]
    return images.assign(
        prompt_set=[
            f"{prompt_set}, {THINGS[min(n, 2)]}"
            for prompt_set, n in zip(images["prompt_set"], count, strict=True)
        ]
    )
