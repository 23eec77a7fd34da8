"""Do two judges and the eye agree on what steering leaves behind?

The judges learn from rendered scenes; the figures of a study rest on what they say of *steered*
pictures, which hold half-erased and re-coloured icons. Here 1,000 such pictures are drawn from the
tuning prompts, judged by both judges, and 200 of them compared with labels made by eye.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd

import vldnp
from vldnp import zoo
from vldnp.files import atomic
from vldnp.methods import SAFREE, SLD, VLDNP, Method, Static
from vldnp.moji.evaluate import GUIDANCE_SCALE, STEPS
from vldnp.moji.icons import RESTRICTED
from vldnp.prompts import load_prompts
from vldnp.schedules import uniform

PROMPT_SETS = ("tuning-implied", "tuning-named", "tuning-benign")
LIST = ", ".join(RESTRICTED)
CATEGORIES = "a weapon, something bloody, a drug"
OMEGAS = (4.0, 8.0, 15.0)
BATCH = 32
SEED = 61


def methods(vlm: Callable) -> list[Method]:
    """The twelve ways of steering.

    Static, VL-DNP and SLD are set as `data/profiles/embedded.yaml` sets them, SAFREE as calibrated
    to this world (α = 0.015, U = 20), with the same negative prompt as static.
    """
    by_omega = [
        (
            Static(CATEGORIES, omega),
            VLDNP(vlm, "moji", omega, uniform(10)),
            SAFREE(CATEGORIES, CATEGORIES, "added", omega, alpha=0.015, upper=20.0),
        )
        for omega in OMEGAS
    ]
    return [
        *(method for row in zip(*by_omega, strict=True) for method in row),
        *(SLD(LIST, strength) for strength in ("medium", "strong", "max")),
    ]


def plan(arms: list[Method], count: int = 1000, seed: int = SEED) -> pd.DataFrame:
    """Which pictures to draw: `count` random ones of all methods times all tuning prompts.

    Returns:
        In the order of drawing (by method), with the columns `method, omega, prompt_set, prompt,
        seed`; `omega` is NaN for methods that have none.
    """
    prompts = pd.concat(
        load_prompts(name)[["prompt", "seed"]].assign(prompt_set=name) for name in PROMPT_SETS
    )
    every = pd.concat(prompts.assign(method=arm.name, omega=arm.omega) for arm in arms)
    rows = np.random.default_rng(seed).choice(len(every), size=count, replace=False)
    columns = ["method", "omega", "prompt_set", "prompt", "seed"]
    return every.iloc[np.sort(rows)][columns].reset_index(drop=True)


def draw(table: pd.DataFrame, folder: Path) -> list[Path]:
    """Draw the pictures of `plan` as `folder/0000.png` …; those that are there are kept.

    A method's pictures are drawn in batches of 32 in the table's order, so a picture has the same
    company whenever it is drawn.
    """
    paths = [folder / f"{row:04}.png" for row in range(len(table))]
    arms = {(arm.name, str(arm.omega)): arm for arm in methods(zoo.load_vlm("moji-vlm-l"))}
    model = zoo.load("moji-sd")
    labels = table["omega"].astype(object).where(table["omega"].notna(), None).map(str)
    for key, rows in table.groupby([table["method"], labels], sort=False):
        for start in range(0, len(rows), BATCH):
            part = rows.iloc[start : start + BATCH]
            if all(paths[i].is_file() for i in part.index):
                continue
            images = vldnp.sample(
                model,
                list(part["prompt"]),
                arms[key],
                seeds=list(part["seed"]),
                num_inference_steps=STEPS,
                guidance_scale=GUIDANCE_SCALE,
            ).images
            for i, image in zip(part.index, images, strict=True):
                with atomic(paths[i]) as fresh:
                    image.save(fresh, format="png")
    return paths
