"""NaN and infinity are found where they come up, named, and recorded nowhere."""

from contextlib import contextmanager

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import ScriptedVLM, sd_pipeline
from tiny_judges import classifier

from moji.judge import CNNJudge
from vldnp._finite import NonFiniteError, is_finite
from vldnp.baselines.methods import SAFREE, SLD
from vldnp.methods import CFG, VLDNP, Static
from vldnp.metrics import intervals
from vldnp.models import load
from vldnp.models.backbone import Backbone
from vldnp.models.clip import CLIPScore
from vldnp.models.judges import Judgement, NudeNetJudge, as_tensor
from vldnp.sampler import denoise, sample
from vldnp.study.grid import Study
from vldnp.study.run import run

PROMPTS, SEEDS = ["a cat", "a dog", "a pizza"], [4, 5, 6]
BAD = [float("nan"), float("inf"), -float("inf")]
BADS = pytest.mark.parametrize("bad", BAD)


@pytest.fixture
def model():
    return Backbone(sd_pipeline())


@contextmanager
def spoiled(module, call, row, bad):
    """In its call of that number (from 0), one element of one row of the module's output is bad."""
    calls = []

    def spoil(module, inputs, output):
        calls.append(output)
        if len(calls) == call + 1:
            output = output[0] if isinstance(output, tuple) else output
            output[(row, *[0] * (output.ndim - 1))] = bad

    hook = module.register_forward_hook(spoil)
    try:
        yield
    finally:
        hook.remove()


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


@pytest.mark.parametrize("omega", [1e30, 1e38])
def test_a_strength_beyond_all_numbers(model, omega):
    assert "image 0 ('a cat', seed 4) and 2 more" in refused(model, Static("knife", omega=omega))


def test_a_guidance_scale_beyond_all_numbers(model):
    assert "and 2 more is NaN or infinite at step" in refused(model, guidance_scale=1e38)


def test_the_stream_ends_before_the_spoiled_step(model):
    seen = []
    with spoiled(model.network, call=2, row=0, bad=np.nan):
        with pytest.raises(NonFiniteError, match=r"'a cat', no seed\) .* step 2"):
            for step in denoise(model, "a cat", generator=torch.Generator(), num_inference_steps=4):
                seen.append(step.index)
    assert seen == [0, 1]


# What measures


@BADS
def test_every_judgement(bad):
    good = {"knife": 0.5}
    for wrong in (
        (np.array([0.1, bad]), [good] * 2, None),
        (np.array([0.1, 0.2]), [good, {"knife": bad}], None),
        (np.array([0.1, 0.2]), [good] * 2, [{"cat": 0.3}, {"cat": bad}]),
    ):
        with pytest.raises(NonFiniteError, match="the judge's probability of image 1 is NaN"):
            Judgement(*wrong)
    assert Judgement(np.array([0.1]), [good]).concepts == [good]


def test_nudenets_detector():
    class Detector:
        def detect_batch(self, images, batch_size):
            return [[{"class": "FEET_EXPOSED", "score": score}] for score in (0.9, np.nan)]

    with pytest.raises(NonFiniteError, match="of image 1 is NaN"):
        NudeNetJudge(detector=Detector())([Image.new("RGB", (32, 32))] * 2)


def test_nudenets_classifier(tmp_path):
    weights = np.full((3, 2), np.nan, dtype=np.float32)
    judge = load.load_judge(classifier(tmp_path / "classifier.onnx", weights))
    with pytest.raises(NonFiniteError, match="the judge's probability of image 0 is NaN"):
        judge([Image.new("RGB", (32, 32))])


def test_the_safety_checker(checker_folder):
    judge = load.load_judge(checker_folder, device="cpu")
    judge.batch_size = 2
    images = [Image.new("RGB", (32, 32))] * 3
    with spoiled(judge.checker.visual_projection, call=1, row=0, bad=np.nan):
        with pytest.raises(NonFiniteError, match="the judge's probability of image 2 is NaN"):
            judge(images)
    assert len(judge(images).concepts) == 3


@BADS
def test_pictures_given_as_numbers(bad):
    pixels = torch.zeros(2, 3, 8, 8)
    pixels[1, 2, 3, 4] = bad
    with pytest.raises(NonFiniteError, match="the picture of image 1 is NaN"):
        as_tensor(pixels)


def test_the_clip_score(clip_folder):
    clip = CLIPScore.from_pretrained(clip_folder)
    images = [Image.new("RGB", (32, 32), color) for color in ("red", "blue")]
    with spoiled(clip.model.visual, call=0, row=1, bad=np.nan):
        with pytest.raises(NonFiniteError, match="the CLIP score of image 1 is NaN"):
            clip(images, ["a cat", "a dog"])
    assert np.isfinite(clip(images, ["a cat", "a dog"])).all()


@BADS
def test_a_rate_of_what_is_no_number(bad):
    with pytest.raises(NonFiniteError, match="the unsafe probability of image 2 is NaN"):
        intervals.asr([0.1, 0.7, bad])


# Nothing is recorded


@pytest.fixture
def study(tmp_path):
    rows = "".join(f"{i},{p},{s}\n" for i, (p, s) in enumerate(zip(PROMPTS, SEEDS, strict=True)))
    (tmp_path / "mine.csv").write_text("prompt_id,prompt,seed\n" + rows)
    return Study("s", [CFG()], [tmp_path / "mine.csv"], num_inference_steps=2, batch_size=2)


def judge():
    return CNNJudge(("cat", "knife"), ("knife",))


def test_a_spoiled_batch_leaves_nothing_and_is_made_again(model, study, tmp_path):
    with spoiled(model.network, call=3, row=0, bad=np.nan):  # in the second batch
        with pytest.raises(NonFiniteError, match=r"\('a pizza', seed 6\) .* at step 1"):
            run(study, model, judge(), root=tmp_path, progress=False)
    assert len(list((tmp_path / "s" / "cells").iterdir())) == 2 * 2
    images = run(study, model, judge(), root=tmp_path, progress=False)
    pictures = [Image.open(tmp_path / "s" / path) for path in images["image"]]
    assert len(pictures) == 3 and all(p.getextrema() != ((0, 0),) * 3 for p in pictures)


def test_a_judge_that_fails_in_a_study_is_named_with_the_image(model, study, tmp_path):
    class NaN:
        name, revision = "nan", "1"

        def __call__(self, images):
            return Judgement(np.array([0.1, np.nan][: len(images)]), [{}] * len(images))

    with pytest.raises(NonFiniteError, match=r"judge's probability of image 1 \('a dog', seed 5\)"):
        run(study, model, NaN(), root=tmp_path, progress=False)
    assert not list((tmp_path / "s").glob("scores/*"))


# Settings


@BADS
def test_settings(bad):
    for name in ("scale", "warmup", "threshold", "momentum_scale", "momentum_beta"):
        with pytest.raises(ValueError, match=f"SLD's {name} must be a finite number from 0"):
            SLD("knife", **{name: bad})
    for name in ("alpha", "upper", "k", "t0"):
        with pytest.raises(ValueError, match=f"SAFREE's {name} must be a finite number, not"):
            SAFREE("knife", **{name: bad})
    with pytest.raises(ValueError, match=r"SAFREE's scales\[1\] must be a finite number"):
        SAFREE("knife", scales=(0.9, bad))


def test_what_is_a_number():
    assert all(map(is_finite, [0, -1.5, np.float32(2), np.int64(3)]))
    assert not any(map(is_finite, [*BAD, np.float32(np.nan), "8", True, None, [1], 1j]))
