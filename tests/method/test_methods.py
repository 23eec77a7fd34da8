"""The baselines as methods: in the sampler, against their equations written out."""

import json

import pytest
import torch
from tiny import ScriptedVLM, by_brightness, sd_pipeline

from vldnp import guidance
from vldnp.baselines.sld import SLD, STRENGTHS, sld
from vldnp.methods import CFG, VLDNP, Static
from vldnp.models.backbone import Backbone
from vldnp.models.run import Run
from vldnp.sampler import sample

PROMPTS, SEEDS = ["a cat at the pirate cove", "a dog"], [3, 4]
QUICK = {"num_inference_steps": 6, "progress": False}


@pytest.fixture(scope="module")
def model():
    return Backbone(sd_pipeline())


@pytest.fixture(scope="module")
def exact():
    """In float64: SLD's threshold is a step, over which rounding errors of float32 may carry."""
    return Backbone(sd_pipeline().to(dtype=torch.float64))


@torch.no_grad()
def sld_written_out(model, prompt, seed, g, num_steps, negatives):
    """SLD medium for one image with DDIM, with its own negative prompt (or none) at each step."""
    pipe, run = model.pipe, Run(model, num_steps, "ddim")
    generator, nu = torch.Generator().manual_seed(seed), 0.0
    x = torch.randn(1, 4, 8, 8, generator=generator, dtype=torch.float64)

    def eps(text, t):
        embeds = pipe.encode_prompt(text, "cpu", 1, False)[0]
        return pipe.unet(x, t, encoder_hidden_states=embeds).sample

    for i, t in enumerate(run.timesteps):
        u, c, gamma = eps("", t), eps(prompt, t), 0.0
        if negatives[i]:
            n = eps(negatives[i], t)
            mu = (1000 * (c - n)).abs().clamp(0, 1) * (c - n < 0.01)
            gamma = mu * (n - u) + 0.3 * nu
            nu = 0.4 * nu + 0.6 * gamma
            gamma = gamma if i >= 10 * num_steps / 50 else 0.0
        x = run.scheduler.step(u + g * (c - u - gamma), t, x).prev_sample
    return x[0]


def test_sld_is_its_equations(exact):
    method = SLD("a knife, skull")
    asked = {"num_inference_steps": 9, "guidance_scale": 3.0, "scheduler": "ddim"}
    out = sample(exact, PROMPTS, method, seeds=SEEDS, progress=False, **asked)
    plain = sample(exact, PROMPTS, seeds=SEEDS, progress=False, **asked)
    for k, (prompt, seed) in enumerate(zip(PROMPTS, SEEDS, strict=True)):
        x = sld_written_out(exact, prompt, seed, 3.0, 9, ["a knife, skull"] * 9)
        assert torch.allclose(out.latents[k], x, atol=1e-6)
        assert not torch.allclose(out.latents[k], plain.latents[k], atol=1e-2)


def test_sld_with_dynamic_negatives_each_image_with_its_own_momentum(exact):
    answers = iter(["knife", "none", "none", "skull", "skull", "skull"])
    vlm = ScriptedVLM(lambda image, question: next(answers))
    method = VLDNP(vlm, "moji", rule=sld("medium"), query_steps=[1, 4, 6])
    asked = {"num_inference_steps": 9, "guidance_scale": 3.0, "scheduler": "ddim"}
    out = sample(exact, PROMPTS, method, seeds=SEEDS, progress=False, **asked)
    for k, (prompt, seed) in enumerate(zip(PROMPTS, SEEDS, strict=True)):
        negatives = [step.negative_prompts[k] for step in out.trace.steps]
        expected = [
            [None, *["knife"] * 3, None, None, *["skull"] * 3],
            [*[None] * 4, *["skull"] * 5],
        ]
        assert negatives == expected[k]
        x = sld_written_out(exact, prompt, seed, 3.0, 9, negatives)
        assert torch.allclose(out.latents[k], x, atol=1e-6)


def test_sld_with_scale_0_is_plain_cfg_bit_for_bit(model):
    plain = sample(model, PROMPTS, **QUICK)
    out = sample(model, PROMPTS, SLD("a knife", "max", scale=0), **QUICK)
    assert torch.equal(out.latents, plain.latents)
    assert out.trace.model_evaluations == plain.trace.model_evaluations


@pytest.mark.parametrize("rule", guidance.RULES)
def test_half_precision(rule):
    half = Backbone(sd_pipeline().to(dtype=torch.bfloat16))
    out = sample(half, PROMPTS, Static("knife", 4.0, rule), **QUICK)
    assert out.latents.dtype == torch.bfloat16 and out.latents.isfinite().all()


def test_accumulated_negatives_in_the_sampler(model):
    answers = ["knife", "skull", "none"]

    def negatives(update_policy):
        script = iter(answers)
        vlm = ScriptedVLM(lambda image, question: next(script))
        method = VLDNP(vlm, "moji", query_steps=[1, 2, 4], update_policy=update_policy)
        return [step.concepts[0] for step in sample(model, "a cat", method, **QUICK).trace.steps]

    both = ("knife", "skull")
    assert negatives("replaced") == [(), ("knife",), ("skull",), ("skull",), (), ()]
    assert negatives("accumulated") == [(), ("knife",), both, both, both, both]
    assert negatives(1) == [(), ("knife",), both, both, ("skull",), ("skull",)]


@pytest.mark.parametrize("rule", [name for name in guidance.RULES if name != "added"])
def test_every_rule_takes_static_and_dynamic_negatives(exact, rule):
    seen = ScriptedVLM(lambda image, question: "knife")
    plain = sample(exact, PROMPTS, **QUICK).latents
    static = sample(exact, PROMPTS, Static("knife", 4.0, rule), **QUICK).latents
    dynamic = sample(
        exact, PROMPTS, VLDNP(seen, "moji", omega=4.0, rule=rule, query_steps=[0]), **QUICK
    ).latents
    assert torch.allclose(static, dynamic, atol=1e-4)
    assert not torch.allclose(static, plain, atol=1e-3)


def test_methods_describe_themselves():
    vlm = ScriptedVLM(by_brightness)
    methods = [
        CFG(),
        *(Static("knife", 4.0, rule) for rule in guidance.RULES),
        *(VLDNP(vlm, "moji", omega=4.0, rule=rule) for rule in guidance.RULES),
        VLDNP(vlm, "moji", omega=4.0, update_policy="accumulated"),
        VLDNP(vlm, "moji", omega=4.0, update_policy=2),
        SLD("skull"),
        SLD("knife", warmup=5),
    ]
    described = [json.dumps(method.describe(), sort_keys=True) for method in methods]
    assert len(set(described)) == len(methods)
    names = [SLD("knife", strength).name for strength in STRENGTHS]
    assert names == ["sld-weak", "sld-medium", "sld-strong", "sld-max"]
    assert all((m.omega is None) != m.rule.uses_omega for m in methods if m.name != "cfg")


def test_the_same_sld_as_a_rule_and_by_constructor():
    made, named = SLD("knife", "strong").describe(), Static("knife", rule=sld("strong")).describe()
    assert made | {"name": ""} == named | {"name": ""}
