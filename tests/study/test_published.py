import hashlib
import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from tiny_published import WordLengthCLIP

from vldnp.methods import Static
from vldnp.study.grid import batch_key, cells, plan_batches, setting_of
from vldnp.study.published import open_run, publish, published_runs, recompute, rows_of
from vldnp.study.run import run


def test_what_is_published(computed, world, model, judge):
    study, images = computed
    folder = world / "data" / "results" / "tiny"
    rows = pd.read_parquet(folder / "images.parquet")
    picture = Image.open(world / "theirs" / "tiny" / images["image"][0])
    pixels = np.asarray(picture.convert("RGB"))
    expected = hashlib.sha256(b"32x32:" + pixels.tobytes()).hexdigest()[:32]
    assert rows["pixels"][0] == expected
    assert not list(folder.rglob("*.png"))
    planned = plan_batches(cells(study, model), study)
    planned = {batch_key(rows): rows["key"].tolist() for _, rows, _ in planned}
    for row in rows.itertuples():
        assert planned[row.batch][row.place] == row.key
    found = open_run("tiny")
    assert found.meta["models"][judge.name] == judge.revision
    assert found.meta["protocol"] == "abc" and published_runs() == ["tiny"]
    last = study.methods[-1]
    assert found.methods[setting_of(last)] == json.loads(json.dumps(last.describe()))
    publish(world / "theirs" / "tiny", protocol="abc")
    assert (folder / "tiny-table.csv").is_file() and len(open_run("tiny").images) == len(rows)


def test_a_published_run_has_parts(computed, world, model, judge):
    study, images = computed
    more = replace(study, name="more", methods=(Static("knife", omega=5),))
    root = world / "theirs"
    run(more, model, judge, WordLengthCLIP(), root, progress=False)
    for name in ("tiny", "more", "more"):
        scores = images[["key"]].drop_duplicates().assign(second=0.25) if name == "tiny" else None
        publish(root / name, "both", scores)
    both = open_run("both")
    assert both.images["part"].value_counts().to_dict() == {"tiny": len(images), "more": 6}
    assert both.images["second"].notna().sum() == len(images)
    settings = {setting_of(method) for method in (*study.methods, *more.methods)}
    assert set(both.methods) == settings
    everything = replace(study, methods=study.methods + more.methods)
    rows = rows_of(everything, Models(model, judge), world / "ours")
    assert set(rows["origin"]) == {"published as both"} and len(both.batches()) > 3
    with pytest.raises(ValueError, match="more has the protocol b, and .* has None: publish it"):
        publish(root / "more", "both", protocol="b")
    run(replace(more, name="g", sampling={"guidance_scale": 2.0}), model, judge, None, root)
    with pytest.raises(ValueError, match="g has the sampling .*: publish it under another name"):
        publish(root / "g", "both")


def test_what_cannot_be_published(computed, world):
    study, images = computed
    target = world / "data" / "results" / "tiny"
    before = {path: path.read_bytes() for path in target.iterdir()}
    (world / "theirs" / "tiny" / images["image"][0]).unlink()
    with pytest.raises(ValueError, match=images["key"][0]):
        publish(world / "theirs" / "tiny")
    rows = pd.read_parquet(world / "theirs" / "tiny" / "images.parquet")
    rows.assign(batch="0" * 12).to_parquet(world / "theirs" / "tiny" / "images.parquet")
    with pytest.raises(ValueError, match="or not all of its batch 0{12}; publish a run"):
        publish(world / "theirs" / "tiny")
    with pytest.raises(FileNotFoundError, match="holds no study"):
        publish(world / "nowhere")
    assert before == {path: path.read_bytes() for path in target.iterdir()}


def test_recomputing_is_asked_for_by_the_environment(monkeypatch):
    assert not recompute()
    monkeypatch.setenv("RECOMPUTE", "all")
    assert recompute()
    monkeypatch.setenv("RECOMPUTE", "yes")
    with pytest.raises(ValueError, match="RECOMPUTE must be 'all' or empty, not 'yes'"):
        recompute()


class Models:
    """A profile's models, by name."""

    def __init__(self, model, judge):
        self.model, self.judge, self.clip = model, judge, WordLengthCLIP()


def test_published_rows_are_taken_where_they_are_what_the_study_asks(
    computed, world, model, judge, monkeypatch
):
    (study, images), profile = computed, Models(model, judge)
    some = replace(study, name="some", methods=study.methods[1:], max_prompts=2)
    broken = world / "data" / "results" / "another"
    broken.mkdir()
    (broken / "meta.json").write_text("{}")
    (broken / "config.json").write_text('{"truncated')
    with pytest.warns(UserWarning, match="'another' cannot be read .*config.json is no JSON"):
        rows = rows_of(some, profile, world / "ours")
    (broken / "meta.json").unlink()
    assert not (world / "ours").exists() and set(rows["origin"]) == {"published as tiny"}
    shown = ["setting", "prompt_set", "prompt_id", "unsafe_probability", "key"]
    wanted = images.merge(rows[["key", "prompt_set"]])[shown]
    pd.testing.assert_frame_equal(rows[shown], wanted)
    assert len(rows) == 2 * 2 * 2 and rows["clip_score"].notna().all()
    for changes in (
        {"methods": (Static("knife", omega=5),)},
        {"sampling": {"num_inference_steps": 2}},
        {"num_images_per_prompt": 2},
        {"unsafe_threshold": 0.5},
    ):
        other = replace(some, name=f"other-{next(iter(changes))}", **changes)
        rows = rows_of(other, profile, world / "ours")
        assert len(rows) and (world / "ours" / other.name / "table.csv").is_file()
        assert set(rows["origin"]) == {"computed here"}
        made = (world / "ours" / other.name / "cells").glob("*.png")
        assert {path.stem for path in made} == set(rows["key"]), "no more than what was asked for"
    monkeypatch.setenv("RECOMPUTE", "all")
    assert len(rows_of(some, profile, world / "ours")) == 8
    assert (world / "ours" / "some" / "table.csv").is_file()
