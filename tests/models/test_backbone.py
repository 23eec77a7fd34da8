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


@pytest.fixture(scope="module")
def backbone():
    return Backbone(sd_pipeline())


def noise(seed, *shape):
    return torch.randn(*(shape or (2, 4, 8, 8)), generator=torch.Generator().manual_seed(seed))


def test_encode_is_the_stock_encoding(backbone):
    prompts = ["a cat at the pirate cove", "", "a dog", "a dog"]
    stock, empty = backbone.pipe.encode_prompt(prompts, "cpu", 1, True)
    assert torch.allclose(backbone.encode(prompts).embeds, stock, atol=1e-6)
    assert torch.allclose(backbone.encode([""] * 4).embeds, empty, atol=1e-6)


def test_each_text_is_encoded_once_in_a_run(backbone, monkeypatch):
    run, encoded, encode = Run(backbone, 2), [], Backbone.encode
    monkeypatch.setattr(
        Backbone, "encode", lambda s, texts, *size: encoded.extend(texts) or encode(s, texts, *size)
    )
    run.encode(["a cat", "", "a cat"])
    run.encode(["", "a dog"])
    assert encoded == ["a cat", "", "a dog"]


def test_a_long_prompt_is_cut_with_a_warning_that_says_what_is_lost(backbone):
    prompt = "a cat and a dog at the pirate cove and a pizza on a cat and a knife at the cove"
    with pytest.warns(UserWarning, match="16 tokens.*text: 'cat and a knife at the cove'"):
        cut = Run(backbone, 1).encode([prompt]).embeds
    assert torch.allclose(cut, backbone.pipe.encode_prompt(prompt, "cpu", 1, False)[0], atol=1e-6)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        Run(backbone, 1).encode([" ".join(["cat"] * 14)])  # and the two special tokens


@pytest.mark.parametrize("prompt", ["a (dagger:1.4)", "(a red dagger: .5), a cat", "<lora:cat:1>"])
def test_weights_in_a_prompt_are_said_once_to_be_letters(backbone, prompt):
    with pytest.warns(UserWarning, match='"\\(word:1.4\\)" or "<lora:name:1>" .* as letters'):
        Run(backbone, 1).encode([prompt])
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("default", UserWarning)
        for texts in (["a cat (at 10:30)", "a (cat)"], [prompt, "a dog"], [f"{prompt} x"]):
            Run(backbone, 1).encode(texts)
    assert len([w for w in said if "letters" in str(w.message)]) == 1


@pytest.mark.parametrize("name", SCHEDULERS)
def test_initial_latents_are_the_stock_ones(backbone, name):
    run, pipe = Run(backbone, 5, name, height=48, width=32), copy.copy(backbone.pipe)
    pipe.scheduler = run.scheduler
    generators = [torch.Generator().manual_seed(seed) for seed in (3, 7)]
    stock = pipe.prepare_latents(2, 4, 48, 32, torch.float32, "cpu", generators)
    assert torch.equal(run.initial_latents([3, 7]), stock)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", SCHEDULERS)
def test_x0_undoes_the_noise(backbone, name, kind):
    """A perfect prediction for noised latents gives the clean ones, at every step."""
    scheduler = Run(backbone, 6, name).scheduler
    scheduler.register_to_config(prediction_type=kind)
    run, clean, eps = Run(backbone, 6, scheduler), noise(1), noise(2)
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


def test_decode_is_the_stock_decoding(backbone):
    latents, pipe = noise(0), backbone.pipe
    pixels = pipe.vae.decode(latents / 0.5).sample.detach()
    stock = pipe.image_processor.postprocess(pixels, output_type="pt")
    assert torch.allclose(backbone.decode(latents), stock, atol=1e-6)
    stock = pipe.image_processor.postprocess(pixels, output_type="pil")
    assert [i.tobytes() for i in to_pil(backbone.decode(latents))] == [i.tobytes() for i in stock]
    pixels = backbone.decode(noise(0) * 1e3)
    assert pixels.min() >= 0 and pixels.max() <= 1 and to_pil(pixels)[0].mode == "RGB"
    plain, pipe = backbone.decode(latents + 0.5 * 0.25), sd_pipeline()
    pipe.vae.register_to_config(shift_factor=0.25)
    assert torch.allclose(Backbone(pipe).decode(latents), plain, atol=1e-6)


def test_runs_do_not_disturb_each_other(backbone):
    def steps(seed):
        run = Run(backbone, 4)
        latents = run.initial_latents([seed])
        for i, t in enumerate(run.timesteps):
            latents = run.step(noise(i, 1, 4, 8, 8), t, latents)
            yield latents

    alone, interleaved = [list(steps(0)), list(steps(1))], zip(steps(0), steps(1), strict=True)
    for (a, b), c, d in zip(interleaved, *alone, strict=True):
        assert torch.equal(a, c) and torch.equal(b, d)
    assert backbone.pipe.scheduler.step_index is None


def test_wrapping_and_wrong_arguments(backbone):
    assert as_backbone(backbone) is backbone and as_backbone(backbone.pipe).pipe is backbone.pipe
    with pytest.raises(TypeError, match="vldnp.load.*'moji-sd'"):
        as_backbone("moji-sd")
    for wrong, message in (
        ({"num_inference_steps": 0}, "num_inference_steps must be 1 or more, not 0"),
        ({"num_inference_steps": 1, "height": 30}, "multiples of 4, not 30×32"),
        ({"num_inference_steps": 1, "scheduler": "dpm"}, "scheduler 'dpm'.*dpm\\+\\+"),
    ):
        with pytest.raises(ValueError, match=message):
            Run(backbone, **wrong)


def test_the_live_fingerprint_follows_all_that_decides_images(tmp_path):
    def fresh():
        return Backbone(sd_pipeline())

    def shift(name):
        def change(model):
            with torch.no_grad():
                next(getattr(model.pipe, name).parameters()).view(-1)[0] += 1

        return change

    def swap(model):
        model.pipe.scheduler = DDIMScheduler.from_config(model.pipe.scheduler.config)

    def scale(model):  # as an adapter's scale is kept
        model.network.mid_block.attentions[0].proj_in.scaling = {"lora": 0.5}

    changes = {
        **{name: shift(name) for name in ("unet", "vae", "text_encoder")},
        "freeu": lambda model: model.pipe.enable_freeu(0.9, 0.2, 1.2, 1.4),
        "freeu, weaker": lambda model: model.pipe.enable_freeu(0.9, 0.2, 1.1, 1.4),
        "scheduler": swap,
        "its config": lambda model: model.pipe.scheduler.register_to_config(solver_order=3),
        "tokenizer": lambda model: model.pipe.tokenizer.add_tokens(["<cat>"]),
        "scale": scale,
        "attention": lambda model: model.network.set_attn_processor(AttnProcessor()),
    }
    plain, found = fresh().fingerprint(), {}
    for name, change in changes.items():
        model = fresh()
        change(model)
        found[name] = model.fingerprint()
        assert model.fingerprint() == found[name] != plain, name
    assert len(set(found.values())) == len(changes) and fresh().fingerprint() == plain
    model.pipe.enable_freeu(0.9, 0.2, 1.2, 1.4)
    model.pipe.disable_freeu()
    assert model.fingerprint() == found["attention"]
    for name in ("one", "other"):
        fresh().pipe.save_pretrained(tmp_path / name)
    opened = [Backbone.from_pretrained(str(tmp_path / n), device="cpu") for n in ("one", "other")]
    assert opened[0].fingerprint() == opened[1].fingerprint()


def test_a_preview_decodes_in_its_own_precision():
    tiny = Preview(tiny_vae().bfloat16(), "tiny", "1")
    pictures = tiny.decode(noise(0))
    assert pictures.dtype == torch.float32 and pictures.shape == (2, 3, 32, 32)
    assert tiny.describe()["dtype"] == "torch.bfloat16"
