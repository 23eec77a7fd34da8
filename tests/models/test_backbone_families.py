"""Every model family against its stock pipeline, opened from a folder like a real model."""

import json
from functools import cache

import pytest
import torch
from diffusers import FluxPipeline, StableDiffusionImg2ImgPipeline
from httpx2 import ConnectError, Request, Response
from huggingface_hub import errors
from tiny import counted_rows, generators, sd_pipeline
from tiny_models import PIPELINES, flux_pipeline, sd3_pipeline, sdxl_pipeline

from vldnp import CFG, Method, Static, load, sample
from vldnp.models.backbone import Backbone
from vldnp.models.conditioning import AuxiliaryRows, Conditioning
from vldnp.models.run import Run
from vldnp.negatives import Negative, Policy

PROMPTS = ["a cat at the pirate cove", "a dog"]
ASKED = {"num_inference_steps": 4, "guidance_scale": 5.0}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A folder for each family, written when it is first asked for."""

    @cache
    def folder(name):
        PIPELINES[name]().save_pretrained(made := tmp_path_factory.mktemp(name))
        return made

    return folder


@pytest.fixture(scope="module", params=PIPELINES)
def model(request, folders):
    model = load(folders(request.param), device="cpu")
    if request.param == "flux":  # no file says how large its pictures are
        model.pipe.default_sample_size = 8
        model.size = model.picture_size(None, None)
    return model


def stock(pipe, prompts=PROMPTS, seeds=(3, 4), output_type="pt", **asked):
    asked = {**ASKED, **asked}
    if isinstance(pipe, FluxPipeline):  # its guidance_scale is what the network is told
        asked["true_cfg_scale"] = asked.pop("guidance_scale")
        asked.setdefault("negative_prompt", [""] * len(prompts))
    return pipe(prompts, generator=generators(*seeds), output_type=output_type, **asked).images


def ours(model, prompts=PROMPTS, method=None, seeds=(3, 4), **asked):
    asked = {"output_type": "pt", "progress": False, **ASKED, **asked}
    return sample(model, prompts, method or CFG(), seeds=list(seeds), **asked)


class Script(Policy):
    """Negative prompts that depend on the image's seed and on the step, not on pictures."""

    def query_steps_of(self, num_inference_steps):
        return (0, 2)

    def look(self, view, before):
        prompts = (None, "knife", "skull, dagger", None)
        seeds = view.guider.batch.seeds
        return [Negative(prompts[(seeds[row] + view.index) % 4]) for row in view.rows]


@pytest.mark.parametrize("size", [{}, {"height": 48, "width": 32}])
def test_plain_cfg_is_the_stock_pipeline(model, size):
    assert torch.allclose(ours(model, **size).images, stock(model.pipe, **size), atol=1e-4)


def test_replaced_is_the_stock_negative_prompt(model):
    expected = stock(model.pipe, negative_prompt=["a knife"] * 2)
    method = Static("a knife", rule="replaced")
    assert torch.allclose(ours(model, method=method).images, expected, atol=1e-4)
    assert not torch.allclose(ours(model).images, expected, atol=1e-3)


def test_the_conditioning_of_sdxl():
    run = Run(Backbone(sdxl_pipeline()), 1, height=48, width=32)
    null, empty = run.null_conditioning(2).embeds, run.encode(["", ""]).embeds
    assert null.abs().max() == 0 < empty.abs().max()
    a, b = run.encode(["a cat", "a dog"]), run.encode(["a pizza"])
    chosen = (a + b)[[2, 0]]
    assert torch.equal(chosen.embeds, torch.cat([b.embeds, a.embeds[:1]]))
    assert chosen.added["time_ids"].tolist() == [[48, 32, 0, 0, 48, 32]] * 2
    pooled = torch.cat([b.added["text_embeds"], a.added["text_embeds"][:1]])
    assert torch.equal(chosen.added["text_embeds"], pooled)


def test_cfg_besides_distilled_guidance_is_said(recwarn):
    quick = {"num_inference_steps": 1, "progress": False}
    sample(flux_pipeline(), "a cat", guidance_scale=1, **quick)
    sample(flux_pipeline(guidance_embeds=False), "a cat", guidance_scale=3.5, **quick)
    assert not [w for w in recwarn if "distilled" in str(w.message)]
    with pytest.warns(UserWarning, match="distilled in, 3.5; guidance_scale 3.5 adds CFG, 1"):
        sample(flux_pipeline(), "a cat", guidance_scale=3.5, **quick)


@pytest.mark.parametrize("made", [sd3_pipeline, flux_pipeline])
@pytest.mark.parametrize("name", ["dpm++", "euler"])
def test_schedulers_of_flow_matching(made, name):
    model, pipe = Backbone(made()), made()
    pipe.scheduler = Run(model, 1, name).scheduler
    assert torch.allclose(ours(model, scheduler=name).images, stock(pipe), atol=1e-4)
    assert pipe.scheduler.sigmas[0] == pytest.approx(1.0, abs=1e-3)  # starts at pure noise


def test_timesteps_that_depend_on_the_size_and_flux_without_a_distilled_guidance_scale():
    shifting = {"use_dynamic_shifting": True, "base_image_seq_len": 4, "max_image_seq_len": 64}
    size = {"height": 48, "width": 32}
    for pipe in (sd3_pipeline(**shifting), flux_pipeline(guidance_embeds=False)):
        assert torch.allclose(ours(Backbone(pipe), **size).images, stock(pipe, **size), atol=1e-4)


def test_stable_diffusion_3_without_t5(folders):
    without = {"text_encoder_3": None, "tokenizer_3": None}
    model = load(folders("sd-3"), device="cpu", **without)
    assert torch.allclose(ours(model).images, stock(model.pipe), atol=1e-4)
    assert model.revision.endswith(" with text_encoder_3=None, tokenizer_3=None")
    with pytest.warns(UserWarning, match="16 tokens; truncated text: 'a cat a cat'"):
        model.encode([" ".join(["a cat"] * 9)])


def test_what_t5_reads_is_not_lost(recwarn):
    sd3 = Backbone(sd3_pipeline())
    sd3.encode([" ".join(["a cat"] * 9)])
    assert not [w for w in recwarn if w.category is UserWarning]
    with pytest.warns(UserWarning, match="256 tokens; truncated text: 'cat a cat'"):
        sd3.encode([" ".join(["a cat"] * 129)])


def test_vldnp_in_a_batch_is_vldnp_alone(model):
    """Some images have a negative prompt and some have none; each comes out as on its own."""
    seeds = [0, 1, 2, 3]
    method = Method("script", Script(), omega=4.0)
    batch = ours(model, ["a cat"] * 4, method, seeds)
    for step in batch.trace.steps:
        assert 0 < sum(prompt is None for prompt in step.negative_prompts) < 4
    assert {p for s in batch.trace.steps for p in s.negative_prompts} >= {None, "knife"}
    for k, seed in enumerate(seeds):
        alone = ours(model, ["a cat"], method, [seed])
        assert torch.allclose(batch.images[k], alone.images[0], atol=1e-4)
        for together, single in zip(batch.trace.steps, alone.trace.steps, strict=True):
            assert together.negative_prompts[k] == single.negative_prompts[0]
    assert not torch.allclose(batch.images, ours(model, ["a cat"] * 4, None, seeds).images)


def test_one_call_of_the_network_a_step(model):
    with counted_rows(model.network) as rows:
        ours(model, method=Static("a knife"))
    assert rows == [2 * 3] * 4


def test_auxiliary_rows_are_what_they_should_be():
    added = {"pooled": torch.arange(3.0)[:, None]}
    own = Conditioning(-torch.ones(2, 1, 1), added={"pooled": -added["pooled"][1:]})
    beside = AuxiliaryRows((1, 2), own, attending=None)
    cond = Conditioning(torch.arange(3.0).view(3, 1, 1), beside, added)
    assert cond.with_auxiliary().embeds.flatten().tolist() == [0, 1, 2, -1, -1]
    assert cond.with_auxiliary().added["pooled"].flatten().tolist() == [0, 1, 2, -1, -2]
    assert (cond[[0]] + cond).has_auxiliary == (2, 3)
    with pytest.raises(ValueError, match="only one of several"):
        cond + cond


def test_slicing_changes_no_picture(folders):
    slices = {"attention_slicing": True, "vae_slicing": True}
    model, plain = (load(folders("sdxl"), device="cpu", **s) for s in (slices, {}))
    assert model.pipe.vae.use_slicing and not plain.pipe.vae.use_slicing
    assert model.revision == plain.revision
    assert torch.allclose(ours(model).images, ours(plain).images, atol=1e-4)
    assert load(folders("sdxl"), device="cpu", vae_tiling=True).pipe.vae.use_tiling


@pytest.mark.parametrize("name", ["trust_remote_code", "custom_pipeline", "quantization_config"])
def test_settings_that_are_refused(folders, name):
    with pytest.raises(ValueError, match=f"^{name} cannot be set; open the pipe.* yourself$"):
        load(folders("sd-1"), **{name: True})


def test_offloading_is_asked_of_the_pipeline(folders, monkeypatch):
    asked = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    offload = "enable_model_cpu_offload"
    monkeypatch.setattr(type(sd_pipeline()), offload, lambda self, device: asked.append(device))
    load(folders("sd-1"), device="cuda:1", model_cpu_offload=True)
    assert asked == [torch.device("cuda:1")]
    with pytest.raises(TypeError, match="vae_slicing"):  # a pipeline's settings are its owner's
        load(sd_pipeline(), vae_slicing=True)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_offloading_on_a_gpu_changes_no_picture(folders):
    for name in PIPELINES:
        asked = {"method": Method("script", Script(), omega=4.0)}
        here, offloaded = (
            ours(load(folders(name), device="cuda", model_cpu_offload=offload), **asked).images
            for offload in (False, True)
        )
        assert torch.allclose(offloaded, here, atol=1e-3)


def test_the_vae_of_sdxl_decodes_in_float32():
    latents = torch.randn(1, 4, 8, 8, generator=generators(0)[0])
    pipe = sdxl_pipeline()
    pipe.vae.to(torch.float16)
    half = Backbone(pipe).decode(latents)
    assert pipe.vae.dtype == torch.float16  # as it was
    pipe.vae.to(torch.float32)
    assert torch.allclose(half, Backbone(pipe).decode(latents), atol=1e-3)


def test_other_kinds_are_refused(tmp_path):
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "SanaPipeline"}))
    with pytest.raises(ValueError, match="^SanaPipeline is not a .*StableDiffusion3Pipeline"):
        load(tmp_path)
    parts = {**sd_pipeline().components, "requires_safety_checker": False}
    with pytest.raises(ValueError, match="StableDiffusionImg2ImgPipeline is not a pipeline"):
        load(StableDiffusionImg2ImgPipeline(**parts))
    for config, message in (
        ({"in_channels": 9}, "takes 9 channels and the VAE has 4, as for inpainting"),
        ({"time_cond_proj_dim": 8}, "guidance scale distilled"),
    ):
        pipe = sd_pipeline()
        pipe.unet.register_to_config(**config)
        with pytest.raises(ValueError, match=message):
            Backbone(pipe)


def refused(kind, status):
    url = "https://huggingface.co/api/models/x"
    return kind("many\nlines", response=Response(status, request=Request("GET", url)))


TROUBLES = [refused(errors.GatedRepoError, 401), refused(errors.RevisionNotFoundError, 404)]
TROUBLES += [errors.LocalEntryNotFoundError("one line"), ConnectError("many\nlines")]
TROUBLES += [kind("a\nb") for kind in (errors.OfflineModeIsEnabled, errors.RevisionResolutionError)]


@pytest.mark.parametrize("trouble", TROUBLES)
def test_what_the_hub_says_is_one_line_with_what_helps(monkeypatch, trouble):
    def download(*args, **options):
        raise trouble

    monkeypatch.setattr("diffusers.configuration_utils.hf_hub_download", download)
    message = "'sd-3.5-medium' cannot be opened from stab.* at rev.*: .*; fetch it once .HF_HUB_OFF"
    message += ".*https://huggingface.co/stabilityai/stable-diffusion-3.5-medium; .*hf auth login`"
    with pytest.raises(ValueError, match=message) as error:
        load("sd-3.5-medium")
    assert "\n" not in str(error.value)


def out_of_memory(*args, **options):
    raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2.00 GiB.")


def test_too_little_memory_is_one_line(folders, monkeypatch):
    monkeypatch.setattr(type(sd_pipeline()), "to", out_of_memory)
    message = "'sd-1.*' cannot be opened .*: CUDA out of memory; .*dtype='float16'.*cpu_offload"
    with pytest.raises(ValueError, match=message) as error:
        load(folders("sd-1"), device="cpu")
    assert "\n" not in str(error.value)
    for part, forward in (("unet", "forward"), ("vae", "decode")):
        model = Backbone(sdxl_pipeline(), "tiny")
        monkeypatch.setattr(getattr(model.pipe, part), forward, out_of_memory)
        message = "'tiny': CUDA out of memory; lower batch_size, or load .*model_cpu_offload=True"
        with pytest.raises(torch.OutOfMemoryError, match=message) as error:
            ours(model)
        assert "\n" not in str(error.value)
