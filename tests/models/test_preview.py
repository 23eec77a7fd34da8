"""The tiny VAE whose pictures the VLM is shown."""

import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny
from tiny import ScriptedVLM, sd_pipeline
from tiny_models import sd3_pipeline, tiny_vae

from vldnp.methods import CFG, VLDNP
from vldnp.models import load
from vldnp.models.backbone import Backbone, Preview
from vldnp.sampler import denoise, sample
from vldnp.study.grid import Study, cells
from vldnp.study.workers import packed, unpacked

SETTINGS = {"num_inference_steps": 3, "progress": False}


def looking(**levers):
    return VLDNP(ScriptedVLM(lambda image, question: "none"), "moji", 8, (1,), **levers)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "tiny-vae"
    tiny_vae().save_pretrained(path)
    return path


def test_the_vlm_sees_previews_and_the_final_picture_is_none(folder):
    model, tiny = Backbone(sd_pipeline()), tiny_vae()
    method = looking(preview=load.load_preview(folder, device="cpu"))
    ours, plain = (sample(model, "a cat", m, output_type="pt", **SETTINGS) for m in (method, CFG()))
    assert torch.equal(ours.images, plain.images)  # the VLM found nothing
    (_, step, _) = denoise(model, "a cat", method, num_inference_steps=3)
    with torch.no_grad():
        shown = (tiny.decode(step.x0).sample / 2 + 0.5).clamp(0, 1)[0].permute(1, 2, 0)
    assert np.abs(np.asarray(step.x0_images[0]) - shown.numpy() * 255).max() <= 0.51
    by_vae = model.decode(step.x0)[0].permute(1, 2, 0)
    assert (by_vae - shown).abs().max() > 0.1


def test_records_name_it_only_where_it_is_used(folder):
    preview = load.load_preview(folder, device="cpu")
    on, off = looking(preview=preview), looking()
    assert on.levers() == {"preview": preview.describe()} and "preview" not in off.describe()
    assert preview.describe() == {
        "name": "tiny-vae",
        "revision": preview.revision,
        "dtype": "torch.float32",
    }
    model = Backbone(sd_pipeline(), "tiny", "1")
    keys = {
        cell.key
        for method in (off, on, looking(preview=load.load_preview(tiny_vae(seed=1))))
        for cell in cells(Study("s", (method,), ("tuning-benign",), max_prompts=1), model)
    }
    assert len(keys) == 3


def test_a_vae_itself_is_identified_by_its_weights(folder):
    one, same, other = (load.load_preview(tiny_vae(seed=seed)) for seed in (0, 0, 1))
    assert one.describe() == same.describe() != other.describe()
    assert load.load_preview(one) is one


def test_workers_open_it_again(folder):
    preview = load.load_preview(folder, device="cpu")
    (method,) = unpacked(packed((CFG(preview=preview),)))
    latents = torch.randn(1, 4, 8, 8)
    assert method.preview is not preview
    assert torch.equal(method.preview.decode(latents), preview.decode(latents))


def test_latents_in_other_precision():
    tiny = Preview(tiny_vae().bfloat16(), "tiny", "1")
    pictures = tiny.decode(torch.randn(2, 4, 8, 8))
    assert pictures.dtype == torch.float32 and pictures.shape == (2, 3, 32, 32)
    assert tiny.describe()["dtype"] == "torch.bfloat16"


def test_previews_that_do_not_do(tmp_path):
    sd3, sd = Backbone(sd3_pipeline(), "tiny-3"), Backbone(sd_pipeline(), "tiny-1")
    small = Preview(tiny_vae(), "tiny", "1")
    with pytest.raises(ValueError, match="'tiny' is for latents of 4 channels.*'tiny-3' has 16"):
        sample(sd3, "a cat", CFG(preview=small))
    eighths = Preview(AutoencoderTiny(num_encoder_blocks=(1,) * 4), "taesd", "1")
    with pytest.raises(ValueError, match="a 8th of the image's size.*a 4th; use the tiny VAE"):
        denoise(sd, "a cat", CFG(preview=eighths))
    with pytest.raises(TypeError, match="preview is a name such as 'taesd'.*not 0.5"):
        load.load_preview(0.5)
    with pytest.raises(ValueError, match="unknown preview 'taes': did you mean 'taesd'"):
        load.load_preview("taes")
    with pytest.raises(ValueError, match="preview 'someone/some-vae' .* needs a commit"):
        load.load_preview("someone/some-vae")
    with pytest.raises(FileNotFoundError, match="config.json is missing"):
        load.load_preview(tmp_path)
    with pytest.raises(TypeError, match="opened by vldnp.load_preview, not 'moji-taesd'"):
        CFG(preview="moji-taesd")
