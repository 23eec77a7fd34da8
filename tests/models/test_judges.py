import nudenet.nudenet
import numpy as np
import pytest
import torch
from PIL import Image
from tiny_judges import WEIGHTS, classifier

from vldnp.models import load
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
        with pytest.raises(ValueError, match="threshold must be in 0..1"):
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
    judge = load.load_judge(classifier(tmp_path / "classifier_model.onnx"))
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
        load.load_judge(tmp_path / "none.onnx")


def flagged(checker, images) -> list[bool]:
    """By the definition: a concept's cosine is above its threshold."""
    mean = np.array([0.48145466, 0.4578275, 0.40821073])
    deviation, flags = np.array([0.26862954, 0.26130258, 0.27577711]), []
    for image in images:
        pixels = (np.asarray(image) / 255 - mean) / deviation
        pixels = torch.tensor(pixels, dtype=torch.float32).permute(2, 0, 1)[None]
        embedding = checker.visual_projection(checker.vision_model(pixels).pooler_output)
        cosine = torch.cosine_similarity(embedding, checker.concept_embeds, dim=1)
        flags.append(bool((cosine > checker.concept_embeds_weights).any()))
    return flags


def test_the_safety_checker_flags_what_is_above_its_thresholds(checker_folder, caplog):
    corners = [(r, g, b) for r in (0, 255) for g in (0, 255) for b in (0, 255)]
    grid = [Image.new("RGB", (32, 32), corner) for corner in corners] + pictures(8, size=32)
    judge = load.load_judge(checker_folder, device="cpu")
    judge.batch_size = 3
    flags = flagged(judge.checker, grid)
    assert len(set(flags)) == 2, "some are flagged and some are not"
    assert judge(grid).unsafe_probability.tolist() == [float(flag) for flag in flags]
    assert judge.name == checker_folder.name and len(judge.revision) == 12
    assert "black" not in caplog.text


def test_images_of_different_sizes_are_judged_as_alone(tmp_path, checker_folder):
    images = [image for size in (64, 96, 32) for image in pictures(2, size)]
    v2 = NudeNetClassifier(classifier(tmp_path / "v2.onnx"))
    judges = [load.load_judge("moji-judge"), load.load_judge("nudenet"), v2]
    for judged in [*judges, load.load_judge(checker_folder, device="cpu")]:
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
