"""The baselines as methods: in the sampler, against their equations written out."""

import json

import pytest
import torch
from tiny import ScriptedVLM, by_brightness, noise, sd_pipeline
from tiny_judges import EverythingUnsafe

from vldnp import guidance
from vldnp.baselines.categories import CASG, Summed
from vldnp.baselines.controls import Judged, closed_loop, random_concepts
from vldnp.baselines.safe_denoiser import Repelled
from vldnp.baselines.safree import SAFREE
from vldnp.baselines.sld import SLD, STRENGTHS, sld
from vldnp.methods import CFG, VLDNP, Static
from vldnp.models.backbone import Backbone
from vldnp.models.run import Run
from vldnp.negatives import Policy
from vldnp.sampler import sample
from vldnp.schedules import front_loaded, uniform

PROMPTS, SEEDS = ["a cat at the pirate cove", "a dog"], [3, 4]
PHRASES = ("knife", "skull", "blood")
QUICK = {"num_inference_steps": 6, "progress": False}


@torch.no_grad()
def sld_written_out(model, prompt, seed, g, num_steps, negatives):
    """SLD medium for one image with DDIM, with its own negative prompt (or none) at each step."""
    pipe, run = model.pipe, Run(model, num_steps, "ddim")
    x, nu = noise(1, 4, 8, 8, seed=seed), 0.0

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


def test_sld_with_dynamic_negatives_each_image_with_its_own_momentum(exact):
    answers = iter(["knife", "none", "none", "skull", "skull", "skull"])
    vlm = ScriptedVLM(lambda image, question: next(answers))
    method = VLDNP(vlm, "moji", rule=sld("medium"), query_steps=[1, 4, 6])
    asked = {"num_inference_steps": 9, "guidance_scale": 3.0, "scheduler": "ddim"}
    out = sample(exact, PROMPTS, method, seeds=SEEDS, progress=False, **asked)
    for k, (prompt, seed) in enumerate(zip(PROMPTS, SEEDS, strict=True)):
        negatives = [step.negative_prompts[k] for step in out.trace.steps]
        changing = [None, *["knife"] * 3, None, None, *["skull"] * 3]
        assert negatives == [changing, [None] * 4 + ["skull"] * 5][k]
        x = sld_written_out(exact, prompt, seed, 3.0, 9, negatives)
        assert torch.allclose(out.latents[k], x, atol=1e-6)


def test_sld_with_scale_0_is_plain_cfg_bit_for_bit(model):
    plain = sample(model, PROMPTS, **QUICK)
    out = sample(model, PROMPTS, SLD("a knife", "max", scale=0), **QUICK)
    assert torch.equal(out.latents, plain.latents)
    assert out.trace.model_evaluations == plain.trace.model_evaluations


HALF = {rule: lambda rule=rule: Static("knife", 4.0, rule) for rule in guidance.RULES}
HALF["safree"] = lambda: SAFREE(PHRASES, upper=34.0, t0=1.0)


@pytest.mark.parametrize("method", HALF)
def test_half_precision(method):
    half = Backbone(sd_pipeline().to(dtype=torch.bfloat16))
    out = sample(half, PROMPTS, HALF[method](), **QUICK)
    assert out.latents.dtype == torch.bfloat16 and out.latents.isfinite().all()


@pytest.mark.parametrize("rule", [name for name in guidance.RULES if name != "added"])
def test_every_rule_takes_static_and_dynamic_negatives(exact, rule):
    seen = ScriptedVLM(lambda image, question: "knife")
    seeing = VLDNP(seen, "moji", omega=4.0, rule=rule, query_steps=[0])
    plain = sample(exact, PROMPTS, **QUICK).latents
    static = sample(exact, PROMPTS, Static("knife", 4.0, rule), **QUICK).latents
    dynamic = sample(exact, PROMPTS, seeing, **QUICK).latents
    assert torch.allclose(static, dynamic, atol=1e-4)
    assert not torch.allclose(static, plain, atol=1e-3)


def glance(images, question):
    return ["none"] * len(images)


def every_setting():
    """Methods, no two of which have the same settings."""
    dynamic = VLDNP(glance, "moji", omega=4.0)
    bank = noise(5, 4, 3, 3).float()
    negatives = ("accumulated", 2)
    return [
        CFG(), *(Static("knife", 4.0, rule) for rule in guidance.RULES),
        *(VLDNP(glance, "moji", omega=4.0, rule=rule) for rule in guidance.RULES),
        *(VLDNP(glance, "moji", omega=4.0, update_policy=policy) for policy in negatives),
        Static("knife", omega=8), Static("skull", omega=4.0),
        Static("knife", rule=guidance.replaced), VLDNP(glance, "moji", omega=8),
        VLDNP(glance, "moji", omega=4.0, lead="weapons"),
        VLDNP(glance, concepts="nudity", omega=4.0),
        VLDNP(glance, "moji", omega=4.0, query_steps=[1, 2]),
        VLDNP(glance, "moji", omega=4.0, query_steps=front_loaded(6)),
        VLDNP(glance, "moji", omega=4.0, query_steps=uniform(6)),
        VLDNP(glance, "moji", omega=4.0, on_failure="static"),
        VLDNP(glance, "moji", omega=4.0, static_prompt="weapons"),
        VLDNP(ScriptedVLM(by_brightness), "moji", omega=4.0),
        VLDNP(Judged(EverythingUnsafe()), "moji", omega=4.0), random_concepts(dynamic),
        random_concepts(dynamic, seed=1), closed_loop(dynamic), SLD("skull"),
        *(SLD("knife", strength) for strength in STRENGTHS), SLD("knife", warmup=5),
        Summed(PHRASES), Summed(PHRASES[:2]), CASG(PHRASES), CASG(PHRASES, sld("max")),
        SAFREE(PHRASES), SAFREE(PHRASES[:2]), SAFREE(PHRASES, negative_prompt="knife"),
        SAFREE(PHRASES, negative_prompt="knife", rule="added"), SAFREE(PHRASES, re_attention=False),
        SAFREE(PHRASES, alpha=0.02), SAFREE(PHRASES, upper=20.0),
        SAFREE(PHRASES, scales=(0.9, 0.3)), Repelled(bank), Repelled(bank + 1),
        Repelled(bank, sigma=2), Repelled(bank, kernel="laplacian"),
        Repelled(bank, Static("knife")), Repelled(bank, SAFREE("knife")),
    ]  # fmt: skip


def test_methods_describe_themselves():
    methods, again = every_setting(), every_setting()
    described = [json.dumps(method.describe(), sort_keys=True) for method in methods]
    assert len(set(described)) == len(methods)
    for method, same, text in zip(methods, again, described, strict=True):
        assert json.dumps(same.describe(), sort_keys=True) == text
        assert method.negatives == Policy() or (method.omega is None) != method.rule.uses_omega
    names = {method.name for method in methods}
    assert names >= {f"sld-{strength}" for strength in ("weak", "medium", "strong", "max")}
    assert names >= {"cfg", "static", "safree", "safe-denoiser", "static + safe-denoiser"}
    assert VLDNP(glance, "moji").describe()["negatives"]["vlm"]["name"].endswith("glance")
    assert SAFREE("knife, skull , blood") == SAFREE(PHRASES)
    made, named = SLD("knife", "strong").describe(), Static("knife", rule=sld("strong")).describe()
    assert made | {"name": ""} == named | {"name": ""}
