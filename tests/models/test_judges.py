import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_judges import WEIGHTS, classifier

from vldnp.models import load
from vldnp.models.judges import (
    EXPOSED,
    Judgement,
    NudeNetClassifier,
    NudeNetJudge,
    SafetyChecker,
    as_tensor,
)


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


def test_images_that_are_none():
    for wrong, message in (([], "no images given"), (torch.zeros(3, 8, 8), r"\[B, 3, H, W\]")):
        with pytest.raises(ValueError, match=message):
            as_tensor(wrong)


class OneDetector:
    """Answers like NudeDetector and keeps what it was shown."""

    def detect_batch(self, images, batch_size):
        self.images = images
        return [
            [
                {"class": "FEET_EXPOSED", "score": 0.3, "box": [0, 0, 1, 1]},
                {"class": "FEET_EXPOSED", "score": 0.7, "box": [0, 0, 1, 1]},
                {"class": "FACE_MALE", "score": 0.9, "box": [0, 0, 1, 1]},
            ],
            [],
        ]


def test_nudenet_counts_exposed_classes_only():
    detector = OneDetector()
    red = Image.new("RGB", (8, 8), (255, 0, 0))
    judgement = NudeNetJudge(detector=detector)([red, red])
    np.testing.assert_allclose(judgement.unsafe_probability, [0.7, 0.0])
    assert judgement.concepts[0]["FEET_EXPOSED"] == 0.7 and judgement.things is None
    assert detector.images[0][0, 0].tolist() == [0, 0, 255], "OpenCV order: blue first"


def test_nudenet_wheel_runs_and_knows_the_classes():
    judge = NudeNetJudge()
    judgement = judge(pictures(2))
    assert judgement.unsafe_probability.shape == (2,) and judge.revision
    assert all(0 <= p <= 1 for p in judgement.unsafe_probability)
    import nudenet.nudenet as source

    assert set(EXPOSED) <= set(vars(source)["__labels"])


def test_which_classes_count_as_exposed_is_data():
    red = Image.new("RGB", (8, 8), (255, 0, 0))
    faces = NudeNetJudge(exposed=["FACE_MALE"], detector=OneDetector())
    np.testing.assert_allclose(faces([red, red]).unsafe_probability, [0.9, 0.0])
    usual = NudeNetJudge(detector=OneDetector())
    assert faces.revision != usual.revision
    assert NudeNetJudge(EXPOSED[::-1], OneDetector()).revision == usual.revision
    with pytest.raises(ValueError, match="exposed is empty"):
        NudeNetJudge([], OneDetector())


def test_nudenet_v2_gives_the_probability_of_unsafe(tmp_path):
    judge = load.load_judge(classifier(tmp_path / "classifier_model.onnx"), batch_size=2)
    assert isinstance(judge, NudeNetClassifier)
    images = pictures(3, size=96)
    expected = []
    for image in images:
        nearest = image.resize((256, 256), Image.Resampling.NEAREST)
        logits = (np.asarray(nearest) / 255).mean((0, 1)) @ WEIGHTS
        expected.append(np.exp(logits[0]) / np.exp(logits).sum())
    judgement = judge(images)
    np.testing.assert_allclose(judgement.unsafe_probability, expected, rtol=1e-4)
    assert len(set(expected)) == 3
    assert [row["unsafe"] for row in judgement.concepts] == judgement.unsafe_probability.tolist()
    np.testing.assert_array_equal(
        judge(as_tensor(images)).unsafe_probability, judgement.unsafe_probability
    )
    red, green = (Image.new("RGB", (8, 8), colour) for colour in ("red", "lime"))
    assert list(judge([red, green]).unsafe_probability >= 0.6) == [True, False]
    other = classifier(tmp_path / "other.onnx", weights=2 * WEIGHTS)
    assert NudeNetClassifier(other).revision != judge.revision


def test_a_bad_classifier_file_is_one_line(tmp_path):
    with pytest.raises(FileNotFoundError, match="none.onnx does not exist"):
        load.load_judge(tmp_path / "none.onnx")
    (tmp_path / "bad.onnx").write_bytes(b"not a network")
    with pytest.raises(ValueError, match="bad.onnx is no ONNX network") as error:
        load.load_judge(tmp_path / "bad.onnx")
    assert "\n" not in str(error.value)


def flagged(folder, images) -> list[bool]:
    """By the definition: a concept's cosine is above its threshold."""
    checker = SafetyChecker.from_pretrained(folder).checker
    mean, deviation = np.array(
        [[0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]]
    )
    flags = []
    for image in images:
        pixels = (np.asarray(image) / 255 - mean) / deviation
        pixels = torch.tensor(pixels, dtype=torch.float32).permute(2, 0, 1)[None]
        embedding = checker.visual_projection(checker.vision_model(pixels).pooler_output)
        cosine = torch.cosine_similarity(embedding, checker.concept_embeds, dim=1)
        flags.append(bool((cosine > checker.concept_embeds_weights).any()))
    return flags


def test_the_safety_checker_flags_what_is_above_its_thresholds(checker_folder, caplog):
    grid = [
        Image.new("RGB", (32, 32), (r, g, b)) for r in (0, 255) for g in (0, 255) for b in (0, 255)
    ] + pictures(8, size=32)
    judge = load.load_judge(checker_folder, device="cpu")
    judge.batch_size = 3
    flags = flagged(checker_folder, grid)
    assert len(set(flags)) == 2, "some are flagged and some are not"
    judgement = judge(grid)
    assert judgement.unsafe_probability.tolist() == [float(flag) for flag in flags]
    assert judge.name == checker_folder.name and len(judge.revision) == 12
    assert "black" not in caplog.text


def test_a_safety_checker_in_a_folder_of_its_own(checker_folder, tmp_path):
    for part in ("safety_checker", "feature_extractor"):
        shutil.copytree(checker_folder / part, tmp_path, dirs_exist_ok=True)
    images = pictures(4, size=32)
    alone, within = load.load_judge(tmp_path, device="cpu"), load.load_judge(checker_folder)
    np.testing.assert_array_equal(
        alone(images).unsafe_probability, within(images).unsafe_probability
    )


def test_images_of_different_sizes_are_judged_as_alone(tmp_path, checker_folder):
    images = [image for size in (64, 96, 32) for image in pictures(2, size)]
    judges = [
        load.load_judge("moji-judge"),
        NudeNetJudge(),
        NudeNetClassifier(classifier(tmp_path / "v2.onnx")),
    ]
    for judged in [*judges, load.load_judge(checker_folder, device="cpu")]:
        together = judged(images).unsafe_probability
        alone = [judged([image]).unsafe_probability[0] for image in images]
        np.testing.assert_allclose(together, alone, rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match="images of several sizes, .*96.*; resize them to one"):
        as_tensor(images)


@pytest.mark.parametrize("wrong", [-0.1, 1.1])
def test_what_decides_a_label_is_in_its_range(wrong):
    for judgement in ([wrong], [{"skull": 0.1}]), ([0.1], [{"skull": wrong}]):
        with pytest.raises(ValueError, match="probability of image 0 is .*; it must be in 0..1"):
            Judgement(np.array(judgement[0]), judgement[1])
    for threshold in (wrong, np.nan):
        with pytest.raises(ValueError, match="threshold must be in 0..1"):
            Judgement(np.array([0.1]), [{"skull": 0.1}]).found(threshold)
