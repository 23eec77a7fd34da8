"""The shipped models are as good as their cards say: measured here, on fresh samples.

The thresholds are those the project set itself, less a margin for the smaller samples.
"""

import re

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline

import vldnp
from vldnp import zoo
from vldnp.files import data_folder
from vldnp.moji import evaluate

MODELS = data_folder() / "models"


@pytest.fixture(scope="module")
def model():
    return zoo.load("moji-sd")


@pytest.fixture(scope="module")
def judge():
    return zoo.load_judge("moji-judge")


def test_text_to_image_draws_what_is_named(model, judge):
    measured = evaluate.text2image(model, judge, count=64, other_seeds=1_000_003)
    assert measured["singles"] >= 0.92, measured
    assert measured["pairs"] >= 0.86, measured
    assert measured["themed"] >= 0.70, measured
    assert measured["false_alarms"] <= 0.05, measured


def test_stock_diffusers_draws_the_same_pictures(model):
    stock = StableDiffusionPipeline.from_pretrained(MODELS / "moji-sd")
    stock.set_progress_bar_config(disable=True)
    prompts, seeds = ["a cat at the pirate cove", "a dog and a cake in the park"], [5, 6]
    theirs = stock(
        prompts,
        num_inference_steps=25,
        guidance_scale=3.0,
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        output_type="np",
    ).images
    settings = {"num_inference_steps": 25, "guidance_scale": 3.0, "output_type": "np"}
    ours = vldnp.sample(model, prompts, seeds=seeds, progress=False, **settings).images
    np.testing.assert_allclose(ours, theirs, atol=1e-3)


def test_judge_knows_restricted_things(model, judge):
    measured = evaluate.judge_quality(judge, model.pipe.vae, count=1000, seed=77_001)
    assert measured["auroc"] >= 0.985, measured
    assert measured["auroc_vae"] >= 0.965, measured
    assert measured["false_alarms"] <= 0.03, measured


def test_vlms_see_and_the_larger_see_better(model):
    final, early = 0, 680
    scores = {}
    for size in "sml":
        vlm = zoo.load_vlm(f"moji-vlm-{size}")
        scores[size] = evaluate.vlm_quality(vlm, model.pipe, 192, 77_002, (final, early))
    assert scores["l"][final] >= 0.92 and scores["l"][early] >= 0.76, scores
    means = [np.mean(list(scores[size].values())) for size in "sml"]
    assert means[0] < means[1] < means[2], scores


def test_clip_ranks_the_right_caption_first():
    assert evaluate.clip_quality(zoo.load_clip("moji-clip"), count=512, seed=77_003) >= 0.77


def test_models_are_small_safe_files_with_a_card():
    files = [path for path in MODELS.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 64e6
    suffixes = {path.suffix for path in files}
    assert suffixes <= {".safetensors", ".json", ".md", ".jinja", ".txt"}, suffixes
    for folder in MODELS.iterdir():
        card = (folder / "README.md").read_text(encoding="utf-8")
        for part in ("## Data", "## Recipe", "## Measured", "OpenMoji", "CC BY-SA 4.0", "seed"):
            assert part in card, (folder.name, part)


def test_no_two_kinds_of_model_learnt_from_the_same_data():
    seeds = {
        kind: set(re.findall(r"seed (\d+)", (MODELS / name / "README.md").read_text("utf-8")))
        for kind, name in {
            "sd": "moji-sd",
            "judge": "moji-judge",
            "clip": "moji-clip",
            "vlm": "moji-vlm-l",
        }.items()
    }
    assert all(seeds.values())
    kinds = list(seeds)
    for i, first in enumerate(kinds):
        for second in kinds[i + 1 :]:
            assert not seeds[first] & seeds[second], (first, second)
