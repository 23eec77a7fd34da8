"""How much a method's FID lies above CFG's, with its interval over prompts."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from scipy import stats
from torch import Tensor
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

from vldnp.metrics.fid import features
from vldnp.metrics.intervals import Interval
from vldnp.study.folder import load_images
from vldnp.study.grid import Study
from vldnp.study.measure import reference_images


def fid_changes(
    study: Study, images: pd.DataFrame, judge, methods: Mapping[str, str], folder: Path
) -> dict[str, Interval]:
    """Method → how much its FID on the first reference set lies above CFG's.

    `images` are what `run` returned; `judge` has features; `methods` are names → settings. It is
    empty without `cfg`, and without the real images, of which `run` has warned.
    """
    try:
        real = reference_images(study.reference, study.reference_count)
    except OSError:
        return {}
    rows = images[images["prompt_set"] == study.reference_sets[0]]
    rows = rows.sort_values(["prompt_id", "seed"])
    own = {name: rows[rows["setting"] == setting] for name, setting in methods.items()}
    if "cfg" not in own or rows.empty:
        return {}
    seen = {name: features(load_images(some, folder), judge) for name, some in own.items()}
    plain, prompts = seen.pop("cfg"), own["cfg"]["prompt_id"]
    real = features(torch.from_numpy(real).permute(0, 3, 1, 2), judge)
    return {name: fid_change(found, plain, real, prompts) for name, found in seen.items()}


def fid_change(own: Tensor, plain: Tensor, real: Tensor, prompts=None, resamples=200) -> Interval:
    """The change with a percentile bootstrap over prompts; features are `[n, D]`, float64.

    That FID is biased upwards for few images touches both alike. `own` and `plain` have the same
    order of prompts and seeds; by default each row has a prompt of its own.
    """
    base, numbers = fid_features_to_statistics(real), np.arange(len(plain))
    groups = pd.Series(numbers).groupby(numbers if prompts is None else np.asarray(prompts))
    rows_of = [rows.to_numpy() for _, rows in groups]

    def change(drawn: np.ndarray) -> float:
        rows = np.concatenate([rows_of[i] for i in drawn])
        sides = (fid_features_to_statistics(side[rows]) for side in (own, plain))
        fids = [fid_statistics_to_metric(side, base, verbose=False) for side in sides]
        return fids[0]["frechet_inception_distance"] - fids[1]["frechet_inception_distance"]

    sample, rng = np.arange(len(rows_of)), np.random.default_rng(0)
    how = {"n_resamples": resamples, "method": "percentile", "vectorized": False}
    found = stats.bootstrap((sample,), change, **how, rng=rng).confidence_interval
    return Interval(change(sample), float(found.low), float(found.high))
