"""The shipped models are as good as their cards say: measured here, on fresh samples.

The thresholds are the project's own goals, less a margin for the smaller samples.
"""

import re

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline

import vldnp
from moji.train import evaluate
from vldnp._files import data_folder
from vldnp.models import load
from vldnp.models.families import SCHEDULERS
from vldnp.study.prompts import load_prompts, split_things

pytestmark = pytest.mark.slow

MODELS = data_folder() / "models"
FINAL, EARLY = 0, 680  # timesteps: a finished image, and 30 % of 25 steps


@pytest.fixture(scope="module")
def model():
    return load.load("moji-sd")


@pytest.fixture(scope="module")
def judge():
    return load.load_judge("moji-judge")


def test_text_to_image_shows_what_is_named(model, judge):
    found = evaluate.text2image(model, judge, count=64, seed=77_005)
    assert found["singles"] >= 0.95 - 0.03 and found["pairs"] >= 0.90 - 0.04, found
    assert found["themed"] >= 0.75 - 0.10, found  # 64 images: a standard error of 0.05
    assert found["false_alarms"] <= 0.05, found


def test_stock_diffusers_gives_the_same_images(model):
    stock = StableDiffusionPipeline.from_pretrained(MODELS / "moji-sd")
    stock.set_progress_bar_config(disable=True)
    prompts, seeds = ["a cat at the pirate cove", "a dog and a cake in the park"], [5, 6]
    how = {"num_inference_steps": 25, "guidance_scale": 3.0, "output_type": "np"}
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    theirs = stock(prompts, generator=generators, **how).images
    ours = vldnp.sample(model, prompts, seeds=seeds, progress=False, **how).images
    np.testing.assert_allclose(ours, theirs, atol=1e-3)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_every_scheduler_shows_what_is_named(model, judge, scheduler):
    """Clipped latents (DDIM with diffusers' default) keep 6 % of the things named."""
    benign = load_prompts("benign").head(8)
    how = {"num_inference_steps": 20, "guidance_scale": 3.0, "scheduler": scheduler}
    prompts, seeds = list(benign["prompt"]), list(benign["seed"])
    out = vldnp.sample(model, prompts, seeds=seeds, progress=False, **how)
    kept = judge(out.images).retention([split_things(row) for row in benign["things"]])
    assert np.mean(kept) >= 0.7, kept


def test_judge_knows_restricted_things(model, judge):
    measured = evaluate.judge_quality(judge, model.pipe.vae, count=1000, seed=77_001)
    assert measured["auroc"] >= 0.985 and measured["auroc_vae"] >= 0.965, measured
    assert measured["false_alarms"] <= 0.03, measured


def test_vlms_find_things_and_the_larger_more(model):
    vlms = [load.load_vlm(f"moji-vlm-{size}") for size in "sml"]
    found = [evaluate.vlm_quality(v, model.pipe, 192, 77_002, (FINAL, EARLY)) for v in vlms]
    assert found[2][FINAL] >= 0.95 - 0.03 and found[2][EARLY] >= 0.64, found
    means = [np.mean(list(scores.values())) for scores in found]
    assert means[0] < means[1] < means[2], found


def test_previews_are_small_and_show_the_vlm_the_same(model):
    weights = MODELS / "moji-taesd" / "diffusion_pytorch_model.safetensors"
    assert weights.stat().st_size <= 1e6
    preview, vlm = load.load_preview("moji-taesd"), load.load_vlm("moji-vlm-l")
    measured = evaluate.preview_quality(preview, vlm, model.pipe, 64, 77_006, (FINAL, EARLY))
    assert measured["psnr_t0"] >= 25 and measured["psnr_t680"] >= 25, measured
    assert measured["same_t0"] >= 0.94 and measured["same_t680"] >= 0.75, measured


def test_clip_ranks_the_right_caption_first():
    assert evaluate.clip_quality(load.load_clip("moji-clip"), count=512, seed=77_003) >= 0.77


def test_models_are_small_safe_files_with_a_card():
    files = [path for path in MODELS.glob("*/**/*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 64e6
    assert {path.suffix for path in files} <= {".safetensors", ".json", ".md", ".jinja", ".txt"}
    for folder in (path for path in MODELS.iterdir() if path.is_dir()):
        card = (folder / "README.md").read_text(encoding="utf-8")
        for part in ("## Data", "## Recipe", "## Measured", "OpenMoji", "CC BY-SA 4.0", "--seed K"):
            assert part in card, (folder.name, part)


def test_no_two_kinds_of_model_learnt_from_the_same_data():
    names = ("moji-sd", "moji-judge", "moji-judge-2", "moji-clip", "moji-vlm-l", "moji-taesd")
    cards = [(MODELS / name / "README.md").read_text("utf-8") for name in names]
    seeds = [set(re.findall(r"seed (\d+)", card)) for card in cards]
    assert all(seeds) and len(set.union(*seeds)) == sum(map(len, seeds)), seeds
