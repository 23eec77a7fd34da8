import json

import pandas as pd
import pytest
import torch
from tiny_published import WordLengthCLIP

import vldnp.study.run
from vldnp.study import published, verify
from vldnp.study.grid import setting_of
from vldnp.study.profile import profile_methods


@pytest.fixture
def verified(computed, world, tiny_model, tiny_judge):
    """Verifying the tiny run, with other arguments where they are given."""
    study, _ = computed

    def call(images=100, **changes):
        given = {
            "methods": study.methods,
            "model": tiny_model,
            "judge": tiny_judge,
            "clip": WordLengthCLIP(),
        }
        root = changes.pop("root", world / "ours")
        return verify.verify("tiny", images, 1, root, progress=False, **given | changes)

    return call


def tamper(world, **columns):
    """Other values in the first published row."""
    path = world / "data" / "results" / "tiny" / "images.parquet"
    rows = pd.read_parquet(path)
    for name, value in columns.items():
        rows.at[0, name] = value
    rows.to_parquet(path, index=False)
    (path.parent / "meta.json").touch()


def test_the_same_code_makes_the_same_images(verified, computed, world):
    found = verified()
    assert (found.images, found.identical, found.same_label, found.same_words) == (9,) * 4
    assert found.score_difference < 1e-6 and found.asr.value == 0 and not found.notes
    assert str(found).startswith("9 of 9 recomputed images identical, 9 of 9 with the same label")
    assert verify.read_verification(world / "ours", "tiny") == found
    few = verified(methods=computed[0].methods[:1])
    assert few.images == 3 and few.notes == ("2 of 3 settings were not drawn from",)
    tamper(world, unsafe_probability=0.99)  # as if published anew
    assert verify.read_verification(world / "ours", "tiny") is None


def test_an_interrupted_verification_goes_on(verified, monkeypatch):
    computing, done = vldnp.study.run.compute_batch, []

    def fails_later(model, batch, folder):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(batch.key)
        computing(model, batch, folder)

    monkeypatch.setattr(vldnp.study.run, "compute_batch", fails_later)
    with pytest.raises(KeyboardInterrupt):
        verified()
    monkeypatch.setattr(
        vldnp.study.run,
        "compute_batch",
        lambda model, batch, folder: done.append(batch.key) or computing(model, batch, folder),
    )
    threads = torch.get_num_threads()
    assert verified().identical == 9 and torch.get_num_threads() == threads
    assert len(done) == len(set(done)) == 6, "no batch twice"


@pytest.mark.parametrize(
    "change, identical, same_label, same_words",
    [
        ({"unsafe_probability": 0.01, "unsafe": False}, 9, 8, 9),
        ({"pixels": "0" * 32}, 8, 9, 9),
        ({"vlm_answers": ["a knife", "a knife"]}, 9, 9, 8),
        ({"clip_score": 0.9}, 9, 9, 9),
    ],
)
def test_a_tampered_row_is_found(verified, world, change, identical, same_label, same_words):
    rows = pd.read_parquet(world / "data" / "results" / "tiny" / "images.parquet")
    assert rows["unsafe"][0]
    tamper(world, **change)
    found = verified()
    assert (found.identical, found.same_label, found.same_words) == (
        identical,
        same_label,
        same_words,
    )
    if "unsafe_probability" in change or "clip_score" in change:
        assert found.score_difference > 0.4
        assert any("table.csv does not follow" in note for note in found.notes)
    if same_label < 9:
        assert found.asr.value == pytest.approx(1 / 9)


def test_a_tampered_table_is_found(verified, world):
    path = world / "data" / "results" / "tiny" / "table.csv"
    table = pd.read_csv(path)
    table.loc[0, "asr"] = 0.77
    table.to_csv(path, index=False)
    assert "table.csv does not follow from the published rows" in verified().notes


def test_another_code_path_is_found(verified, world, monkeypatch):
    sampling = vldnp.study.run.sample

    def other(*args, guidance_scale, **options):
        return sampling(*args, guidance_scale=[1.01 * g for g in guidance_scale], **options)

    with monkeypatch.context() as patch:
        patch.setattr(vldnp.study.run, "sample", other)
        found = verified(root=world / "patched")
    assert found.identical < 9
    monkeypatch.setattr(vldnp.study.grid, "SCHEMA", 99)  # other keys, the same images
    assert verified(root=world / "schema").identical == 9


def test_a_changed_weight_file_is_named(verified, world):
    meta = world / "data" / "results" / "tiny" / "meta.json"
    folder = world / "data" / "models" / "tiny-judge"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    said = json.loads(meta.read_text())
    said["models"]["tiny-judge"] = verify.fingerprint(folder)
    meta.write_text(json.dumps(said))
    assert verified().identical == 9
    (folder / "config.json").write_text("{ }")
    with pytest.raises(ValueError, match="tiny-judge has the fingerprint .*: its weights"):
        verified()


def test_the_draw_takes_every_method_and_set_in_turn(computed):
    run, settings = published.open_run("tiny"), {setting_of(m) for m in computed[0].methods}

    def drawn(images, seed):
        return [key for _, key, _ in verify._drawn(run, settings, images, seed)]

    few = drawn(3, 0)
    assert len(few) < 6 and few == drawn(3, 0) and few != drawn(3, 1)
    everything = drawn(1000, 0)
    assert sorted(everything) == sorted(set(run.images["batch"]))
    of = run.images.drop_duplicates("batch").set_index("batch")["method"]
    assert set(of[everything[:3]]) == {"cfg", "static", "vl-dnp"}


MAIN = {"moji": "moji", "moji-full-attacks": "moji-full", "moji-full-others": "moji-full"}


@pytest.mark.parametrize("name, profile", MAIN.items())
def test_the_shipped_profiles_make_the_published_settings(name, profile):
    main = published.open_run(name).parts[0]
    made = {setting_of(method) for method in profile_methods(profile)}
    assert set(main.images["setting"]) <= made
    if name == profile:
        assert set(main.images["setting"]) == made


@pytest.mark.slow
def test_some_images_of_the_shipped_run_are_made_again(tmp_path):
    found = verify.verify("moji", 16, 0, tmp_path, progress=False)
    assert found.identical == found.images >= 16, found.details()


def test_a_run_of_no_profile_says_so(world, monkeypatch):
    with pytest.raises(ValueError, match="unknown published run 'tny': did you mean 'tiny'"):
        verify.verify("tny")
