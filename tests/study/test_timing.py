"""What things cost: the sequential reference is the method, and the parts make up the whole."""

import time
from types import SimpleNamespace

import pytest
import torch
from tiny import llava, sd_pipeline
from tiny_models import tiny_vae
from torch import nn

from vldnp.concepts import load_concepts
from vldnp.methods import VLDNP
from vldnp.models.backbone import Backbone, Preview
from vldnp.models.vlm import TransformersVLM
from vldnp.negatives import SampleId
from vldnp.sampler import sample
from vldnp.show import figures, timing_text
from vldnp.study import timing

PROMPTS = ["a cat", "a dog at the cove", "a pizza"]
SAMPLING = {"num_inference_steps": 5, "guidance_scale": 3.0, "scheduler": "dpm++"}


@pytest.fixture(scope="module")
def model():
    return Backbone(sd_pipeline(), "tiny", "0")


def nothing(images, question):
    return ["?"] * len(images)


def test_the_sequential_reference_ends_where_the_sampler_does(model):
    concepts = load_concepts("moji")
    vlm, steps = timing.Scripted(nothing, concepts), (1, 3)
    method = VLDNP(vlm, concepts, 4.0, steps)
    batched = sample(model, PROMPTS, method, progress=False, output_type="latent", **SAMPLING)
    for seed, prompt in enumerate(PROMPTS):
        alone = timing.sequential_reference(
            model, vlm, concepts, prompt, seed, omega=4.0, query_steps=steps, **SAMPLING
        )
        torch.testing.assert_close(alone[0], batched.latents[seed], atol=1e-4, rtol=1e-4)
    assert [n is not None for n in batched.trace.steps[-1].negative_prompts] == [True, False, True]


def test_with_a_gpu_the_models_are_of_real_size(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    made = []

    def built(*arguments, **options):
        made.append((*arguments, options))
        return sd_pipeline() if arguments[0].startswith("sd") else "a VLM"

    monkeypatch.setattr(timing.random_models, "taesd", lambda *where: where)
    for builder in ("stable_diffusion", "qwen"):
        monkeypatch.setattr(timing.random_models, builder, built)
    bench = timing.bench(None, answer_tokens=5)
    assert bench.real_size and bench.vlm == "a VLM" and bench.label.endswith("on a GPU")
    assert bench.preview == ("cuda", torch.float16)
    vlm, model = made
    assert vlm[:2] == ("qwen2.5-vl-3b", "cuda") and vlm[-1]["max_new_tokens"] == 5
    assert model[:2] == ("sd-1.4", "cuda")


def test_without_a_gpu_the_profiles_models_are_timed(model, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    vlm = TransformersVLM(*llava(), "tiny-vlm")
    tiny = Preview(tiny_vae(), "tiny", "0")
    profile = SimpleNamespace(name="mine", model=model, vlm=vlm, preview=tiny)
    bench = timing.bench(profile)
    assert bench.preview is tiny
    assert bench.model is model and not bench.real_size and "There is no GPU here" in bench.label
    with pytest.raises(ValueError, match="the VLM of profile 'mine' must run here to be timed"):
        timing.bench(SimpleNamespace(name="mine", model=model, vlm=nothing))


@pytest.mark.parametrize(("every", "steered"), [(0, []), (1, [0, 1, 2, 3]), (2, [0, 2])])
def test_one_in_so_many_is_steered(every, steered):
    asked = timing.Scripted(nothing, load_concepts("moji"), every)
    answers = asked(["x"] * 4, "?", [SampleId("a cat", seed) for seed in range(4)])
    assert [seed for seed, answer in enumerate(answers) if answer != "none"] == steered


def test_the_stopwatch_counts_what_is_called_and_nothing_else():
    class Sleep(nn.Module):
        def forward(self, seconds):
            time.sleep(seconds)

    long, idle = Sleep(), Sleep()
    with timing.stopwatch({"long": long, "idle": idle}) as seconds:
        long(0.05)
        long(0.05)
        time.sleep(0.05)
    long(0.05)
    assert 0.1 <= seconds["long"] < 0.15 + 0.5 and seconds["idle"] == 0


def test_parts_make_up_the_whole(model):
    vlm = TransformersVLM(*llava(), "tiny-vlm", max_new_tokens=2)
    preview = Preview(tiny_vae(), "tiny", "0")
    bench = timing.Bench(model, vlm, "tiny models", False, preview)
    table = timing.parts_of_cost(
        bench, "moji", PROMPTS, sequential_images=1, queries=2, progress=False, **SAMPLING
    )
    ways = ["plain CFG", "plain CFG, adaptive", "sequential reference", "VL-DNP", "fast"]
    ways += ["fast, adaptive"]
    assert list(table.index) == ways
    parts = table.drop(columns=["seconds", "ratio", "images"])
    assert (parts >= 0).all(axis=None)
    assert parts.sum(axis=1).to_numpy() == pytest.approx(table["seconds"].to_numpy())
    assert table.loc["plain CFG", ["VLM", "ratio"]].tolist() == [0, 1]
    assert (table.loc[ways[2:], "VLM"] > 0).all()
    assert list(table["preview decoder"] > 0) == [False] * 4 + [True] * 2
    assert list(table["images"]) == [3, 3, 1, 3, 3, 3]
    said = timing_text.parts_of_cost(table, bench.label)
    assert "tiny models" in said and said.count("times as fast as `sequential reference`") == 3
    bars = figures.cost_parts(timing.relative(table)).axes[0].patches
    assert len(bars) == parts.size
