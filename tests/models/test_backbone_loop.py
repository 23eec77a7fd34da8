"""The batched sampler against the paper's four steps written out: one image at a time, three calls
of the U-Net a step, from the formulas, with nothing of `vldnp` but the concept set's parsing."""

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler
from tiny import ScriptedVLM, by_brightness, sd_pipeline

from vldnp.concepts import load_concepts
from vldnp.methods import VLDNP
from vldnp.models.backbone import Backbone
from vldnp.sampler import denoise

PROMPTS = ["a cat at the pirate cove", "a dog", "a cat", "pizza"]
SEEDS = [5, 6, 7, 8]
SCALES = [3.0, 7.5, 5.0, 1.5]
OMEGA, STEPS, QUERIES = 4.0, 7, (1, 2, 5)
PLAIN = {
    "dpm++": (DPMSolverMultistepScheduler, {"algorithm_type": "dpmsolver++"}),
    "ddim": (DDIMScheduler, {"clip_sample": False}),
    "euler": (EulerDiscreteScheduler, {}),
}


@pytest.fixture(scope="module", params=["epsilon", "v_prediction"])
def pipe(request):
    return sd_pipeline(request.param)


def alphas_bar():
    """ᾱ_t of Stable Diffusion's noise schedule, from its definition."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    return torch.cumprod(1 - betas, 0)


def cond(pipe, text):
    ids = pipe.tokenizer(
        text, padding="max_length", max_length=16, truncation=True, return_tensors="pt"
    ).input_ids
    return pipe.text_encoder(ids).last_hidden_state


def one_image(pipe, scheduler_name, image, concepts):
    """x_{t−1} after each step, x̂₀ and its image at a query, and the negative prompt in force."""
    kind, settings = PLAIN[scheduler_name]
    scheduler = kind.from_config(pipe.scheduler.config, **settings)
    scheduler.set_timesteps(STEPS)
    is_v = scheduler.config.prediction_type == "v_prediction"
    g, bar = SCALES[image], alphas_bar()
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(SEEDS[image]))
    x = x * scheduler.init_noise_sigma
    negative, after = None, []
    for i, t in enumerate(scheduler.timesteps):
        seen = scheduler.scale_model_input(x, t)
        u = pipe.unet(seen, t, encoder_hidden_states=cond(pipe, "")).sample
        c = pipe.unet(seen, t, encoder_hidden_states=cond(pipe, PROMPTS[image])).sample
        cfg = u + g * (c - u)
        x0 = shown = None
        if i in QUERIES:
            # In the variance-preserving scaling x is √ᾱ x₀ + √(1−ᾱ) ε; Euler's x is that / √ᾱ.
            ddim = scheduler_name == "ddim"
            a = bar[int(t)] if ddim else 1 / (1 + scheduler.sigmas[i].double() ** 2)
            xt, s = x * a**0.5 if scheduler_name == "euler" else x, (1 - a) ** 0.5
            x0 = a**0.5 * xt - s * cfg if is_v else (xt - s * cfg) / a**0.5
            (shown,) = pipe.image_processor.postprocess(pipe.vae.decode(x0.float() / 0.5).sample)
            negative = concepts.negative_prompt(concepts.parse(by_brightness(shown, "")))
        guided = cfg
        if negative:
            n = pipe.unet(seen, t, encoder_hidden_states=cond(pipe, negative)).sample
            guided = cfg - OMEGA * (n - u)
        x = scheduler.step(guided, t, x).prev_sample
        after.append((x[0], x0, shown, negative))
    return after


@torch.no_grad()
@pytest.mark.parametrize("scheduler", PLAIN)
def test_the_batched_sampler_is_the_sequential_reference_at_every_step(pipe, scheduler):
    concepts, vlm = load_concepts("moji"), ScriptedVLM(by_brightness)
    how = {"seeds": SEEDS, "guidance_scale": SCALES, "num_inference_steps": STEPS}
    method = VLDNP(vlm, "moji", OMEGA, QUERIES)
    steps = list(denoise(Backbone(pipe), PROMPTS, method, scheduler=scheduler, **how))
    assert vlm.calls == [4, 4, 4]  # one batched call for each query
    for image in range(4):
        plain = one_image(pipe, scheduler, image, concepts)
        for step, (x, x0, shown, negative) in zip(steps, plain, strict=True):
            assert step.negative_prompts[image] == negative
            size = x.abs().max()
            torch.testing.assert_close(step.latents[image], x, atol=1e-4 * size, rtol=1e-4)
            if x0 is not None:
                size = x0.abs().max()
                x0 = x0[0].float()
                torch.testing.assert_close(step.x0[image], x0, atol=1e-4 * size, rtol=1e-4)
                seen = np.asarray(step.x0_images[image], dtype=int)
                assert np.abs(seen - np.asarray(shown)).max() <= 1
    in_force = {prompt for step in steps for prompt in step.negative_prompts}
    assert {None, "dagger, skull"} <= in_force <= {None, "knife", "dagger, skull"}
