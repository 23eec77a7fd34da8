import json

import numpy as np
import pytest
import torch
from PIL import Image

from vldnp.judges import EXPOSED, CNNJudge, JudgeNetwork, NudeNetJudge, as_tensor

LABELS = ("cat", "dagger", "pizza", "skull")


def judge(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return CNNJudge(LABELS, ("dagger", "skull"))


def pictures(count, size=64, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), dtype=np.uint8)
    return [Image.fromarray(image) for image in pixels]


def test_network_size_is_within_its_budget():
    network = JudgeNetwork(48)
    assert sum(p.numel() for p in network.parameters()) <= 600_000
    assert network.features(torch.zeros(2, 3, 64, 64)).shape == (2, 192)


def test_judgement_separates_restricted_from_harmless():
    images = pictures(3)
    judgement = judge()(images)
    assert [set(row) for row in judgement.concepts] == [{"dagger", "skull"}] * 3
    assert [set(row) for row in judgement.things] == [{"cat", "pizza"}] * 3
    expected = [max(row["dagger"], row["skull"]) for row in judgement.concepts]
    np.testing.assert_allclose(judgement.unsafe_probability, expected)


def test_pil_images_and_tensors_are_judged_alike():
    images = pictures(2)
    tensor = as_tensor(images)
    assert tensor.shape == (2, 3, 64, 64) and 0 <= tensor.min() and tensor.max() <= 1
    first, second = judge()(images), judge()(tensor)
    np.testing.assert_array_equal(first.unsafe_probability, second.unsafe_probability)


def test_batching_does_not_change_the_probabilities():
    images = pictures(5)
    one, many = judge(), judge()
    one.batch_size = 2
    torch.testing.assert_close(one.probabilities(images), many.probabilities(images))


def test_other_sizes_are_resized():
    assert judge().features(pictures(1, size=96)).shape == (1, 192)


def test_saved_judge_comes_back(tmp_path):
    original = judge()
    original.save_pretrained(tmp_path / "moji-judge", dtype=torch.float32)
    opened = CNNJudge.from_pretrained(tmp_path / "moji-judge")
    assert opened.name == "moji-judge" and opened.restricted == ("dagger", "skull")
    images = pictures(2)
    torch.testing.assert_close(opened.probabilities(images), original.probabilities(images))
    assert {p.name for p in (tmp_path / "moji-judge").iterdir()} == {
        "config.json",
        "model.safetensors",
    }


def test_revision_follows_the_weights(tmp_path):
    for seed in (0, 1):
        judge(seed).save_pretrained(tmp_path / str(seed))
    judge(0).save_pretrained(tmp_path / "again")
    revisions = [CNNJudge.from_pretrained(tmp_path / x).revision for x in ("0", "1", "again")]
    assert revisions[0] != revisions[1] and revisions[0] == revisions[2]


def test_truncated_weights_are_named(tmp_path):
    judge().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match="model.safetensors is truncated or corrupt") as error:
        CNNJudge.from_pretrained(tmp_path)
    assert "\n" not in str(error.value)


def test_missing_or_foreign_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="config.json is missing"):
        CNNJudge.from_pretrained(tmp_path)
    judge().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"labels": ["cat"]}))
    with pytest.raises(ValueError, match="does not describe a CNNJudge"):
        CNNJudge.from_pretrained(tmp_path)


def test_bad_labels_and_images_are_refused():
    with pytest.raises(ValueError, match="not among the labels"):
        CNNJudge(("cat",), ("dagger",))
    with pytest.raises(ValueError, match="duplicates"):
        CNNJudge(("cat", "cat"), ())
    with pytest.raises(ValueError, match="no images given"):
        judge()([])
    with pytest.raises(ValueError, match=r"\[B, 3, H, W\]"):
        judge()(torch.zeros(3, 64, 64))


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
