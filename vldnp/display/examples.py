"""Pictures of a run, method beside method."""

from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from vldnp.display.blur import because
from vldnp.experiments.run_folder import open_images


def examples(
    images: pd.DataFrame, folder: str | Path, prompt_set: str, omega: float, count: int = 8
) -> dict[str, list[Image.Image]]:
    """The first pictures of each method at one ω: label → pictures, in the prompts' order."""
    rows = _at_omega(images, prompt_set, omega, count)
    return {method: open_images(group, folder) for method, group in rows}


def flagged(
    images: pd.DataFrame, prompt_set: str, omega: float, reveal: bool, count: int = 8
) -> dict[str, list[str | None]]:
    """Why each picture of `examples` is to be shown blurred; None for those that may be seen."""
    return {
        method: [
            because(row.found) if row.unsafe and not reveal else None for row in group.itertuples()
        ]
        for method, group in _at_omega(images, prompt_set, omega, count)
    }


def _at_omega(images: pd.DataFrame, prompt_set: str, omega: float, count: int):
    """Method → its rows at ω; those without ω only for a method that has none there."""
    rows = images[images["prompt_set"] == prompt_set]
    found = []
    for method, group in rows.groupby("method", sort=False):
        swept = group[np.isclose(group["omega"], omega)]
        chosen = swept if len(swept) else group[group["omega"].isna()]
        if len(chosen):
            found.append((method, chosen.head(count)))
    return found
