import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from tiny_published import WordLengthCLIP, tiny_study

import vldnp.study.grid
from vldnp import guidance
from vldnp.__main__ import main
from vldnp.metrics.intervals import Interval
from vldnp.show.verification import verification
from vldnp.study import published, verify
from vldnp.study.grid import setting_of
from vldnp.study.run import run


@pytest.fixture
def verified(computed, world, tiny_model, tiny_judge):
    """Verifying the tiny run, with other arguments where they are given."""
    study, _ = computed

    def call(images=100, **changes):
        given = {
            "studies": [study],
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


def test_the_same_code_makes_the_same_images(verified, world, tiny_judge, tiny_model, monkeypatch):
    found = verified()
    assert (found.images, found.identical, found.same_label, found.same_words) == (9,) * 4
    assert found.score_difference < 1e-6 and found.asr.value == 0
    assert str(found).startswith("9 of 9 recomputed images identical, 9 of 9 with the same label")
    assert len(found.notes) == 1 and "1 of 4 settings were not drawn from" in found.notes[0]

    study = tiny_study()
    run(study, tiny_model, tiny_judge, WordLengthCLIP(), world / "ours", progress=False)
    line = str(verification(study, world / "ours"))
    assert f"verified here on {found.date}: 9 of 9" in line
    tamper(world, unsafe_probability=0.99)  # as if published anew
    assert "not verified on this machine: run `make reproduce`" in verification(
        study, world / "ours"
    )
    alone = replace(study, name="mine", methods=study.methods[:1], reference=None)
    run(
        alone,
        tiny_model,
        tiny_judge,
        WordLengthCLIP(),
        world / "ours",
        progress=False,
        recompute=True,
    )
    assert verification(alone, world / "ours") == "Computed on this machine."


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
        assert found.asr.value == pytest.approx(1 / 9) and found.disagrees()
    assert found.disagrees(0.2) is False


def test_a_tampered_table_is_found(verified, world):
    path = world / "data" / "results" / "tiny" / "table.csv"
    table = pd.read_csv(path)
    table.loc[0, "asr"] = 0.77
    table.to_csv(path, index=False)
    assert "table.csv does not follow from the published rows" in verified().notes


def test_another_code_path_is_found(verified, world, monkeypatch):
    equation = guidance.RULES["added"].equation
    patched = replace(guidance.RULES["added"], equation=lambda *a, **k: 1.001 * equation(*a, **k))
    with monkeypatch.context() as patch:
        patch.setitem(guidance.RULES, "added", patched)
        found = verified(root=world / "patched")
    assert found.identical < 9 and "notes" in vars(found)
    monkeypatch.setattr(vldnp.study.grid, "SCHEMA", 99)
    with pytest.raises(ValueError, match="the code's SCHEMA .* are others now"):
        verified(root=world / "schema")


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
    run_, methods = published.open_run("tiny"), {"cfg", "static", "vl-dnp"}
    settings = set(run_.parts[0].images["setting"])
    few = verify.draw(run_, settings, 3, seed=0)
    assert len(few) < 6 and few == verify.draw(run_, settings, 3, seed=0)
    assert few != verify.draw(run_, settings, 3, seed=1)
    all_of_them = verify.draw(run_, settings, 1000, seed=0)
    assert sorted(all_of_them) == sorted(set(run_.parts[0].images["batch"]))
    # one after the other, the methods' shares never differ by more than a round
    of = run_.cells.drop_duplicates("batch").set_index("batch")["method"]
    assert set(of[all_of_them[:3]]) <= methods


def test_strict_fails_by_exit_status(monkeypatch, capsys):
    found = verify.Verification(
        "tiny", "0", "2026-01-01", 1, 100, 90, 95, 95, 0.1, Interval(0.05, 0, 0.1)
    )
    monkeypatch.setattr(verify, "verify", lambda *args, **kwargs: found)
    asked = ["verify", "--run", "moji"]
    assert main(asked) == 0
    assert "90 of 100 recomputed images identical" in capsys.readouterr().out
    assert main([*asked, "--strict"]) == 1
    assert main([*asked, "--strict", "--tolerance", "0.05"]) == 0
    assert np.isclose(found.asr.value, 0.05)


@pytest.mark.parametrize("name", ["moji", "moji-tuning-main", "moji-full-attacks"])
def test_all_of_a_shipped_run_can_be_drawn_from(name):
    """Also the oracle's images, which need what its judge saw in the published ones; and what the
    protocol is now is a note on its own runs only."""
    shipped = published.open_run(name)
    _, studies = verify.source_of(name)
    made = {setting_of(method) for study in studies for method in study.methods}
    assert set(shipped.cells["setting"]) <= made
    assert not [note for note in verify.notes(shipped, made) if "packages" not in note]
