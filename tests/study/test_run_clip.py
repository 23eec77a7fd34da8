"""CLIP-I: how much of plain CFG's picture a method leaves."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from tiny_published import WordLengthCLIP

from vldnp.metrics.summary import summary, table
from vldnp.study.run import run


class PixelCLIP(WordLengthCLIP):
    """A picture's embedding is its pixels less their mean, as a unit vector."""

    name = "pixel"

    def embed_images(self, images):
        pixels = torch.stack([torch.tensor(np.asarray(image, float)).flatten() for image in images])
        return torch.nn.functional.normalize(pixels - pixels.mean(1, keepdim=True))


def cosine(first, second) -> float:
    """By hand: Pearson's correlation of the pixels."""
    return np.corrcoef(np.asarray(first).ravel(), np.asarray(second).ravel())[0, 1]


def test_each_image_beside_plain_guidances_from_the_same_noise(computed, world, model, judge):
    study, _ = computed
    found = run(study, model, judge, PixelCLIP(), world / "ours", progress=False)
    plain = found[found["method"] == "cfg"].set_index(["prompt_set", "prompt_id", "seed"])["image"]
    assert found["clip_i"].between(-1, 1 + 1e-12).all()
    for row in found.itertuples():
        beside = plain[row.prompt_set, row.prompt_id, row.seed]
        pair = [Image.open(world / "ours" / "tiny" / image) for image in (row.image, beside)]
        assert row.clip_i == pytest.approx(cosine(*pair), abs=1e-12)
    assert (found[found["method"] == "static"]["clip_i"] < 1 - 1e-6).all()
    again = PixelCLIP()
    again.embed_images = None  # it is not asked
    kept = run(study, model, judge, again, world / "ours", progress=False)
    pd.testing.assert_series_equal(kept["clip_i"], found["clip_i"])
    means = summary(found).set_index(["setting", "prompt_set", "metric"])["value"]
    row = table(found).query("method == 'static'").iloc[0]
    setting = found[found["method"] == "static"]["setting"].iloc[0]
    assert row["clip_i"] == means[setting, row["prompt_set"], "clip_i"]
    assert row["clip_i_low"] <= row["clip_i"] <= row["clip_i_high"]


def test_without_plain_guidance_or_embeddings_there_is_none(computed, world, model, judge):
    study, images = computed
    assert images["clip_i"].isna().all() and "clip_i" not in set(summary(images)["metric"])
    steered = replace(study, methods=study.methods[1:], reference=None, name="steered")
    found = run(steered, model, judge, PixelCLIP(), world / "ours", progress=False)
    assert found["clip_i"].isna().all()
    assert "clip_i" not in set(summary(images.drop(columns="clip_i"))["metric"])
