"""FID and KID of a run's images against the study's real images."""

import warnings
from collections.abc import Callable, Mapping

import numpy as np
import pandas as pd
import torch
from PIL import Image

from vldnp._files import first_line
from vldnp.metrics.fid import Distances, Inception, distances, features, fid_change
from vldnp.metrics.intervals import Interval
from vldnp.models import load
from vldnp.models.hub import default_device
from vldnp.models.judges import Judge
from vldnp.study import reference
from vldnp.study.grid import Study

Draw = Callable[[pd.DataFrame], list[Image.Image]]
"""Rows of `images.parquet` → their pictures."""


def fid_changes(
    study: Study,
    images: pd.DataFrame,
    judge: Judge | str,
    methods: Mapping[str, str],
    draw: Draw,
) -> dict[str, Interval]:
    """How much FID on the reference sets lies above plain CFG's, for some methods.

    Args:
        study, images: what `run` was given and returned.
        judge: whose features count.
        methods: name → setting, with `cfg` among them.
        draw: rows → their pictures.

    Returns:
        Name → the difference (`metrics.fid_change`); empty where FID cannot be had.
    """
    compared = images[images["prompt_set"].isin(study.reference_sets)]
    if compared.empty or (means := _means(study, load.load_judge(judge))) is None:
        return {}
    space, pixels = means

    def of(setting: str) -> np.ndarray:
        rows = compared[compared["setting"] == setting].sort_values(["prompt_id", "seed"])
        return features(draw(rows), space).numpy()

    real, plain = features(pixels, space).numpy(), of(methods["cfg"])
    prompts = compared[compared["setting"] == methods["cfg"]]["prompt_id"].sort_values()
    return {
        name: fid_change(of(setting), plain, real, prompts)
        for name, setting in methods.items()
        if name != "cfg"
    }


def _means(study: Study, judge: Judge) -> tuple[Judge | Inception, torch.Tensor] | None:
    """What sees the features for FID, and the real images, uint8 `[n, 3, H, W]`.

    That is the judge where it has features, else Inception. None, with a warning that says why,
    where FID cannot be had.
    """
    if study.reference is None:
        return None
    try:
        real = reference.reference_images(study.reference, study.reference_count, seed=0)
        space = judge if hasattr(judge, "features") else Inception(device=default_device())
    except OSError as error:  # of the reference's folder, or of the network
        warnings.warn(f"FID and KID stay empty: {first_line(error)}", stacklevel=2)
        return None
    return space, torch.from_numpy(real).permute(0, 3, 1, 2)


def run_distances(
    study: Study, images: pd.DataFrame, draw: Draw, judge: Judge
) -> dict[tuple[str, str], Distances]:
    """FID and KID of each setting's images of the reference sets, where they can be had."""
    compared = images[images["prompt_set"].isin(study.reference_sets)]
    if len(compared) < 2 or (means := _means(study, judge)) is None:
        return {}
    space, pixels = means
    real = features(pixels, space)
    return {
        (setting, prompt_set): distances(features(draw(group), space), real)
        for (setting, prompt_set), group in compared.groupby(["setting", "prompt_set"])
        if len(group) > 1
    }
