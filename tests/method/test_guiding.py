"""Unmodified pipelines within `guiding`, against `vldnp.sample`."""

import pytest
import torch
from diffusers import DDIMScheduler
from tiny import counted_rows, generators, sd_pipeline
from tiny_models import sd3_pipeline, sdxl_pipeline

import vldnp
from vldnp.baselines.nag import NAG
from vldnp.levers import adaptive, gate, window
from vldnp.models.families import SCHEDULERS
from vldnp.pipeline import guiding

PROMPTS = ["a cat", "a dog", "a cat at the pirate cove"]
SCRIPT = [
    ["a knife", "none", "none"],
    ["none", "none", "none"],
    ["a skull", "a knife and a dagger", "none"],
]
STEPS, G = 6, 5.0


@pytest.fixture(scope="module")
def pipe():
    return sd_pipeline()


def scripted(**options):
    answers = iter(SCRIPT)
    method = {"concepts": "moji", "omega": 4.0, "query_steps": (0, 2, 3), **options}
    return vldnp.VLDNP(lambda images, question: next(answers), **method)


def called(pipe, prompt=PROMPTS, **options):
    asked = {"num_inference_steps": STEPS, "guidance_scale": G, "output_type": "latent"}
    return pipe(prompt, generator=generators(0, 1, 2), **asked | options).images


def sampled(pipe, method, prompt=PROMPTS, **options):
    asked = {"num_inference_steps": STEPS, "guidance_scale": G, "progress": False, **options}
    return vldnp.sample(pipe, prompt, method, generator=generators(0, 1, 2), **asked)


def check(pipe, make):
    expected, plain = sampled(pipe, make()), called(pipe)
    with guiding(pipe, make()) as guide:
        latents = called(pipe)
    assert torch.allclose(latents, expected.latents, atol=1e-4)
    said = [[negative.prompt for negative in step] for step in guide.negatives]
    assert said == [step.negative_prompts for step in expected.trace.steps]
    steered = [row for row in range(3) if any(step[row] for step in said)]
    moved = (latents - plain).flatten(1).abs().amax(1) > 1e-3
    assert moved.nonzero().flatten().tolist() == steered


METHODS = {
    "static": lambda: vldnp.Static("a knife", omega=4.0),
    "vl-dnp": scripted,
    "perp-neg": lambda: scripted(query_steps=(1, 2, 4), rule="perp-neg"),
    "window": lambda: window(vldnp.Static("a knife", omega=4.0), stop=0.5),
    "gate": lambda: gate(scripted(), -1.0),
    "sld": lambda: vldnp.SLD("a knife", strength="weak"),
    "summed": lambda: vldnp.Summed(["a knife", "a skull"], omega=2.0),
}
BOTH = [(name, method) for name in SCHEDULERS for method in ("static", "vl-dnp")]
BOTH += [("dpm++", method) for method in METHODS if ("dpm++", method) not in BOTH]


@pytest.mark.parametrize(("name", "method"), BOTH)
def test_the_pipelines_pictures_are_the_samplers(pipe, name, method):
    kind, options = SCHEDULERS[name]
    pipe.scheduler = kind.from_config(pipe.scheduler.config, **options)
    check(pipe, METHODS[method])


def test_a_lever_that_drops_uncond(pipe):
    expected = sampled(pipe, adaptive(scripted(), 0.5))
    with guiding(pipe, adaptive(scripted(), 0.5)):
        assert torch.allclose(called(pipe), expected.latents, atol=1e-4)
    assert expected.trace.model_evaluations == [17, 15, 9]  # one image is never steered


def test_skipped_layers_are_refused():
    with guiding(sd3 := sd3_pipeline(), vldnp.Static("a knife")):
        with pytest.raises(ValueError, match="skipped layers change ε once more"):
            called(sd3, skip_guidance_layers=[0], skip_layer_guidance_start=0.0)


@pytest.mark.parametrize("family", [sdxl_pipeline, sd3_pipeline], ids=["sdxl", "sd3"])
def test_the_other_families(family):
    check(family(), scripted)


def test_nothing_stays_behind(pipe):
    plain = called(pipe)
    with counted_rows(pipe.unet) as rows:
        with guiding(pipe, vldnp.Static("a knife", omega=4.0)):
            first = called(pipe)
            assert torch.equal(called(pipe), first)  # a second call starts afresh
        assert rows == [6, 3] * 2 * STEPS and not torch.equal(first, plain)
        rows.clear()
        assert torch.equal(called(pipe), plain) and rows == [6] * STEPS

    def broken(images, question):
        raise RuntimeError("out of order")

    with pytest.raises(RuntimeError, match="out of order"):
        with guiding(pipe, vldnp.VLDNP(broken, "moji", query_steps=(2,))):
            called(pipe)
    assert torch.equal(called(pipe), plain) and not pipe.unet._forward_hooks


def test_images_of_one_prompt_and_controlnets_inputs(pipe):
    """Whatever the network is given besides has as many rows as its batch."""
    seen = []
    hook = pipe.unet.register_forward_pre_hook(
        lambda _, args, given: seen.append(given["cross_attention_kwargs"]), with_kwargs=True
    )
    method, three = vldnp.Static("a knife", omega=4.0), {"num_images_per_prompt": 3}
    with guiding(pipe, method):
        latents = called(pipe, "a cat", cross_attention_kwargs={}, **three)
    hook.remove()
    expected = sampled(pipe, method, "a cat", **three)
    assert torch.allclose(latents, expected.latents, atol=1e-4)
    assert seen == [{}] * 2 * STEPS


def test_what_no_hook_can_serve(pipe):
    unservable = "needs what the prompts are encoded to.*use vldnp.sample"
    with pytest.raises(ValueError, match=f"'safree' changes or {unservable}"):
        with guiding(pipe, vldnp.SAFREE("a knife")):
            pass
    with pytest.raises(ValueError, match=unservable):
        with guiding(pipe, vldnp.Static("a knife", rule=NAG())):
            called(pipe)
    with pytest.raises(TypeError, match="must be a Method"):
        with guiding(pipe, "vl-dnp"):
            pass
    with guiding(pipe, vldnp.Static("a knife")):
        with pytest.raises(ValueError, match="guidance_scale 1.0 leaves no ε_u"):
            called(pipe, guidance_scale=1.0)
        with pytest.raises(ValueError, match="guidance_rescale"):
            called(pipe, guidance_rescale=0.5)
        own = pipe.scheduler
        pipe.scheduler = DDIMScheduler.from_config(own.config, clip_sample=True)
        with pytest.raises(ValueError, match="DDIMScheduler clips"):
            called(pipe)
        pipe.scheduler = own
    assert not pipe.unet._forward_hooks
