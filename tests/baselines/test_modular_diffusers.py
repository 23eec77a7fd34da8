"""The guider and its block in diffusers' modular SDXL, against `vldnp.sample`."""

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionXLAutoBlocks
from tiny_models import sdxl_pipeline

from vldnp.baselines.methods import SAFREE, SLD, Repelled, Summed
from vldnp.baselines.modular_diffusers import VLDNPGuidance, looking
from vldnp.core.methods import CFG, VLDNP, Static
from vldnp.core.sampler import sample

PROMPTS = ["a cat", "a dog", "a cat at the pirate cove"]
SCRIPT = [
    ["a knife", "none", "none"],
    ["none", "none", "none"],
    ["a skull", "a knife and a dagger", "none"],
]
STEPS, G = 6, 5.0
OURS = {"num_inference_steps": STEPS, "guidance_scale": G, "output_type": "pt", "progress": False}
THEIRS = {"num_inference_steps": STEPS, "output_type": "pt", "output": ["latents", "images"]}


@pytest.fixture(scope="module")
def stock():
    return sdxl_pipeline()


@pytest.fixture(scope="module")
def modular(stock):
    pipe = looking(StableDiffusionXLAutoBlocks().get_workflow("text2image")).init_pipeline()
    parts = ("unet", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
    pipe.update_components(
        **{part: getattr(stock, part) for part in parts}, scheduler=stock.scheduler
    )
    return pipe


def generators():
    return [torch.Generator().manual_seed(seed) for seed in range(3)]


def scripted(**options):
    answers = iter(SCRIPT)
    method = {"concepts": "moji", "omega": 4.0, "query_steps": (0, 2, 3), **options}
    return VLDNP(lambda images, question: next(answers), **method)


@pytest.mark.parametrize(
    "method",
    [
        CFG,
        lambda: Static("a knife", omega=4.0),
        scripted,
        lambda: scripted(query_steps=(1, 2, 4), rule="perp-neg"),
        lambda: SLD("a knife", strength="weak"),
    ],
    ids=["cfg", "static", "vl-dnp", "vl-dnp-perp-neg", "sld"],
)
def test_the_guider_is_the_sampler(stock, modular, method):
    expected = sample(stock, PROMPTS, method(), generator=generators(), **OURS)
    guider = VLDNPGuidance(method(), guidance_scale=G)
    modular.update_components(guider=guider)
    out = modular(prompt=PROMPTS, generator=generators(), **THEIRS)
    assert torch.allclose(out["latents"], expected.latents, atol=1e-4)
    assert torch.allclose(out["images"], expected.images, atol=1e-4)
    last = expected.trace.steps[-1]
    assert [negative.prompt for negative in guider.negatives] == last.negative_prompts


def test_a_second_run_starts_afresh(modular):
    modular.update_components(guider=VLDNPGuidance(SLD("a knife"), guidance_scale=G))
    runs = [modular(prompt=PROMPTS, generator=generators(), **THEIRS) for _ in range(2)]
    assert torch.equal(runs[0]["latents"], runs[1]["latents"])


def test_what_the_vlm_is_asked_and_what_it_costs(stock, modular):
    seen, rows = [], []
    answers = iter(SCRIPT)

    def vlm(images, question):
        seen.append([image.size for image in images])
        return next(answers)

    modular.update_components(
        guider=VLDNPGuidance(VLDNP(vlm, "moji", 4.0, (0, 2, 3)), guidance_scale=G)
    )
    hook = stock.unet.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    try:
        modular(prompt=PROMPTS, generator=generators(), num_inference_steps=STEPS, output="images")
    finally:
        hook.remove()
    assert seen == [[(32, 32)] * 3] * 3
    # ε_c and ε_u at each step; ε_n at all but step 2, at which the VLM found nothing
    assert rows == [3] * (3 + 3 + 2 + 3 + 3 + 3)


def test_what_a_guider_cannot_carry():
    with pytest.raises(ValueError, match="'safree' changes what the prompts are encoded to"):
        VLDNPGuidance(SAFREE("a knife"))
    with pytest.raises(ValueError, match="a guider has no reuse, lag; use vldnp.sample"):
        VLDNPGuidance(Static("a knife", reuse=1, lag=2))
    for method in (Summed(["a knife", "a skull"]), Repelled(torch.zeros(1, 4, 8, 8))):
        with pytest.raises(ValueError, match="several negative prompts at a time, or"):
            VLDNPGuidance(method)
    with pytest.raises(ValueError, match="has no denoising loop.*get_workflow"):
        looking(StableDiffusionXLAutoBlocks())


def test_a_scheduler_that_clips_is_refused(stock, modular):
    clipping = DDIMScheduler.from_config(stock.scheduler.config, clip_sample=True)
    modular.update_components(guider=VLDNPGuidance(CFG()), scheduler=clipping)
    try:
        with pytest.raises(ValueError, match="DDIMScheduler clips .*clip_sample=False"):
            modular(prompt=PROMPTS[0], **THEIRS)
    finally:
        modular.update_components(scheduler=stock.scheduler)
