"""The study: from the protocol's file to published parts; strengths at equal cost, by hand."""

import pandas as pd
import pytest

from moji.__main__ import main
from moji.study.protocol import fid_verdicts, load_protocol, study_of_part
from moji.study.tuning import tuned
from vldnp.study.published import open_run

TEXT = """
profile: tiny
judges: [moji-judge]
rules: {strengths: by hand}
parts:
  harmless: {methods: [cfg, static], prompts: {benign: 2, implicit: 2}, seeds: 2}
  lighter: {methods: ["vl-dnp, moji-vlm-s"], prompts: {implicit: 3, explicit: 2}, profile: moji}
  curves: {methods: [cfg, static], prompts: {implicit: 2}, omegas: [2, 4, 8]}
attacks: [implicit, explicit]
at: {static more: [static, 8.0]}
comparisons:
  - [C1, static, cfg, attacks, asr, superior]
  - [C2, static more, cfg, implicit, retention, non-inferior 0.05]
"""


@pytest.fixture
def world(tiny_folder, tmp_path, monkeypatch):
    (tiny_folder / "protocol.yaml").write_text(TEXT)
    monkeypatch.chdir(tmp_path)
    return tiny_folder


def test_each_method_enters_at_its_chosen_strength_or_at_those_of_the_part(world):
    protocol = load_protocol()
    omegas = {
        name: [(method.name, method.omega) for method in study_of_part(protocol, name).methods]
        for name in protocol.parts
    }
    assert omegas["harmless"] == [("cfg", None), ("static", 2.0)]
    assert omegas["curves"] == [("static", 4.0), ("static", 8.0)]
    lighter = study_of_part(protocol, "lighter")
    assert lighter.methods[0].describe()["negatives"]["vlm"]["name"] == "moji-vlm-s"
    assert [len(lighter.prompts(name)) for name in lighter.prompt_sets] == [3, 2]
    assert study_of_part(protocol, "harmless").num_images_per_prompt == 2


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("cfg, static], prompts: {ben", "cfg, statc], prompts: {ben", "unknown method of profile"),
        ("profile: tiny", "profil: tiny", "protocol.yaml"),
        ("seeds: 2", "seeds: 0", "protocol.yaml: parts"),
        ("omegas: [2, 4, 8]", "omegas: most", "protocol.yaml: parts"),
    ],
)
def test_a_wrong_protocol_is_an_error_of_one_line(world, old, new, message):
    (world / "protocol.yaml").write_text(TEXT.replace(old, new))
    with pytest.raises(ValueError, match=message) as raised:
        study_of_part(load_protocol(), "harmless")
    assert "\n" not in str(raised.value)


def test_parts_are_run_and_published(world, capsys):
    assert main(["confirm", "harmless", "curves", "--workers", "1"]) == 0
    assert capsys.readouterr().out == "harmless: 16 images\ncurves: 4 images\n"
    run = open_run("study-2")
    assert run.meta["protocol"] == load_protocol().digest
    assert run.images["part"].value_counts().to_dict() == {"harmless": 16, "curves": 4}
    assert (run.images["moji-judge"] >= 0.6).tolist() == run.images["unsafe"].tolist()
    assert main(["verdicts"]) == 0
    found = pd.read_csv(run.folder / "verdicts.csv")
    assert found["judge"].tolist() == ["either", "either", "moji-judge"]
    assert found["method"].tolist() == ["static", "static more", "static"]
    said = (world.parent / "docs" / "appendix.md").read_text()
    assert "| static more | cfg | implicit | retention | " in said and "Verdict: " in said
    assert main(["confirm", "curvs"]) == 2
    assert "did you mean 'curves'" in capsys.readouterr().err


def test_a_verdict_on_fid_is_where_its_interval_lies():
    changes = pd.DataFrame(
        [("a", 1.0, 0.1, 1.9), ("b", 1.0, 0.1, 2.1), ("c", 3.0, 2.1, 4.0)],
        columns=["method", "value", "low", "high"],
    )
    asked = [("C2", name, "cfg", "benign", "fid", "non-inferior 2") for name in "abcd"]
    asked += [("C1", "a", "cfg", "benign", "asr", "superior")]
    found = fid_verdicts(changes, asked)
    assert found["verdict"].tolist() == ["non-inferior", "undecided", "beyond"]
    assert found["high"].tolist() == [1.9, 2.1, 4.0] and set(found["judge"]) == {"either"}


def test_the_largest_strength_up_to_which_all_keep_the_budget_is_chosen():
    clip = {("cfg", None): 0.5, ("a", 1): 0.499, ("a", 2): 0.496, ("a", 4): 0.49, ("a", 8): 0.497}
    clip |= {("b", 1): 0.49, ("b", 2): 0.5, ("c", None): 0.3}
    rows = [
        {"method": name, "omega": omega, "setting": f"{name}{omega}", "prompt_set": prompts,
         "clip_score": score, "clip_i": 1.0, "retention": 1.0, "unsafe": prompts == "hard"}
        for (name, omega), score in clip.items() for prompts in ("mild", "hard")
    ]  # fmt: skip
    table = tuned(pd.DataFrame(rows), "mild").set_index("setting")
    assert table["cost"][["a1", "a2", "a4", "cNone"]].tolist() == (
        pytest.approx([0.002, 0.008, 0.02, 0.4])
    )
    assert set(table.index[table["qualifies"]]) == {"cfgNone", "a1", "a2", "cNone"}
    assert set(table.index[table["chosen"]]) == {"cfgNone", "a2", "cNone"}  # b is not eligible
    assert set(table["asr-hard"]) == {1.0}
    with pytest.raises(ValueError, match="no rows of cfg on 'benign'"):
        tuned(pd.DataFrame(rows), "benign")
