"""The tiny VAE whose images the VLM is shown; `levers.preview` is tested with the levers."""

import pytest
import torch
from diffusers import AutoencoderTiny
from tiny import sd_pipeline
from tiny_models import sd3_pipeline, tiny_vae

from vldnp.models import load
from vldnp.models.backbone import Backbone, Preview


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "tiny-vae"
    tiny_vae().save_pretrained(path)
    return path


def test_a_folder_is_decoded_with_and_says_what_it_is(folder):
    preview, latents = load.load_preview(folder, device="cpu"), torch.randn(2, 4, 8, 8)
    with torch.no_grad():
        shown = (tiny_vae().decode(latents).sample / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(preview.decode(latents), shown)
    said = {"name": "tiny-vae", "revision": preview.revision, "dtype": "torch.float32"}
    assert preview.describe() == said and len(preview.revision) == 12
    name, source, args, options = preview.opened_as  # by which another process opens it too
    again = getattr(load, name)(source, *args, **options)
    assert torch.equal(again.decode(latents), preview.decode(latents))


def test_a_vae_itself_is_identified_by_its_weights(folder):
    one, same, other = (load.load_preview(tiny_vae(seed=seed)) for seed in (0, 0, 1))
    assert one.describe() == same.describe() != other.describe()
    assert load.load_preview(one) is one


def test_latents_in_other_precision():
    tiny = Preview(tiny_vae().bfloat16(), "tiny", "1")
    pictures = tiny.decode(torch.randn(2, 4, 8, 8))
    assert pictures.dtype == torch.float32 and pictures.shape == (2, 3, 32, 32)
    assert tiny.describe()["dtype"] == "torch.bfloat16"


def test_previews_that_do_not_do(tmp_path):
    sd3, sd = Backbone(sd3_pipeline(), "tiny-3"), Backbone(sd_pipeline(), "tiny-1")
    small = Preview(tiny_vae(), "tiny", "1")
    with pytest.raises(ValueError, match="'tiny' is for latents of 4 channels.*'tiny-3' has 16"):
        small.check(sd3)
    eighths = Preview(AutoencoderTiny(num_encoder_blocks=(1,) * 4), "taesd", "1")
    with pytest.raises(ValueError, match="a 8th of the image's size.*a 4th; use the tiny VAE"):
        eighths.check(sd)
    with pytest.raises(TypeError, match="preview is a name such as 'taesd'.*not 0.5"):
        load.load_preview(0.5)
    with pytest.raises(ValueError, match="unknown preview 'taes': did you mean 'taesd'"):
        load.load_preview("taes")
    with pytest.raises(ValueError, match="preview 'someone/some-vae' .* needs a commit"):
        load.load_preview("someone/some-vae")
    with pytest.raises(FileNotFoundError, match="config.json is missing"):
        load.load_preview(tmp_path)
