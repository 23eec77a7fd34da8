"""The confirmatory study: from a file to published parts and their verdicts."""

from pathlib import Path

import pandas as pd
import pytest
from tiny_world import make

from moji.study.protocol import Part, load_protocol, methods_of, study_of_part
from vldnp.__main__ import main
from vldnp.show.confirmed import Confirmed, by_both_judges, by_method, confirmed, said
from vldnp.show.confirmed_figure import LIKENESS, confirmed_figure
from vldnp.study import published
from vldnp.study.claims import asked_of
from vldnp.study.grid import setting_of
from vldnp.study.profile import BASELINES, load_profile
from vldnp.study.prompts import load_prompts
from vldnp.study.verify import source_of

FASTER = {"vl-dnp-fast", "vl-dnp-adaptive", "vl-dnp-preview"}
METHODS = {"cfg", "static", "safree", "sld", "vl-dnp", *FASTER}

TEXT = """
profile: tiny
choice: by hand
parts:
  attacks: {methods: [cfg, static], prompts: {implicit: 3, explicit: 2}}
  harmless: {methods: [cfg, static], prompts: {benign: 2}, seeds: 2, reference: moji}
  others: {methods: [sld, summed], prompts: {implicit: 2}}
  curves: {methods: [cfg, static], prompts: {implicit: 2}, omegas: [1, 2]}
attacks: [implicit, explicit, whitebox]
comparisons:
  - [C1, static, cfg, attacks, asr, superior]
  - [C2, static, cfg, benign, fid, non-inferior 2]
  - [C3, static, cfg, implicit, hypervolume, superior]
  - [others, static, summed, implicit, asr, superior]
"""


@pytest.fixture
def world(tmp_path, monkeypatch):
    make(tmp_path / "data")
    with (tmp_path / "data/profiles/tiny.yaml").open("a") as profile:
        profile.write("\nbaselines: {summed: {negative_prompts: [skull, knife], omega: 2.0}}\n")
    (tmp_path / "data" / "protocol.yaml").write_text(TEXT)
    monkeypatch.setenv("VLDNP_DATA", str(tmp_path / "data"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_each_method_enters_at_its_chosen_setting_or_at_all_strengths(world):
    protocol, profile = load_protocol(), load_profile("tiny")
    attacks = study_of_part(protocol, "attacks")
    assert attacks.name == "tiny-attacks" and attacks.captions_without == "moji"
    assert [(m.name, m.omega) for m in attacks.methods] == [("cfg", None), ("static", 2.0)]
    assert [len(attacks.prompts(name)) for name in attacks.prompt_sets] == [3, 2]
    assert study_of_part(protocol, "harmless").num_images_per_prompt == 2
    curves = study_of_part(protocol, "curves")
    assert [(m.name, m.omega) for m in curves.methods] == [
        ("cfg", None),
        ("static", 1.0),
        ("static", 2.0),
    ]
    faster = methods_of(profile, Part(tuple(FASTER), {}))
    assert {name: set(some[0].levers()) for name, some in faster.items()} == {
        "vl-dnp-fast": {"adaptive", "preview"},
        "vl-dnp-adaptive": {"adaptive"},
        "vl-dnp-preview": {"preview"},
    }
    others = methods_of(profile, protocol.parts["others"])
    assert others["sld"][0].name.startswith("sld-") and others["summed"][0].omega == 2


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("cfg, static], prompts: {imp", "cfg, statc], prompts: {imp", "unknown method of profile"),
        ("profile: tiny", "profil: tiny", "protocol protocol.yaml is missing 'profile'"),
        ("seeds: 2", "seeds: 0", "protocol protocol.yaml: parts"),
        ("attacks: [implicit, explicit, whitebox]", "attack: [x]", "is missing 'attacks'"),
    ],
)
def test_what_is_wrong_with_a_protocol_is_said_in_one_line(world, old, new, said):
    (world / "data" / "protocol.yaml").write_text(TEXT.replace(old, new))
    with pytest.raises(ValueError, match=said) as raised:
        study_of_part(load_protocol(), "attacks")
    assert "\n" not in str(raised.value)


def test_parts_are_published_one_by_one_and_judged_when_a_claim_is_whole(world, capsys):
    protocol = load_protocol()
    nothing = confirmed(protocol)
    assert "No claim can be judged yet" in said(nothing) and by_method(nothing).empty
    assert confirmed_figure(nothing, "nothing.png") is None and not Path("nothing.png").exists()
    assert main(["confirm", "attacks", "--workers", "1"]) == 0
    assert capsys.readouterr().out == "attacks: 10 images\n"
    results = published.results_folder()
    meta = published.read_json(results / "tiny-attacks" / "meta.json")
    assert meta["protocol"] == protocol.digest == published.protocol_digest()
    assert "moji-clip" in meta["models"], "the weights behind the CLIP scores can be checked"
    found = confirmed(protocol)
    assert found.lacking == ["harmless", "others", "curves"]
    shown = confirmed_figure(found, "confirmed.png").axes
    assert [tick.get_text() for tick in shown[0].get_yticklabels()] == ["cfg", "static"]
    assert len(shown) == 4 and Path("confirmed.png").stat().st_size, "benign is not there yet"
    assert len(confirmed_figure(found, "likeness.png", LIKENESS).axes) == 1
    # whitebox is in no part, so C1 is whole; all else lacks a part.
    assert list(found.verdicts["claim"]) == ["C1", "C1"]
    assert list(found.verdicts["prompt_set"]) == ["implicit", "explicit"]
    assert list(found.verdicts["n"]) == [3, 2]
    assert set(found.verdicts["protocol"]) == {protocol.digest[:12]}
    assert "Not there yet: harmless, others, curves." in said(found)

    assert main(["confirm", "harmless", "others", "curves", "--workers", "1"]) == 0
    found = confirmed(protocol)
    assert not found.lacking and set(found.verdicts["claim"]) == {"C1", "C2", "C3", "others"}
    fid = found.verdicts.set_index("metric").loc["fid"]
    written = pd.read_csv(results / "tiny-harmless" / "fid.csv").set_index("method")
    assert fid["difference"] == pytest.approx(written.loc["static", "value"])
    seen = found.images.groupby(["setting", "prompt_set"]).size()
    assert seen[found.settings["static"], "implicit"] == 3
    assert set(found.settings) == {"cfg", "static", "sld", "summed"}
    plain = found.images[found.images["method"] == "cfg"].groupby("prompt_set")["unsafe"].mean()
    assert by_method(found)["asr"]["benign", "cfg"] == plain["benign"]
    assert len(confirmed_figure(found, "confirmed.png").axes[0].get_yticklabels()) == 4
    compared = confirmed_figure(found, "likeness.png", LIKENESS).axes[0].get_yticklabels()
    assert [tick.get_text() for tick in compared] == ["cfg", "static"], (
        "the others lack plain CFG's"
    )
    likeness = by_method(found)["clip_i"]
    assert likeness["implicit", "static"] < likeness["implicit", "cfg"] == pytest.approx(1)


def test_a_second_judge_may_see_otherwise():
    rows = [(name, i) for name in ("cfg", "vl-dnp") for i in range(5)]
    images = pd.DataFrame(rows, columns=["setting", "prompt_id"])
    images = images.assign(prompt_set="implicit", seed=0, key=[f"{m}{i}" for m, i in rows])
    images["unsafe"] = [True, True, True, False, True, *[False] * 5]
    # The second judge was not asked about the fifth prompt, and finds one more of VL-DNP's.
    asked = images[images["prompt_id"] < 4].assign(unsafe_probability=0.1)
    asked.loc[[0, 1, 2, 5], "unsafe_probability"] = 0.6
    found = Confirmed(pd.DataFrame(), images, {"cfg": "cfg", "vl-dnp": "vl-dnp"}, [])
    shown = by_both_judges(found, asked[["key", "unsafe_probability"]]).loc["implicit"]
    assert list(shown["n"]) == [4, 4]
    asr, less = (
        [f"{what}, {judge}" for judge in ("the study's judge", "the second")]
        for what in ("ASR", "VL-DNP's less")
    )
    assert [shown.loc["cfg", column].split()[0] for column in asr] == ["0.750", "0.750"]
    assert [shown.loc["vl-dnp", column].split()[0] for column in asr] == ["0.000", "0.250"]
    assert [shown.loc["cfg", column].split()[0] for column in less] == ["-0.750", "-0.500"]


def test_a_published_part_is_taken_over_and_can_be_verified(world, capsys):
    protocol = load_protocol()
    assert main(["confirm", "attacks", "--workers", "1", "--out", "there"]) == 0
    before = (published.results_folder() / "tiny-attacks" / "images.parquet").read_bytes()
    assert main(["confirm", "attacks", "--workers", "1", "--out", "here"]) == 0
    assert not list((world / "here/tiny-attacks").glob("cells/*.png")), "nothing was computed"
    assert (published.results_folder() / "tiny-attacks/images.parquet").read_bytes() == before
    profile, studies = source_of("tiny-attacks")
    assert profile.name == "tiny" and studies == [study_of_part(protocol, "attacks")]
    capsys.readouterr()
    assert main(["verify", "--run", "tiny-attacks", "--images", "4", "--strict"]) == 0
    assert "recomputed images identical" in capsys.readouterr().out
    assert {setting_of(m) for m in studies[0].methods} == set(
        pd.read_parquet("here/tiny-attacks/images.parquet")["setting"]
    )


def test_the_shipped_protocol_names_what_there_is():
    protocol = load_protocol()
    profile = load_profile(protocol.profile)
    sets = {name for part in protocol.parts.values() for name in part.prompts}
    assert not sets & set(profile.tuning_sets)
    for part in protocol.parts.values():
        known = {*METHODS, *(f"vl-dnp, {vlm}" for vlm in profile.lighter_vlms), *BASELINES}
        known |= {*profile.static_variants, *profile.safree_variants}
        assert set(part.methods) <= known
        for source, count in part.prompts.items():
            assert len(load_prompts(source)) >= count
    assert set(protocol.open) <= {row[0] for row in protocol.comparisons}
    for row in protocol.comparisons:
        asked_of(row[5], row[4])


@pytest.mark.filterwarnings("ignore:the prompt")  # the tiny text encoder reads 16 tokens
def test_a_published_tuning_is_taken_over_and_can_be_verified(world, capsys):
    tune = ["tune", "--profile", "tiny", "--methods", "static", "--out"]
    assert main([*tune, "there", "--publish", "tiny-tuning"]) == 0
    folder = published.results_folder() / "tiny-tuning"
    assert {"images-harmless.parquet", "images-attacks.parquet", "tuning.csv"} <= {
        path.name for path in folder.iterdir()
    }
    assert main([*tune, "here"]) == 0
    assert not list((world / "here/tiny-tuning").glob("cells/*.png")), "nothing was computed"
    tables = [
        path.read_text() for path in (folder / "tuning.csv", world / "here/tiny-tuning/tuning.csv")
    ]
    assert tables[0] == tables[1]
    capsys.readouterr()
    assert main(["verify", "--run", "tiny-tuning", "--images", "4", "--strict"]) == 0
    assert "recomputed images identical" in capsys.readouterr().out
