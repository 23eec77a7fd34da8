"""Unmodified pipelines within `guiding`, against `vldnp.sample`."""

import pytest
import torch
from diffusers import (
    ControlNetModel,
    DDIMScheduler,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
)
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
    "static": lambda: vldnp.Static("a knife", omega=4.0), "vl-dnp": scripted,
    "perp-neg": lambda: scripted(query_steps=(1, 2, 4), rule="perp-neg"),
    "window": lambda: window(vldnp.Static("a knife", omega=4.0), stop=0.5),
    "gate": lambda: gate(scripted(), -1.0), "sld": lambda: vldnp.SLD("a knife", strength="weak"),
    "summed": lambda: vldnp.Summed(["a knife", "a skull"], omega=2.0),
}  # fmt: skip
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


CHANGED = {
    "negative_prompt": "a knife", "negative_prompt_embeds": torch.zeros(1, 16, 32), "clip_skip": 1,
    "guidance_rescale": 0.5, "skip_guidance_layers": [0],
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGED)
def test_arguments_that_change_uncond_are_refused(pipe, name):
    with guiding(pipe := sd3_pipeline() if name[:4] == "skip" else pipe, vldnp.Static("a knife")):
        with pytest.raises(ValueError, match=f"{name} changes ε_u or ε in addition to the"):
            pipe("a cat", **{name: CHANGED[name]})
        pipe("a cat", num_inference_steps=1, negative_prompt="", output_type="latent")


def test_a_callback_changes_g_or_switches_cfg_off(pipe):
    def at_3(g: float) -> dict:
        def changed(pipe, i: int, t, tensors: dict) -> dict:
            if i == 3:
                pipe._guidance_scale = g
                cond = tensors["prompt_embeds"]
                tensors["prompt_embeds"] = cond if g > 1 else cond.chunk(2)[1]
            return tensors

        inputs = {"callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
        return inputs | {"callback_on_step_end": changed}

    with guiding(pipe, vldnp.Static("a knife", omega=0.0)):  # CFG
        latents = called(pipe, **at_3(2.0))
        with pytest.raises(ValueError, match="guidance_scale 0 leaves no ε_u"):
            called(pipe, **at_3(0))
    assert torch.allclose(latents, called(pipe, **at_3(2.0)), atol=1e-4)
    assert not torch.allclose(latents, called(pipe), atol=1e-2)


@pytest.mark.parametrize(("begin", "skipped"), [(1.0, 0), (0.67, 2)])
def test_image_to_image(pipe, begin, skipped):
    """From noise it is the text-to-image pipeline; later it skips steps, and their queries."""
    given = StableDiffusionImg2ImgPipeline.from_pipe(pipe)
    image = torch.zeros(3, 3, 32, 32)
    asked = []

    def answer(images, question):
        asked.append(len(images))
        return ["a knife", "none", "none"]

    method = vldnp.VLDNP(answer, "moji", omega=4.0, query_steps=(0, 2, 3))
    plain, alone = called(given, image=image, strength=begin), called(pipe)
    with guiding(given, method) as guide:
        latents = called(given, image=image, strength=begin)
        count = len(guide.negatives)
        assert torch.equal(called(pipe), alone)  # of the same network: not guided
        assert len(guide.negatives) == count
    assert count == STEPS - skipped and asked == [3] * (3 - (skipped > 0))
    moved = (latents - plain).flatten(1).abs().amax(1) > 1e-3
    assert moved.tolist() == [True, False, False]


def test_a_controlnet(pipe):
    net = ControlNetModel.from_unet(pipe.unet, conditioning_embedding_out_channels=(16, 32, 32))
    with torch.no_grad():
        for block in net.controlnet_down_blocks:
            block.weight.normal_(generator=torch.Generator().manual_seed(0))
    given = StableDiffusionControlNetPipeline(**pipe.components, controlnet=net)
    plain, image = called(pipe), torch.ones(3, 3, 32, 32)
    without = called(given, image=image)
    assert not torch.allclose(without, plain, atol=1e-2)
    with guiding(given, vldnp.Static("a knife", omega=0.0)):  # CFG
        assert torch.allclose(called(given, image=image), without, atol=1e-4)
    with guiding(given, vldnp.Static("a knife", omega=4.0)):
        steered = called(given, image=image)
    net.controlnet_mid_block.weight.data.zero_()
    for block in net.controlnet_down_blocks:
        block.weight.data.zero_()
    with guiding(given, vldnp.Static("a knife", omega=4.0)):  # what the ControlNet adds is 0
        assert torch.allclose(
            called(given, image=image),
            sampled(pipe, vldnp.Static("a knife", omega=4.0)).latents,
            atol=1e-4,
        )
    assert not torch.allclose(steered, without, atol=1e-2)


def test_nested(pipe):
    with guiding(pipe, vldnp.CFG()):
        with pytest.raises(ValueError, match="this pipeline is guided already"):
            with guiding(pipe, vldnp.CFG()):
                pass


def test_what_no_hook_can_serve(pipe):
    unservable = "needs the encoded prompts.*use vldnp.sample"
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
        own = pipe.scheduler
        pipe.scheduler = DDIMScheduler.from_config(own.config, clip_sample=True)
        with pytest.raises(ValueError, match="DDIMScheduler clips"):
            called(pipe)
        pipe.scheduler = own
    assert not pipe.unet._forward_hooks
