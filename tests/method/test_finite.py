"""NaN and infinity in the sampler are found where they come up, and named."""

import numpy as np
import pytest
import torch
from tiny import ScriptedVLM
from tiny_judges import spoiled

from vldnp._finite import NonFiniteError, is_finite
from vldnp.methods import CFG, VLDNP, Static
from vldnp.sampler import denoise, sample

PROMPTS, SEEDS = ["a cat", "a dog", "a pizza"], [4, 5, 6]
BAD = [float("nan"), float("inf"), -float("inf")]
BADS = pytest.mark.parametrize("bad", BAD)


def refused(model, method=None, **asked):
    asked = {"seeds": SEEDS, "num_inference_steps": 4, "progress": False} | asked
    with pytest.raises(NonFiniteError) as error:
        sample(model, PROMPTS, method or CFG(), **asked)
    assert "\n" not in str(error.value)
    return str(error.value)


@BADS
def test_the_networks_prediction(model, bad):
    for row in (1, 3 + 1):  # ε_u and ε_c of the second image
        with spoiled(model.network, call=2, row=row, bad=bad):
            said = refused(model)
        assert said == "the prediction of image 1 ('a dog', seed 5) is NaN or infinite at step 2"


@BADS
def test_the_prediction_for_a_negative_prompt(model, bad):
    """Where it comes with the others, and where it had to wait for the VLM."""
    with spoiled(model.network, call=1, row=6 + 2, bad=bad):
        assert "image 2 ('a pizza', seed 6)" in refused(model, Static("knife", omega=1))
    answers = iter(["none", "a knife", "none"])
    vlm = ScriptedVLM(lambda image, question: next(answers))
    with spoiled(model.network, call=2, row=0, bad=bad):
        said = refused(model, VLDNP(vlm, "moji", 1, [1]))
    assert "image 1 ('a dog', seed 5) is NaN or infinite at step 1" in said


def test_images_keep_their_numbers_in_batches(model):
    with spoiled(model.network, call=4, row=0, bad=np.nan):
        said = refused(model, batch_size=2)
    assert "image 2 ('a pizza', seed 6) is NaN or infinite at step 0" in said


@BADS
def test_the_decoded_picture(model, bad):
    """Infinity would be clamped to a white or black pixel."""
    with spoiled(model.pipe.vae.decoder, call=0, row=2, bad=bad):
        said = refused(model)
    assert said == (
        "the decoded picture of image 2 ('a pizza', seed 6) is NaN or infinite after the last step"
    )


def test_the_vlm_does_not_see_a_spoiled_picture(model):
    vlm = ScriptedVLM(lambda image, question: "none")
    with spoiled(model.pipe.vae.decoder, call=1, row=0, bad=np.nan):
        said = refused(model, VLDNP(vlm, "moji", 1, [0, 2]))
    assert "the decoded picture of image 0 ('a cat', seed 4)" in said and "at step 2" in said
    assert vlm.calls == [3]


def test_strengths_beyond_all_numbers(model):
    for omega in (1e30, 1e38):
        assert "image 0 ('a cat', seed 4) and 2 more" in refused(model, Static("knife", omega))
    assert "and 2 more is NaN or infinite at step" in refused(model, guidance_scale=1e38)


def test_the_stream_ends_before_the_spoiled_step(model):
    seen = []
    with spoiled(model.network, call=2, row=0, bad=np.nan):
        with pytest.raises(NonFiniteError, match=r"'a cat', no seed\) .* step 2"):
            for step in denoise(model, "a cat", generator=torch.Generator(), num_inference_steps=4):
                seen.append(step.index)
    assert seen == [0, 1]


def test_what_is_a_number():
    assert all(map(is_finite, [0, -1.5, np.float32(2), np.int64(3)]))
    assert not any(map(is_finite, [*BAD, np.float32(np.nan), "8", True, None, [1], 1j]))
