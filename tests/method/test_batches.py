"""What else is in its batch has no part in an image but by rounding, on moji-sd at ω = 15."""

import numpy as np
import pytest
import torch
from tiny import ScriptedVLM

from vldnp.baselines.safree import SAFREE
from vldnp.levers import adaptive, gate, window
from vldnp.methods import VLDNP
from vldnp.models import load
from vldnp.sampler import denoise
from vldnp.schedules import front_loaded

pytestmark = pytest.mark.slow

PROMPTS = ["a cat at the pirate cove", "a robot in the kitchen", "a skull and a knife in the park"]
SEEDS = [11, 12, 13]


def reply(image, question):
    """Answers by thresholds, three grey levels apart, so that answers hang on the picture."""
    band = int(np.asarray(image, dtype=float).mean() / 3)
    return ("none", "a knife", "a skull and a dagger")[band % 3]


def vl_dnp():
    return VLDNP(ScriptedVLM(reply), "moji", omega=15.0, query_steps=front_loaded(5))


METHODS = {
    "vl-dnp": vl_dnp,
    "levers": lambda: gate(adaptive(window(vl_dnp(), stop=0.8), 0.5), 0.97),
    "safree": lambda: SAFREE(["knife", "skull", "blood"], upper=35.0, alpha=0.0),
}


def steps(model, method, rows, scheduler):
    return list(
        denoise(
            model,
            [PROMPTS[row] for row in rows],
            METHODS[method](),
            seeds=[SEEDS[row] for row in rows],
            num_inference_steps=4 if method == "safree" else 10,
            guidance_scale=3.0,
            scheduler=scheduler,
        )
    )


def in_a_batch_and_alone(model, method, scheduler):
    """Pairs of the same step of the same image: its row in the batch, and on its own."""
    batch = steps(model, method, range(3), scheduler)
    for row in (0, 2):
        for together, alone in zip(batch, steps(model, method, [row], scheduler), strict=True):
            assert together.negative_prompts[row] == alone.negative_prompts[0]
            assert together.model_evaluations[row] == alone.model_evaluations[0]
            assert together.vlm_calls[row] == alone.vlm_calls[0]
            yield (together.latents[row], together.x0[row]), (alone.latents[0], alone.x0[0])
    if method == "vl-dnp":  # the answers were of all kinds
        found = {prompt for step in batch for prompt in step.negative_prompts}
        assert {None, "knife"} < found or {None, "dagger, skull"} < found
        assert sum(step.queried for step in batch) == 5


@pytest.mark.parametrize("method", METHODS)
def test_exact_in_float64(method):
    """With DDIM: the other schedulers of diffusers go by way of float32."""
    model = load.load("moji-sd", dtype=torch.float64)
    for together, alone in in_a_batch_and_alone(model, method, "ddim"):
        for ours, expected in zip(together, alone, strict=True):
            assert ours.dtype == torch.float64
            torch.testing.assert_close(ours, expected, atol=1e-9, rtol=1e-9)


def test_bounded_in_float32():
    for (latents, _), (expected, _) in in_a_batch_and_alone(load.load("moji-sd"), "vl-dnp", None):
        torch.testing.assert_close(latents, expected, atol=0.05, rtol=0)
