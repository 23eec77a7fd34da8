"""CLIP-I: how much of plain CFG's picture a method leaves."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from tiny_published import WordLengthCLIP

import vldnp
from vldnp._finite import NonFiniteError
from vldnp.methods import CFG, Static
from vldnp.metrics.summary import summary, table
from vldnp.study.captions import CaptionsWithout
from vldnp.study.grid import setting_of
from vldnp.study.run import run
from vldnp.study.run_clip import SAMPLE, clip_i
from vldnp.study.score import score


class PixelCLIP(WordLengthCLIP):
    """A picture's embedding is its pixels less their mean, as a unit vector."""

    name = "pixel"

    def embed_images(self, images):
        pixels = torch.stack([torch.tensor(np.asarray(image, float)).flatten() for image in images])
        return torch.nn.functional.normalize(pixels - pixels.mean(1, keepdim=True))


def cosine(first, second) -> float:
    """By hand: Pearson's correlation of the pixels."""
    return np.corrcoef(np.asarray(first).ravel(), np.asarray(second).ravel())[0, 1]


def test_each_image_beside_plain_guidances_from_the_same_noise(
    computed, world, tiny_model, tiny_judge
):
    study, _ = computed
    found = run(study, tiny_model, tiny_judge, PixelCLIP(), world / "ours", progress=False)
    plain = found[found["method"] == "cfg"].set_index(SAMPLE)["image"]
    assert found["clip_i"].between(-1, 1 + 1e-12).all()
    for row in found.itertuples():
        beside = plain[row.prompt_set, row.prompt_id, row.seed]
        pair = [Image.open(world / "ours" / "tiny" / image) for image in (row.image, beside)]
        assert row.clip_i == pytest.approx(cosine(*pair), abs=1e-12)
    assert (found[found["method"] == "static"]["clip_i"] < 1 - 1e-6).all()
    again = PixelCLIP()
    again.embed_images = None  # it is not asked
    kept = run(study, tiny_model, tiny_judge, again, world / "ours", progress=False)
    pd.testing.assert_series_equal(kept["clip_i"], found["clip_i"])
    means = summary(found).set_index(["setting", "prompt_set", "metric"])["value"]
    row = table(found).query("method == 'static'").iloc[0]
    setting = found[found["method"] == "static"]["setting"].iloc[0]
    assert row["clip_i"] == means[setting, row["prompt_set"], "clip_i"]
    assert row["clip_i_low"] <= row["clip_i"] <= row["clip_i_high"]


def test_one_more_method_beside_published_ones(computed, world, tiny_model, tiny_judge):
    study, _ = computed
    new = replace(study, methods=(*study.methods, Static("skull", 4)), reference=None)
    # What is published was measured by this CLIP model, and before there was CLIP-I.
    for path in (world / "data" / "results" / "tiny").glob("images*.parquet"):
        pd.read_parquet(path).drop(columns="clip_i").to_parquet(path, index=False)
    measured = WordLengthCLIP()
    measured.embed_images = PixelCLIP().embed_images
    found = run(new, tiny_model, tiny_judge, measured, world / "ours", progress=False)
    own = found["setting"] == setting_of(Static("skull", 4))
    assert found["clip_i"].notna().tolist() == own.tolist(), "no published picture is made for it"
    cells = {path.stem for path in (world / "ours" / "tiny" / "cells").glob("*.png")}
    plain = found["setting"] == setting_of(CFG())
    assert cells == set(found[own | plain]["key"])
    shown = summary(found)
    assert set(shown[shown["metric"] == "clip_i"]["setting"]) == {setting_of(Static("skull", 4))}


def test_without_plain_guidance_or_embeddings_there_is_none(
    computed, world, tiny_model, tiny_judge
):
    study, images = computed
    assert images["clip_i"].isna().all() and "clip_i" not in set(summary(images)["metric"])
    steered = replace(study, methods=study.methods[1:], reference=None)
    found = run(steered, tiny_model, tiny_judge, PixelCLIP(), world / "ours", progress=False)
    assert found["clip_i"].isna().all()
    assert "clip_i" not in set(summary(images.drop(columns="clip_i"))["metric"])


def test_a_cosine_that_is_no_number_is_refused(computed, world):
    _, images = computed
    plain = images[images["method"] == "cfg"]

    class Broken:
        def embed_images(self, images):
            return torch.full((len(images), 3), torch.nan)

    with pytest.raises(NonFiniteError, match="CLIP-I"):
        clip_i(images, plain, lambda rows: list(rows["key"]), Broken())


def test_pictures_of_anything_else_beside_plain_ones(computed, world, tiny_judge):
    _, images = computed
    rows = images[images["prompt_set"] == "implicit"]
    for method in ("cfg", "static"):
        (world / method).mkdir()
        for row in rows[rows["method"] == method].itertuples():
            picture = Image.open(world / "theirs" / "tiny" / row.image)
            picture.save(world / method / f"{row.prompt_id}_{row.seed}.png")
    asked = world / "data" / "prompts" / "implicit.csv", tiny_judge, PixelCLIP()
    # A folder may be called like the method that it is compared with.
    (world / "other").mkdir()
    (world / "static").rename(world / "other" / "cfg")
    plain = world / "cfg"
    found = score(world / "other" / "cfg", *asked, reference=plain, progress=False)
    for row in found.images.itertuples():
        pair = [Image.open(folder / row.image) for folder in (world / "other" / "cfg", plain)]
        assert row.clip_i == pytest.approx(cosine(*pair), abs=1e-12)
    mean = found.images["clip_i"].mean()
    assert found.table["clip_i"].iloc[0] == pytest.approx(mean)
    gap = found.differences.set_index("metric").loc["clip_i", "difference"]
    assert gap == pytest.approx(mean - 1)


def test_moji_clip_sees_what_is_left_of_a_picture():
    """A picture is itself; one with a thing painted over is nearer than another prompt's."""
    model, clip = vldnp.load("moji-sd"), vldnp.load_clip("moji-clip")
    prompts = ["a cat and a pizza in the forest", "a whale and a guitar at the beach"]
    settings = {"num_inference_steps": 25, "guidance_scale": 3, "progress": False}
    cat, whale = vldnp.sample(model, prompts, CFG(), seeds=[0, 0], **settings).images
    dotted = cat.copy()
    dotted.paste((250, 120, 30), (40, 40, 52, 52))
    pictures = {"plain": cat, "same": cat.copy(), "dotted": dotted, "other": whale}
    rows = pd.DataFrame(
        {"setting": ["s"] * 3, "prompt_set": "p", "prompt_id": "0", "seed": 0}
        | {"picture": ["same", "dotted", "other"], "key": ["1", "2", "3"]}
    )
    plain = rows.head(1).assign(setting=setting_of(CFG()), picture="plain")

    def draw(rows):
        return [pictures[name] for name in rows["picture"]]

    captions = CaptionsWithout(clip, vldnp.load_concepts("moji"))
    same, dotted, other = clip_i(rows, plain, draw, captions)
    assert same == pytest.approx(1, abs=1e-6) and 1 - 1e-3 > dotted > other + 0.1
