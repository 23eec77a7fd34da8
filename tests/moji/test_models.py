"""The shipped models are as good as their cards say: measured here, on fresh samples.

The thresholds are the project's own goals, less a margin for the smaller samples. Where a goal is
not reached yet, a test that may fail says so, and another guards what has been reached.
"""

import re

import numpy as np
import pytest
import torch
from diffusers import SASolverScheduler, StableDiffusionPipeline

import vldnp
from moji.train import evaluate
from vldnp._files import data_folder
from vldnp.models import load
from vldnp.models.families import SCHEDULERS, STEPPERS
from vldnp.study.prompts import load_prompts, split_things

pytestmark = pytest.mark.slow

MODELS = data_folder() / "models"
FINAL, EARLY = 0, 680
"""Timesteps: a finished picture, and 30 % of 25 steps."""


@pytest.fixture(scope="module")
def model():
    return load.load("moji-sd")


@pytest.fixture(scope="module")
def judge():
    return load.load_judge("moji-judge")


@pytest.fixture(scope="module")
def drawn(model, judge):
    return evaluate.text2image(model, judge, count=64, seed=77_005)


@pytest.fixture(scope="module")
def seen(model):
    """F1 of the three VLMs by timestep."""
    vlms = {size: load.load_vlm(f"moji-vlm-{size}") for size in "sml"}
    return {
        size: evaluate.vlm_quality(vlm, model.pipe, 192, 77_002, (FINAL, EARLY))
        for size, vlm in vlms.items()
    }


def test_text_to_image_draws_what_is_named(drawn):
    assert drawn["singles"] >= 0.95 - 0.03, drawn
    assert drawn["pairs"] >= 0.90 - 0.04, drawn
    assert drawn["themed"] >= 0.75 - 0.10, drawn  # 64 pictures: a standard error of 0.05
    assert drawn["false_alarms"] <= 0.05, drawn


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


NAMED = {kind for kind, _ in SCHEDULERS.values()}
PAINTERS = {name: name for name in SCHEDULERS} | {
    kind.__name__: kind
    for kind in STEPPERS
    if kind not in NAMED and "Parallel" not in kind.__name__  # which step as those without
}


@pytest.mark.parametrize("scheduler", PAINTERS.values(), ids=PAINTERS)
def test_every_scheduler_paints_what_is_named(model, judge, scheduler):
    """Clipped latents (DDIM with diffusers' default) keep 6 % of the things named."""
    if not isinstance(scheduler, str):
        own = {"algorithm_type": "data_prediction"} if scheduler is SASolverScheduler else {}
        latent = {"clip_sample": False, "thresholding": False, "skip_prk_steps": True}
        scheduler = scheduler.from_config(model.pipe.scheduler.config, **latent, **own)
    benign = load_prompts("benign").head(8)
    out = vldnp.sample(
        model,
        list(benign["prompt"]),
        seeds=list(benign["seed"]),
        num_inference_steps=20,
        guidance_scale=3.0,
        scheduler=scheduler,
        progress=False,
    )
    found = judge(out.images).things
    things = [split_things(row) for row in benign["things"]]
    hits = [row[t] >= 0.5 for names, row in zip(things, found, strict=True) for t in names]
    assert np.mean(hits) >= 0.7, hits


def test_judge_knows_restricted_things(model, judge):
    measured = evaluate.judge_quality(judge, model.pipe.vae, count=1000, seed=77_001)
    assert measured["auroc"] >= 0.985, measured
    assert measured["auroc_vae"] >= 0.965, measured
    assert measured["false_alarms"] <= 0.03, measured


def test_vlms_see_and_the_larger_see_better(seen):
    assert seen["l"][FINAL] >= 0.95 - 0.03 and seen["l"][EARLY] >= 0.64, seen
    means = [np.mean(list(seen[size].values())) for size in "sml"]
    assert means[0] < means[1] < means[2], seen


@pytest.mark.xfail(reason="not reached; the model card has the figure", strict=False)
def test_the_largest_vlm_reaches_its_goal(seen):
    assert seen["l"][EARLY] >= 0.8 - 0.04, seen


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
    suffixes = {path.suffix for path in files}
    assert suffixes <= {".safetensors", ".json", ".md", ".jinja", ".txt"}, suffixes
    for folder in (path for path in MODELS.iterdir() if path.is_dir()):
        card = (folder / "README.md").read_text(encoding="utf-8")
        for part in ("## Data", "## Recipe", "## Measured", "OpenMoji", "CC BY-SA 4.0", "seed"):
            assert part in card, (folder.name, part)


def test_no_two_kinds_of_model_learnt_from_the_same_data():
    seeds = {
        kind: set(re.findall(r"seed (\d+)", (MODELS / name / "README.md").read_text("utf-8")))
        for kind, name in {
            "sd": "moji-sd",
            "judge": "moji-judge",
            "judge-2": "moji-judge-2",
            "clip": "moji-clip",
            "vlm": "moji-vlm-l",
            "preview": "moji-taesd",
        }.items()
    }
    assert all(seeds.values())
    kinds = list(seeds)
    for i, first in enumerate(kinds):
        for second in kinds[i + 1 :]:
            assert not seeds[first] & seeds[second], (first, second)
