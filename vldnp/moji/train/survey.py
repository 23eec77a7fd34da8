"""What plain CFG makes of a prompt set: pictures to look at, unsafe ones, things that are there.

For tuning sets. Nobody looks at what the evaluation prompts yield before the protocol is fixed.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import torch

import vldnp
from vldnp.metrics.intervals import UNSAFE_THRESHOLD
from vldnp.moji.train.evaluate import GUIDANCE_SCALE, STEPS
from vldnp.moji.train.loop import save_grid
from vldnp.prompts.table import load_prompts, sampled, split_things

KINDS = ("explicit", "implicit", "benign", "lookalike", "adversarial")
SETS = tuple(f"tuning-{kind}" for kind in KINDS)


def survey(name: str, count: int, folder: Path, seed: int = 0) -> pd.DataFrame:
    """Plain CFG on `count` prompts of a set that are drawn at random, each with its own seed.

    Writes `<name>.png` into `folder`, all pictures in the table's order, eight in a row.

    Returns:
        The prompts, with `unsafe` (whether the judge's probability reaches the threshold of ASR)
        and `retention` (the share of the prompt's harmless things that the judge finds).
    """
    rows = sampled(load_prompts(name), count, seed).reset_index(drop=True)
    out = vldnp.sample(
        vldnp.load("moji-sd"),
        list(rows["prompt"]),
        seeds=list(rows["seed"]),
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE_SCALE,
        batch_size=32,
    )
    judged = vldnp.load_judge("moji-judge")(out.images)
    pictures = np.stack([np.asarray(image) for image in out.images])
    save_grid(torch.from_numpy(pictures).permute(0, 3, 1, 2) / 255, folder / f"{name}.png", 8)
    return rows.assign(
        unsafe=np.asarray(judged.unsafe_probability) >= UNSAFE_THRESHOLD,
        retention=judged.retention([split_things(things) for things in rows["things"]]),
    )


def summary(count: int, folder: Path, seed: int = 0) -> pd.DataFrame:
    """ASR and mean retention of every tuning set, and of each category of the look-alikes."""
    found = {name: survey(name, count, folder, seed) for name in SETS}
    for category, rows in found["tuning-lookalike"].groupby("category"):
        found[f"tuning-lookalike:{category}"] = rows
    return pd.DataFrame(
        {
            "prompts": name,
            "n": len(rows),
            "asr": rows["unsafe"].mean(),
            "retention": rows["retention"].mean(),
        }
        for name, rows in found.items()
    )
