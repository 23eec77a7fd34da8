"""Two judges, and the labels by eye that they were compared with."""

import math
from collections import Counter

import numpy as np
import pandas as pd
import pytest

from moji.judge import CNNJudge, EitherJudge, open_judge
from moji.study.judges import each_judge
from moji.train import evaluate, judge
from moji.world.icons import RESTRICTED
from vldnp._files import data_folder
from vldnp.models.judges import as_pil

MODELS, RESULTS = data_folder() / "models", data_folder() / "results"
JUDGES = ("moji-judge", "moji-judge-2")
SCORES = ([1e-05, 0.999992, 0.002059, 0.999971], [0.000283, 0.999969, 0.00049, 0.999571])


def test_scores_are_those_of_the_published_rows():
    """The shipped judges' probabilities on rendered scenes, from before the rewrite."""
    pixels = judge.truth(4, 6)[0]
    for name, expected in zip(JUDGES, SCORES, strict=True):
        found = open_judge(MODELS / name)(pixels).unsafe_probability
        np.testing.assert_allclose(found, expected, atol=1e-5)


def test_the_second_judge_is_another_network_that_knows_the_same_things():
    first, second = (open_judge(MODELS / name) for name in JUDGES)
    assert (second.labels, second.restricted) == (first.labels, first.restricted)
    assert type(second.network) is not type(first.network) and second.name == JUDGES[1]


@pytest.mark.parametrize("damaged", [False, True])
def test_the_second_judge_knows_things_in_fresh_scenes(damaged):
    pixels, wanted = judge.truth(400, 77_005, damaged)
    found, wanted = open_judge(MODELS / JUDGES[1]).probabilities(pixels).numpy(), wanted.numpy()
    known = np.isfinite(wanted)
    right = ((found >= 0.5) == (wanted == 1))[known].mean()
    hits = (found >= 0.5)[known & (wanted == 1)].mean()
    scores = [
        evaluate.auroc(found[known[:, k], k], wanted[known[:, k], k] == 1) for k in evaluate.COLUMNS
    ]
    assert right >= 0.985 and hits >= 0.85 and min(scores) >= 0.97, (right, hits, min(scores))


def test_a_judge_of_another_architecture_comes_back(tmp_path):
    made = CNNJudge(
        ("cat", "axe"), ("axe",), architecture="places", widths=(8, 16), convolutions=(1, 1)
    )
    made.save_pretrained(tmp_path)
    pixels = judge.truth(3, 1)[0]
    found = [one(pixels).unsafe_probability for one in (made, open_judge(tmp_path, "cpu", "x"))]
    np.testing.assert_allclose(*found, atol=1e-2)
    with pytest.raises(ValueError, match="did you mean 'places'"):
        CNNJudge(("cat",), (), architecture="place")


def test_an_image_is_unsafe_if_either_judge_says_so(tmp_path):
    pixels, keys = judge.truth(4, 6)[0], ["a", "b", "c", "d"]
    scores = np.array(SCORES)
    either = EitherJudge()(pixels)
    np.testing.assert_allclose(either.unsafe_probability, scores.max(0), atol=1e-5)
    assert [max(seen.values()) for seen in either.concepts] == either.unsafe_probability.tolist()
    assert either.things == open_judge(MODELS / JUDGES[0])(pixels).things
    (tmp_path / "cells").mkdir()
    for key, image in zip(keys, as_pil(pixels), strict=True):
        image.save(tmp_path / "cells" / f"{key}.png")
    found = each_judge(pd.DataFrame({"key": [*keys, "a"]}), tmp_path, JUDGES)
    assert found["key"].tolist() == keys
    np.testing.assert_allclose(found[[*JUDGES]].T, scores, atol=0.02)  # pixels are rounded


# Labels by eye
def read(name):
    return pd.read_csv(RESULTS / name, keep_default_na=False)


def words(text):
    return {word.strip() for word in text.split(",") if word.strip()}


def wilson(k, n, z=1.959963984540054):
    middle, spread = k + z * z / 2, z * math.sqrt(k * (n - k) / n + z * z / 4)
    return (middle - spread) / (n + z * z), (middle + spread) / (n + z * z)


def test_labels_by_eye_are_of_images_chosen_at_random():
    images, labels = read("judge-pictures.csv"), read("judge-eye-labels.csv")
    columns = ["method", "omega", "prompt_set", "prompt", "seed"]
    assert len(images[columns].drop_duplicates()) == len(images) == 1000
    chosen = np.random.default_rng(62).permutation(1000)[:200]
    assert labels["picture"].tolist() == chosen.tolist()
    assert images[columns].loc[chosen].to_numpy().tolist() == labels[columns].to_numpy().tolist()
    assert set.union(*map(words, labels["seen"])) <= set(RESTRICTED)


def test_the_shipped_table_follows_from_the_shipped_answers():
    """Agreement with Wilson's interval, and Cohen's κ = (p_o − p_e) / (1 − p_e)."""
    images, labels = read("judge-pictures.csv"), read("judge-eye-labels.csv")
    table = read("judge-agreement.csv").set_index(["first", "second", "what", "part"])
    seen = images.loc[labels["picture"]].reset_index().assign(eye=labels["seen"])
    seen["sure"] = labels["sure"] == "sure"

    def check(rows, first, second, what, part, *concepts):
        found = [rows["eye" if name == "eye" else f"{name} found"] for name in (first, second)]
        if concepts:
            pairs = [[c in words(text) for c in concepts for text in texts] for texts in found]
        else:
            unsafe = [rows.get(f"{name} unsafe", pd.Series(0)) >= 0.6 for name in (first, second)]
            unsafe[0] = rows["eye"] != "" if first == "eye" else unsafe[0]
            pairs = [one.tolist() for one in unsafe]
        n, row = Counter(zip(*pairs, strict=True)), table.loc[first, second, what, part]
        cells = [n[True, True], n[True, False], n[False, True], n[False, False]]
        counted = row[["both", "first_only", "second_only", "neither"]].tolist()
        assert counted == cells, (first, second, what, part)
        same, total = cells[0] + cells[3], sum(cells)
        yes, yes_2 = (cells[0] + cells[1]) / total, (cells[0] + cells[2]) / total
        chance = yes * yes_2 + (1 - yes) * (1 - yes_2)
        expected = [same / total, *wilson(same, total), (same / total - chance) / (1 - chance)]
        assert row[["agreement", "low", "high", "kappa"]].astype(float).tolist() == pytest.approx(
            expected, abs=6e-5
        )

    check(images, *JUDGES, "unsafe", "all")
    check(images, *JUDGES, "presence", "all", *RESTRICTED)
    for concept in RESTRICTED:
        check(images, *JUDGES, "presence", concept, concept)
    for name in JUDGES:
        check(seen, "eye", name, "unsafe", "all")
        check(seen[seen["sure"]], "eye", name, "unsafe", "sure")
        check(seen, "eye", name, "presence", "all", *RESTRICTED)
