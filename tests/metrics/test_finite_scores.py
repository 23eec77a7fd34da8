"""NaN and infinity are found by what measures, and named."""

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_judges import classifier, spoiled

from vldnp._finite import NonFiniteError
from vldnp.models import load
from vldnp.models.clip import CLIPScore
from vldnp.models.judges import Judgement, NudeNetJudge, as_tensor

BADS = pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])


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
