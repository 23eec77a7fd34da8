import copy
import warnings

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler
from diffusers import FlowMatchEulerDiscreteScheduler as FlowEuler
from diffusers.models.attention_processor import AttnProcessor
from tiny import sd_pipeline
from tiny_models import sd3_pipeline, tiny_vae

from vldnp.models.backbone import Backbone, Preview, as_backbone, to_pil
from vldnp.models.families import SCHEDULERS
from vldnp.models.run import Run

KINDS = ["epsilon", "v_prediction", "sample"]


def noise(seed, *shape):
    return torch.randn(*(shape or (2, 4, 8, 8)), generator=torch.Generator().manual_seed(seed))


def test_encode_is_the_stock_encoding(model):
    prompts = ["a cat at the pirate cove", "", "a dog", "a dog"]
    stock, empty = model.pipe.encode_prompt(prompts, "cpu", 1, True)
    assert torch.allclose(model.encode(prompts).embeds, stock, atol=1e-6)
    assert torch.allclose(model.encode([""] * 4).embeds, empty, atol=1e-6)


def test_each_text_is_encoded_once_in_a_run(model, monkeypatch):
    run, encoded, encode = Run(model, 2), [], Backbone.encode
    monkeypatch.setattr(
        Backbone, "encode", lambda s, texts, *size: encoded.extend(texts) or encode(s, texts, *size)
    )
    run.encode(["a cat", "", "a cat"])
    run.encode(["", "a dog"])
    assert encoded == ["a cat", "", "a dog"]


def test_a_long_prompt_is_cut_with_a_warning_that_says_what_is_lost(model):
    prompt = "a cat and a dog at the pirate cove and a pizza on a cat and a knife at the cove"
    with pytest.warns(UserWarning, match="16 tokens.*text: 'cat and a knife at the cove'"):
        cut = Run(model, 1).encode([prompt]).embeds
    assert torch.allclose(cut, model.pipe.encode_prompt(prompt, "cpu", 1, False)[0], atol=1e-6)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        Run(model, 1).encode([" ".join(["cat"] * 14)])  # and the two special tokens


@pytest.mark.parametrize("prompt", ["a (dagger:1.4)", "(a red dagger: .5), a cat", "<lora:cat:1>"])
def test_weights_in_a_prompt_are_said_once_to_be_letters(model, prompt):
    with pytest.warns(UserWarning, match='"\\(word:1.4\\)" or "<lora:name:1>" .* as letters'):
        Run(model, 1).encode([prompt])
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("default")
        Run(model, 1).encode(["a cat (at 10:30)", "a (cat)", "ratio 4:3"])
        assert not [w for w in said if w.category is UserWarning]
        for _ in range(2):
            Run(model, 1).encode([prompt, "a dog", f"{prompt} x"])
    assert len([w for w in said if "letters" in str(w.message)]) == 1


@pytest.mark.parametrize("name", SCHEDULERS)
def test_initial_latents_are_the_stock_ones(model, name):
    run, pipe = Run(model, 5, name, height=48, width=32), copy.copy(model.pipe)
    pipe.scheduler = run.scheduler
    generators = [torch.Generator().manual_seed(seed) for seed in (3, 7)]
    stock = pipe.prepare_latents(2, 4, 48, 32, torch.float32, "cpu", generators)
    assert torch.equal(run.initial_latents([3, 7]), stock)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", SCHEDULERS)
def test_x0_undoes_the_noise(model, name, kind):
    """A perfect prediction for noised latents gives the clean ones, at every step."""
    scheduler = Run(model, 6, name).scheduler
    scheduler.register_to_config(prediction_type=kind)
    run, clean, eps = Run(model, 6, scheduler), noise(1), noise(2)
    for i, t in enumerate(run.timesteps):
        run.scheduler._step_index = i
        if name == "ddim":
            alpha_bar = run.scheduler.alphas_cumprod[t]
        else:
            alpha_bar = 1 / (1 + run.scheduler.sigmas[i] ** 2)
        latents = alpha_bar**0.5 * clean + (1 - alpha_bar) ** 0.5 * eps
        latents = latents / alpha_bar**0.5 if name == "euler" else latents
        velocity = alpha_bar**0.5 * eps - (1 - alpha_bar) ** 0.5 * clean
        pred = {"epsilon": eps, "v_prediction": velocity, "sample": clean}[kind]
        torch.testing.assert_close(run.x0(pred, t, latents), clean, atol=1e-4, rtol=1e-4)


FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}


@pytest.mark.parametrize(
    "kind, how", [(FlowEuler, {"shift": 3}), (DPMSolverMultistepScheduler, FLOW)]
)
def test_x0_of_flow_matching(kind, how):
    run, shape = Run(Backbone(sd3_pipeline()), 6, kind(**how)), (2, 16, 8, 8)
    clean, eps = noise(1, *shape), noise(2, *shape)
    for t, sigma in zip(run.timesteps, run.scheduler.sigmas, strict=False):
        latents = (1 - sigma) * clean + sigma * eps
        torch.testing.assert_close(run.x0(eps - clean, t, latents), clean, atol=1e-5, rtol=1e-5)
        run.step(eps - clean, t, latents)


def test_decode_is_the_stock_decoding(model):
    latents, pipe = noise(0), model.pipe
    pixels = pipe.vae.decode(latents / 0.5).sample.detach()
    stock = pipe.image_processor.postprocess(pixels, output_type="pt")
    assert torch.allclose(model.decode(latents), stock, atol=1e-6)
    stock = pipe.image_processor.postprocess(pixels, output_type="pil")
    assert [i.tobytes() for i in to_pil(model.decode(latents))] == [i.tobytes() for i in stock]
    pixels = model.decode(noise(0) * 1e3)
    assert pixels.min() >= 0 and pixels.max() <= 1 and to_pil(pixels)[0].mode == "RGB"
    plain, pipe = model.decode(latents + 0.5 * 0.25), sd_pipeline()
    pipe.vae.register_to_config(shift_factor=0.25)
    assert torch.allclose(Backbone(pipe).decode(latents), plain, atol=1e-6)


def test_runs_do_not_disturb_each_other(model):
    def steps(seed):
        run = Run(model, 4)
        latents = run.initial_latents([seed])
        for i, t in enumerate(run.timesteps):
            latents = run.step(noise(i, 1, 4, 8, 8), t, latents)
            yield latents

    alone, interleaved = [list(steps(0)), list(steps(1))], zip(steps(0), steps(1), strict=True)
    for (a, b), c, d in zip(interleaved, *alone, strict=True):
        assert torch.equal(a, c) and torch.equal(b, d)
    assert model.pipe.scheduler.step_index is None


def test_wrapping_and_wrong_arguments(model):
    assert as_backbone(model) is model and as_backbone(model.pipe).pipe is model.pipe
    with pytest.raises(TypeError, match="vldnp.load.*'moji-sd'"):
        as_backbone("moji-sd")
    for wrong, message in (
        ({"num_inference_steps": 0}, "num_inference_steps must be 1 or more, not 0"),
        ({"num_inference_steps": 1, "height": 30}, "multiples of 4, not 30×32"),
        ({"num_inference_steps": 1, "scheduler": "dpm"}, "scheduler 'dpm'.*dpm\\+\\+"),
    ):
        with pytest.raises(ValueError, match=message):
            Run(model, **wrong)


def test_the_live_fingerprint_follows_all_that_decides_images(tmp_path):
    def fresh():
        return Backbone(sd_pipeline())

    def shift(part):
        with torch.no_grad():
            next(part.parameters()).view(-1)[0] += 1

    def swap(pipe):
        pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)

    def scale(pipe):  # as an adapter's scale is kept
        pipe.unet.mid_block.attentions[0].proj_in.scaling = {"lora": 0.5}

    changes = [
        *(lambda pipe: shift(pipe.unet), lambda pipe: shift(pipe.vae)),
        *(lambda pipe: shift(pipe.text_encoder), swap, scale),
        lambda pipe: pipe.enable_freeu(0.9, 0.2, 1.2, 1.4),
        lambda pipe: pipe.enable_freeu(0.9, 0.2, 1.1, 1.4),  # weaker
        lambda pipe: pipe.scheduler.register_to_config(solver_order=3),
        lambda pipe: pipe.tokenizer.add_tokens(["<cat>"]),
        lambda pipe: pipe.unet.set_attn_processor(AttnProcessor()),
    ]
    found = [fresh().fingerprint()]
    for change in changes:
        change((model := fresh()).pipe)
        found.append(model.fingerprint())
        assert model.fingerprint() == found[-1]
    assert len({*found}) == len(changes) + 1 and fresh().fingerprint() == found[0]
    model.pipe.enable_freeu(0.9, 0.2, 1.2, 1.4)
    model.pipe.disable_freeu()
    assert model.fingerprint() == found[-1]
    for name in ("one", "other"):
        fresh().pipe.save_pretrained(tmp_path / name)
    opened = [Backbone.from_pretrained(str(tmp_path / n), device="cpu") for n in ("one", "other")]
    assert opened[0].fingerprint() == opened[1].fingerprint()


def test_a_preview_decodes_in_its_own_precision():
    tiny = Preview(tiny_vae().bfloat16(), "tiny", "1")
    pictures = tiny.decode(noise(0))
    assert pictures.dtype == torch.float32 and pictures.shape == (2, 3, 32, 32)
    assert tiny.describe()["dtype"] == "torch.bfloat16"
