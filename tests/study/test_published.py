import hashlib
import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from tiny import sd_pipeline
from tiny_published import PROMPTS, WordLengthCLIP

import vldnp.study.run
from moji.judge import CNNJudge
from vldnp.methods import Static
from vldnp.models import load
from vldnp.sampler import sample
from vldnp.study import claims, published, publishing
from vldnp.study.grid import cells, plan_batches
from vldnp.study.run import drawing, run


def counting(monkeypatch):
    """How many images are made from here on."""
    made = []

    def counted(tiny_model, prompts, *args, **kwargs):
        made.extend(prompts)
        return sample(tiny_model, prompts, *args, **kwargs)

    monkeypatch.setattr(vldnp.study.run, "sample", counted)
    return made


class Deaf:
    """A judge or CLIP model that must not be asked."""

    def __init__(self, like):
        self.name, self.revision = like.name, like.revision

    def __call__(self, *args):
        raise AssertionError("nothing is measured")

    chance = features = __call__


def test_a_published_study_is_taken_over_as_if_computed(
    computed, world, tiny_model, tiny_judge, monkeypatch, capfd
):
    study, images = computed
    made = counting(monkeypatch)
    again = run(study, tiny_model, Deaf(tiny_judge), Deaf(WordLengthCLIP()), world / "ours")
    assert not made and "%|" not in capfd.readouterr().err, "the bars are silent"
    pd.testing.assert_frame_equal(again, images)
    ours, theirs = world / "ours" / "tiny", world / "theirs" / "tiny"
    assert (ours / "table.csv").read_bytes() == (theirs / "table.csv").read_bytes()
    assert pd.read_csv(ours / "table.csv")["fid"].notna().any()
    stored = [pd.read_parquet(folder / "images.parquet") for folder in (ours, theirs)]
    pd.testing.assert_frame_equal(*stored)
    configs = [json.loads((folder / "config.json").read_text()) for folder in (ours, theirs)]
    assert configs[0].pop("published") == "tiny"
    assert configs[0] == configs[1]
    assert not (ours / "cells").exists() and not list(ours.rglob(".*"))


def test_pictures_are_made_on_demand_in_their_batch(
    computed, world, tiny_model, tiny_judge, monkeypatch
):
    study, images = computed
    run(study, tiny_model, tiny_judge, WordLengthCLIP(), world / "ours", progress=False)
    made = counting(monkeypatch)
    rows = images[images["method"] == "vl-dnp"].iloc[[2, 0]]
    pictures = drawing(study, tiny_model, world / "ours", progress=False)(rows)
    assert len(made) == 3, "two batches: one of two images, one of one"
    for row, picture in zip(rows.itertuples(), pictures, strict=True):
        theirs = Image.open(world / "theirs" / "tiny" / row.image)
        assert np.array_equal(np.asarray(picture), np.asarray(theirs))
    drawing(study, tiny_model, world / "ours", progress=False)(rows)
    assert len(made) == 3, "they are kept"


def test_a_smaller_study_and_a_larger_one(computed, world, tiny_model, tiny_judge, monkeypatch):
    study, images = computed
    made = counting(monkeypatch)
    few = replace(study, max_prompts=2, reference=None)
    found = run(few, tiny_model, tiny_judge, WordLengthCLIP(), world / "ours", progress=False)
    assert not made and len(found) == 3 * 2 * 2
    both = found.merge(images, on=["setting", "prompt_set", "prompt_id"], suffixes=("", "_all"))
    assert (both["unsafe_probability"] == both["unsafe_probability_all"]).all()
    assert (both["clip_chance"] == both["clip_chance_all"]).all()

    more = replace(study, methods=(*study.methods, Static("skull", 4)), reference=None)
    found = run(more, tiny_model, tiny_judge, WordLengthCLIP(), world / "ours", progress=False)
    assert len(made) == 3 and len(found) == 4 * 6
    alone = run(
        more,
        tiny_model,
        tiny_judge,
        WordLengthCLIP(),
        world / "own",
        progress=False,
        recompute=True,
    )
    timeless = [rows.drop(columns="seconds") for rows in (found, alone)]
    pd.testing.assert_frame_equal(*timeless)


def test_recomputing(computed, world, tiny_model, tiny_judge, monkeypatch):
    study, _ = computed
    made = counting(monkeypatch)
    monkeypatch.setenv("RECOMPUTE", "all")
    first = run(study, tiny_model, tiny_judge, WordLengthCLIP(), world / "ours", progress=False)
    assert len(made) == 9
    monkeypatch.delenv("RECOMPUTE")
    again = run(study, tiny_model, tiny_judge, WordLengthCLIP(), world / "ours", progress=False)
    assert len(made) == 9 and (again["seconds"] == first["seconds"]).all(), "what is here counts"
    monkeypatch.setenv("RECOMPUTE", "yes")
    with pytest.raises(ValueError, match="RECOMPUTE must be 'all' or empty, not 'yes'"):
        run(study, tiny_model, tiny_judge, WordLengthCLIP(), world / "ours", progress=False)


@pytest.mark.parametrize("change", ["judge", "clip", "model", "things", "threshold", "quick"])
def test_other_measurements_are_not_taken_over(
    computed, world, tiny_model, tiny_judge, monkeypatch, change
):
    study, images = computed
    study, clip = replace(study, reference=None), WordLengthCLIP()
    made = counting(monkeypatch)
    if change == "judge":
        tiny_judge = CNNJudge(tiny_judge.labels, tiny_judge.restricted, name="other")
    elif change == "clip":
        clip.revision = "2"
    elif change == "model":
        tiny_model = load.load(sd_pipeline(seed=1))
    elif change == "things":
        named = PROMPTS.replace("0,cat", "0,dog")
        (world / "data" / "prompts" / "benign.csv").write_text(named)
    elif change == "threshold":
        study = replace(study, unsafe_threshold=0.0)
    else:
        study = replace(study, name="tiny-quick")
    found = run(study, tiny_model, tiny_judge, clip, world / "ours", progress=False)
    if change == "threshold":
        assert not made and found["unsafe"].all(), "labels follow from the probabilities"
    elif change == "things":
        assert len(made) == 3 * 2, "with the batches of the images whose things are others"
    else:
        assert len(made) == 9


def test_what_is_published(computed, world, tiny_judge):
    study, images = computed
    folder = world / "data" / "results" / "tiny"
    rows = pd.read_parquet(folder / "images.parquet")
    picture = Image.open(world / "theirs" / "tiny" / images["image"][0])
    pixels = np.asarray(picture.convert("RGB"))
    expected = hashlib.sha256(b"32x32:" + pixels.tobytes()).hexdigest()[:32]
    assert rows["pixels"][0] == expected
    assert not list(folder.rglob("*.png"))
    planned = {
        batch.key: batch for batch in plan_batches(cells(study, load.load(sd_pipeline())), study)
    }
    for row in rows.itertuples():
        assert planned[row.batch].cells[row.place].key == row.key
    meta = json.loads((folder / "meta.json").read_text())
    assert meta["models"][tiny_judge.name] == tiny_judge.revision and meta["protocol"] is None
    methods = json.loads((folder / "methods.json").read_text())
    assert set(rows["setting"]) < set(methods)
    assert methods[rows["setting"].iloc[-1]] == json.loads(json.dumps(study.methods[-1].describe()))
    assert (folder / "images-beside.parquet").is_file()


def test_what_cannot_be_published(computed, world, tiny_model, tiny_judge):
    study, images = computed
    target = world / "data" / "results" / "tiny"
    run(study, tiny_model, tiny_judge, WordLengthCLIP(), world / "ours", progress=False)
    before = {path: path.read_bytes() for path in target.iterdir()}
    with pytest.raises(ValueError, match="config.json was taken from the published run 'tiny'"):
        publishing.write(world / "ours" / "tiny", target)
    (world / "theirs" / "tiny" / images["image"][0]).unlink()
    with pytest.raises(FileNotFoundError, match=images["key"][0]):
        publishing.write(world / "theirs" / "tiny", target)
    with pytest.raises(FileNotFoundError, match="holds no study"):
        publishing.write(world / "nowhere", target)
    assert before == {path: path.read_bytes() for path in target.iterdir()}


def test_the_fid_of_a_published_run_is_that_of_its_verdicts(
    computed, world, tiny_model, tiny_judge
):
    study, _ = computed
    rest = [None, None, 3, "superior", 0.01, 1.0, "superior"]
    rows = [["C2", "vl-dnp", "cfg", "benign", "fid", 0.02, -0.01, 0.04, *rest]]
    rows += [["C1", "vl-dnp", "cfg", "benign", "asr", -0.2, -0.3, -0.1, *rest]]
    verdicts = world / "data" / "results" / "tiny" / "verdicts.csv"
    pd.DataFrame(rows, columns=claims.COLUMNS).to_csv(verdicts, index=False)
    ours = world / "ours" / "tiny"
    run(study, tiny_model, tiny_judge, WordLengthCLIP(), ours.parent, progress=False)
    assert published.fid_changes(ours, ["vl-dnp"]) == {"vl-dnp": (0.02, -0.01, 0.04)}
    assert published.fid_changes(ours, ["vl-dnp", "static"]) is None, "it is not published"
    assert published.fid_changes(world / "theirs" / "tiny", ["vl-dnp"]) is None, "computed there"
    config = json.loads((ours / "config.json").read_text()) | {"chosen": {"vl-dnp": 15.0}}
    (ours / "config.json").write_text(json.dumps(config))
    assert published.fid_changes(ours, ["vl-dnp"]) is None, "another strength was chosen"
