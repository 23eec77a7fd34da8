import hashlib
import json

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from vldnp.study.grid import cells, plan_batches, setting_of
from vldnp.study.published import open_run, publish, published_runs, recompute


def test_what_is_published(computed, world, tiny_model, tiny_judge):
    study, images = computed
    folder = world / "data" / "results" / "tiny"
    rows = pd.read_parquet(folder / "images.parquet")
    picture = Image.open(world / "theirs" / "tiny" / images["image"][0])
    pixels = np.asarray(picture.convert("RGB"))
    expected = hashlib.sha256(b"32x32:" + pixels.tobytes()).hexdigest()[:32]
    assert rows["pixels"][0] == expected
    assert not list(folder.rglob("*.png"))
    planned = {batch.key: batch for batch in plan_batches(cells(study, tiny_model), study)}
    for row in rows.itertuples():
        assert planned[row.batch].cells[row.place].key == row.key
    run = open_run("tiny")
    assert run.meta["models"][tiny_judge.name] == tiny_judge.revision
    assert run.meta["protocol"] == "abc" and published_runs() == ["tiny"]
    last = study.methods[-1]
    assert run.methods[setting_of(last)] == json.loads(json.dumps(last.describe()))
    (world / "theirs" / "tiny" / "verdicts.csv").write_text("claim")
    publish(world / "theirs" / "tiny", protocol="abc")
    assert (folder / "verdicts.csv").is_file() and open_run("tiny").digest == run.digest


def test_what_cannot_be_published(computed, world):
    study, images = computed
    target = world / "data" / "results" / "tiny"
    before = {path: path.read_bytes() for path in target.iterdir()}
    (world / "theirs" / "tiny" / images["image"][0]).unlink()
    with pytest.raises(ValueError, match=images["key"][0]):
        publish(world / "theirs" / "tiny", target)
    rows = pd.read_parquet(world / "theirs" / "tiny" / "images.parquet")
    rows.assign(batch="0" * 12).to_parquet(world / "theirs" / "tiny" / "images.parquet")
    with pytest.raises(ValueError, match="which the study of .* does not plan"):
        publish(world / "theirs" / "tiny", target)
    with pytest.raises(FileNotFoundError, match="holds no study"):
        publish(world / "nowhere", target)
    assert before == {path: path.read_bytes() for path in target.iterdir()}


def test_recomputing_is_asked_for_by_the_environment(monkeypatch):
    assert not recompute()
    monkeypatch.setenv("RECOMPUTE", "all")
    assert recompute()
    monkeypatch.setenv("RECOMPUTE", "yes")
    with pytest.raises(ValueError, match="RECOMPUTE must be 'all' or empty, not 'yes'"):
        recompute()


def test_the_parts_of_a_run_of_version_2_are_read():
    parts = {part.name: part for part in open_run("moji").parts}
    assert list(parts)[0] == "" and {"vlm-size", "fast"} <= set(parts)
    rows = parts["vlm-size"].images
    assert isinstance(rows["vlm_answers"].iloc[0], list)
    assert sum(map(len, parts["vlm-size"].batches().values())) == rows["key"].nunique()
