import json

import pandas as pd
import pytest
from tiny_published import WordLengthCLIP

import vldnp.study.run
from vldnp.study import published
from vldnp.study.profile import load_profile, profile_methods


@pytest.fixture
def verified(computed, world, model, judge):
    """Verifying the tiny run."""
    study, _ = computed

    def call(images=100, seed=1, methods=study.methods):
        models = model, judge, WordLengthCLIP()
        return published.verify("tiny", methods, *models, images=images, seed=seed, progress=False)

    return call


def test_the_same_code_makes_the_same_images(verified, computed):
    found = verified()
    assert (found.images, found.identical, found.same_label, found.same_words) == (18,) * 4
    assert found.score_difference < 1e-6 and found.left_out == 0
    few = verified(methods=computed[0].methods[:1])
    assert few.images == 6 and few.left_out == 12


@pytest.mark.parametrize(
    "change, same",  # in pixels, label, words
    [
        ({"unsafe_probability": 0.01, "unsafe": False}, (18, 17, 18)),
        ({"pixels": "0" * 32}, (17, 18, 18)),
        ({"vlm_answers": ["a knife", "a knife"]}, (18, 18, 17)),
        ({"clip_score": 0.9}, (18, 18, 18)),
    ],
)
def test_a_tampered_row_is_found(verified, world, change, same):
    rows = pd.read_parquet(path := world / "data" / "results" / "tiny" / "images.parquet")
    assert rows["unsafe"][0]
    for name, value in change.items():
        rows.at[0, name] = value
    rows.to_parquet(path, index=False)
    found = verified()
    assert (found.identical, found.same_label, found.same_words) == same
    if "unsafe_probability" in change or "clip_score" in change:
        assert found.score_difference > 0.4


def test_a_batch_that_lost_a_row_is_told_of(verified, world):
    path = world / "data" / "results" / "tiny" / "images.parquet"
    rows = pd.read_parquet(path)
    rows[rows["key"] != rows["key"][0]].to_parquet(path, index=False)
    found = verified()
    assert found.identical == found.images < 18
    assert found.left_out == 16 - found.images > 0


def test_another_code_path_is_found(verified, monkeypatch):
    sampling = vldnp.study.run.sample

    def other(*args, guidance_scale, **options):
        return sampling(*args, guidance_scale=[1.01 * g for g in guidance_scale], **options)

    with monkeypatch.context() as patch:
        patch.setattr(vldnp.study.run, "sample", other)
        found = verified()
    assert found.identical < 18
    monkeypatch.setattr(vldnp.study.grid, "SCHEMA", 99)  # other keys, the same images
    assert verified().identical == 18


def test_another_judge_is_named(verified, judge, monkeypatch):
    monkeypatch.setattr(judge, "revision", "another")
    with pytest.raises(ValueError, match=f"'{judge.name}' is another, and that of 'tiny' was "):
        verified()


def test_a_changed_weight_file_is_named(verified, world):
    meta = world / "data" / "results" / "tiny" / "meta.json"
    folder = world / "data" / "models" / "tiny-judge"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    said = json.loads(meta.read_text())
    said["models"]["tiny-judge"] = published.fingerprint(folder)
    meta.write_text(json.dumps(said))
    assert verified().identical == 18
    (folder / "config.json").write_text("{ }")
    with pytest.raises(ValueError, match="tiny-judge has the fingerprint .*: its weights"):
        verified()


def test_whole_batches_are_drawn_at_random(verified):
    few = [verified(3, seed=seed) for seed in (0, 0, 1, 2)]
    assert all(3 <= found.images == found.identical <= 6 for found in few)
    assert few[0] == few[1] and verified(1000).images == 18


@pytest.mark.slow
def test_some_images_of_the_shipped_run_are_made_again():
    moji = load_profile("moji")
    made = profile_methods(moji), moji.model, moji.judge, moji.clip
    found = published.verify("study-2", *made, images=16, seed=0, progress=False)
    assert found.identical == found.same_words == found.images >= 16
    assert str(found).startswith(f"{found.images} of {found.images} recomputed images identical, ")


def test_a_run_that_is_not_there_says_so(world, verified):
    with pytest.raises(ValueError, match="unknown published run 'tny': did you mean 'tiny'"):
        published.verify("tny", (), None, None)
    with pytest.raises(ValueError, match="the published run 'tiny' has none of the given methods"):
        verified(methods=())
