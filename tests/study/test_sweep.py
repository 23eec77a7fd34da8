"""Ablations, detection, failures and tuning: each on answers or numbers known beforehand."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import yaml
from tiny import ScriptedVLM

import vldnp
from vldnp.baselines.controls import AnswersNone, Oracle, seen_in
from vldnp.baselines.nag import NAG
from vldnp.levers import AdaptiveGuidance
from vldnp.models import load
from vldnp.models.judges import Judgement
from vldnp.show import compare
from vldnp.show.failures import failed
from vldnp.strength import Window
from vldnp.study import profile_methods, tuning
from vldnp.study.detection import detection
from vldnp.study.grid import setting_of
from vldnp.study.profile import BASELINES, load_profile
from vldnp.study.profile_methods import dynamic
from vldnp.study.sweep import sweep


@pytest.fixture
def profile(tiny_profile):
    return replace(tiny_profile, vlm=ScriptedVLM(lambda image: "none"), lighter_vlms=())


def test_query_schedules_vary_as_they_say(tiny_profile):
    spacings = ["front_loaded", "uniform", "late"]
    found = sweep(tiny_profile, "schedule", {"spacing": spacings, "queries": [0, 2, 99]})
    by = found.factors.set_index(["spacing", "queries"])["setting"]
    assert len(by) == 9  # three spacings × 0, 2 and every one of 6 steps
    assert by.xs(0, level=1).nunique() == by.xs(6, level=1).nunique() == 1
    assert by.xs(2, level=1).nunique() == 3
    methods = {setting_of(method): method for method in found.study.methods}
    assert set(methods) == set(by) and methods[by["uniform", 0]].name == "cfg"
    steps = methods[by["late", 2]].negatives.query_steps_of(6)
    early = methods[by["front_loaded", 2]].negatives.query_steps_of(6)
    assert sorted(steps) == sorted(5 - step for step in early)
    assert methods[by["late", 6]].negatives.query_steps_of(6) == (0, 1, 2, 3, 4, 5)


def test_a_variant_is_the_profiles_own_in_all_that_its_grid_does_not_name(tiny_profile):
    negatives, rules = ["static", "dynamic"], ["replaced", "added", "sld-medium"]
    update_policies = {"update_policy": ["replaced", 2, "accumulated"]}
    found = sweep(tiny_profile, "rule", {"negatives": negatives, "rule": rules}, update_policies)
    methods = {setting_of(method): method for method in found.study.methods}
    assert len(methods) == len(found.factors) == 2 * 3 + 2  # added and replaced is there already
    for row in found.factors.itertuples():
        method = methods[row.setting].describe()
        policy = method["negatives"]
        assert method["rule"] == row.rule or method["rule"]["kind"] == "sld"
        assert (
            policy["kind"] == row.negatives
            and str(policy.get("update_policy", "")) == row.update_policy
        )
        assert method["omega"] == (tiny_profile.chosen["vl-dnp"] if row.rule == "added" else None)
        if row.negatives == "dynamic":
            assert policy["query_steps"] == {tiny_profile.schedule: tiny_profile.queries}
            assert policy["vlm"]["name"] == str(tiny_profile.vlm)
    strengths = sweep(tiny_profile, "omega", {"omega": "[1, 2.5]", "negatives": ["static"]})
    assert [method.omega for method in strengths.study.methods] == [1, 2.5]


def test_levers_are_axes(tiny_profile):
    found = sweep(
        tiny_profile,
        "fast",
        {"queries": [0], "adaptive": [None, 0.5], "gate": [None, 0.9]},
        {"adaptive": [None, AdaptiveGuidance(cosine=0.99)], "reuse": [0, 2]},
        {"omega_schedule": [Window(stop=0.5)], "lag": [1], "preview": [None, "moji-taesd"]},
    )
    methods = {setting_of(method): method for method in found.study.methods}
    on = {row.variant: methods[row.setting].levers() for row in found.factors.itertuples()}
    cosine, window = {"start": None, "cosine": 0.99}, Window(stop=0.5).describe()
    preview = load.load_preview("moji-taesd").describe()
    assert on == {
        "cfg": {},
        "cfg, adaptive 0.5": {"adaptive": {"start": 0.5, "cosine": None}},
        "vl-dnp": {},
        "vl-dnp, reuse 2": {"reuse": 2},
        "vl-dnp, adaptive AdaptiveGuidance(cosine=0.99)": {"adaptive": cosine},
        "vl-dnp, adaptive AdaptiveGuidance(cosine=0.99), reuse 2": {"adaptive": cosine, "reuse": 2},
        "vl-dnp, omega_schedule Window(stop=0.5), lag 1": {"omega_schedule": window, "lag": 1},
        "vl-dnp, omega_schedule Window(stop=0.5), lag 1, preview moji-taesd": {
            "omega_schedule": window,
            "lag": 1,
            "preview": preview,
        },
    }
    by = found.factors.drop_duplicates("variant").set_index("variant")
    assert by.loc["vl-dnp", "setting"] == setting_of(dynamic(tiny_profile))
    assert by.loc["cfg", "setting"] == setting_of(vldnp.CFG())
    assert list(by.loc["vl-dnp", ["queries", "reuse", "gate"]]) == [2, "0", "off"]


def test_a_profiles_preview_goes_by_its_name(tiny_profile):
    found = sweep(tiny_profile, "x", {"preview": [tiny_profile.preview]})
    assert found.factors["variant"].tolist() == ["vl-dnp, preview moji-taesd"]


def test_a_rule_inside_the_network_is_one_more(tiny_profile):
    found = sweep(tiny_profile, "x", {"negatives": ["static", "dynamic"], "rule": ["nag"]})
    assert [method.rule for method in found.study.methods] == [NAG(), NAG()]
    assert [method.name for method in found.study.methods] == ["static", "vl-dnp"]


def test_costs_are_relative_to_plain_cfg_of_the_same_prompts(tiny_profile):
    found = sweep(tiny_profile, "x", {"queries": [0, 2]})
    plain, other = found.factors["setting"]
    rows = [(plain, "a", 2.0), (plain, "b", 4.0), (other, "a", 3.0), (other, "b", 4.0)]
    images = pd.DataFrame(rows, columns=["setting", "prompt_set", "seconds"])
    images[["model_evaluations", "vlm_calls", "x0_decodes"]] = 1
    costs = found.costs(images).set_index(["queries", "prompt_set"])["relative"]
    assert costs.to_dict() == {(0, "a"): 1, (0, "b"): 1, (2, "a"): 1.5, (2, "b"): 1}
    alone = sweep(tiny_profile, "x", {"queries": [2]})
    assert "relative" not in alone.costs(images[images["setting"] == other])


@pytest.mark.parametrize(
    "grid, message",
    [
        ({"spacings": ["late"]}, "unknown axis of a sweep 'spacings': did you mean 'spacing'"),
        ({"spacing": ["lat"]}, "unknown spacing 'lat': did you mean 'late'"),
        ({"rule": ["ad ded"]}, "unknown rule 'ad ded': did you mean 'added'"),
        ({"rule": ["sld-maximal"]}, "unknown rule 'sld-maximal'"),
        ({"negatives": ["dynamics"]}, "unknown negatives 'dynamics': did you mean 'dynamic'"),
        (
            {"update_policy": ["replace"]},
            "unknown update_policy 'replace': did you mean 'replaced'",
        ),
        ({"queries": [-1]}, "queries must be a list of numbers, 0 or more"),
        ({"guide": ["moji-vlm-xl"]}, "unknown vlm 'moji-vlm-xl': did you mean"),
        ({"queries": []}, "study 'tiny' has no methods"),
        ({"adaptive": [1.5]}, "start must be a share of the run in 0.0..1.0"),
        ({"preview": ["moji-taes"]}, "unknown preview 'moji-taes': did you mean 'moji-taesd'"),
    ],
)
def test_what_cannot_be_swept_is_one_line(tiny_profile, grid, message):
    with pytest.raises(ValueError) as error:
        sweep(tiny_profile, "x", grid)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_part_shares_cells_and_keeps_its_own_tables(profile, tmp_path):
    main = vldnp.study.profile_methods.study_of(profile, [vldnp.CFG()], prompt_sets=["implicit"])
    vldnp.run(main, profile.model, profile.judge, profile.clip, tmp_path, progress=False)
    made = {p: p.stat().st_mtime_ns for p in (tmp_path / "tiny" / "cells").iterdir()}
    spacings = ["front_loaded", "uniform", "late"]
    grid = {"spacing": spacings, "queries": [0]}
    found = sweep(profile, "query-schedule", grid, prompt_sets=["implicit"])
    images = vldnp.run(
        found.study, profile.model, profile.judge, profile.clip, tmp_path, progress=False
    )
    assert made == {p: p.stat().st_mtime_ns for p in (tmp_path / "tiny" / "cells").iterdir()}
    names = {path.name for path in (tmp_path / "tiny").glob("*.csv")}
    assert names == {"table.csv", "table-query-schedule.csv"}
    # All three spacings without a query are plain CFG, and have its row each.
    summary = found.summary(images)
    assert set(summary["spacing"]) == {"front_loaded", "uniform", "late"}


def by_guide(profile, *guides):
    grid = {"guide": ["cfg", *profile.lighter_vlms, profile.vlm, "random", *guides, "none"]}
    return sweep(profile, "vlm-size", grid, prompt_sets=["implicit"], max_prompts=2)


def test_controls_stand_beside_the_vlms(tiny_profile):
    oracle = Oracle({})
    found = by_guide(tiny_profile, oracle)
    guides = list(found.factors["guide"])
    assert guides == ["cfg", "moji-vlm-s", "moji-vlm-m", "moji-vlm-l", "random", "oracle", "none"]
    by = dict(zip(guides, found.study.methods, strict=True))
    assert by["oracle"].negatives.vlm is oracle and by["cfg"].name == "cfg"
    assert by["random"].negatives.vlm.vlm is by["moji-vlm-l"].negatives.vlm  # opened once
    assert by["none"].negatives.vlm == AnswersNone()


def test_an_oracle_that_is_not_understood_is_left_out(tiny_profile):
    for things, present in (((), True), (("unsafe",), False), (("unsafe", "dagger"), True)):
        found = by_guide(tiny_profile, Oracle({("a cat", 0): things}))
        assert ("oracle" in set(found.factors["guide"])) == present, things


def test_the_oracle_learns_from_plain_cfg_of_the_same_prompts(profile, tmp_path):
    grid = {"queries": [0]}
    plain = sweep(profile, "plain", grid, prompt_sets=["implicit"], max_prompts=2).study
    images = vldnp.run(plain, profile.model, profile.judge, profile.clip, tmp_path, progress=False)
    prompts = by_guide(profile, Oracle({})).study.prompts("implicit")
    assert set(seen_in(images)) == set(zip(prompts["prompt"], prompts["seed"], strict=True))


class FixedJudge:
    """Finds a dagger in every first, and a skull in every second picture."""

    name, revision = "fixed", "1"

    def __call__(self, images):
        seen = [{"dagger": float(i % 2 == 0), "skull": float(i % 2)} for i in range(len(images))]
        return Judgement(np.ones(len(images)), seen)


def test_detection_counts_by_hand(tiny_profile):
    model = load.load(tiny_profile.model)
    prompts = pd.DataFrame({"prompt": ["a cat"] * 4, "seed": range(4)})
    vlms = {
        "always": lambda images, question: ["dagger"] * len(images),
        "never": lambda images, question: ["none"] * len(images),
    }
    found = detection(
        model,
        vlms,
        FixedJudge(),
        prompts,
        "moji",
        every=2,
        batch_size=2,
        progress=False,
        num_inference_steps=4,
    ).set_index(["vlm", "step"])
    assert list(found.loc["always"].index) == [0, 2]
    # 4 daggers said, 2 of them right, 4 things there: 2·2 / (4 + 4)
    right = found.loc[("always", 2)]
    assert right["precision"] == right["recall"] == right["f1"] == 0.5
    never = found.loc[("never", 0)]
    assert np.isnan(never["precision"]) and never["recall"] == never["f1"] == 0


@pytest.mark.parametrize(
    ("answers", "cause"),
    [
        (["none", "none", "none"], "blind"),
        (["knife", "knife", "knife"], "blind"),
        (["none", "none", "a dagger"], "late"),
        (["a dagger", "none", "dagger"], "dropped"),
        (["none", "a dagger", "dagger"], "weak"),
    ],
)
def test_causes_of_failures(answers, cause):
    rows = pd.DataFrame(
        [
            {
                "setting": "x",
                "prompt_set": "implicit",
                "unsafe": True,
                "unsafe_probability": 0.9,
                "found": ["dagger"],
                "vlm_answers": answers,
                "query_steps": [1, 3, 8],
                "negative_prompts": [None] * 10,
            }
        ]
    )
    found = failed(rows, "x", "implicit", "moji")
    assert list(found["cause"]) == [cause]


def test_what_stayed_unsafe_is_looked_for_in_every_prompt_set():
    row = {"setting": "x", "unsafe": True, "unsafe_probability": 0.9, "found": ["dagger"]}
    row |= {"vlm_answers": ["none"], "query_steps": [1], "negative_prompts": [None] * 2}
    safe = row | {"prompt_set": "implicit", "unsafe": False}
    rows = pd.DataFrame([safe, row | {"prompt_set": "adversarial"}])
    rows["method"], rows["omega"] = "vl-dnp", 15.0
    found = compare.failed(load_profile("moji"), rows)
    assert list(found["prompt_set"]) == ["adversarial"]
    assert failed(rows, "x", "implicit", "moji").empty


def test_every_method_has_the_same_number_of_tries(tiny_profile):
    tried = tuning.candidates(replace(tiny_profile, bank="moji"))
    counts = pd.Series([candidate.name for candidate in tried]).value_counts()
    names = ["static", "vl-dnp", "safree", "sld", *BASELINES]
    assert dict(counts) == dict.fromkeys(names, tuning.BUDGET)
    assert len({setting_of(candidate.method) for candidate in tried}) == len(tried)
    few = {candidate.name for candidate in tuning.candidates(tiny_profile)}
    assert few == set(names) - {"safe-denoiser"}, "no bank, no repulsion from it"


def test_one_wording_has_all_tries_too(tiny_profile):
    tried = tuning.candidates(replace(tiny_profile, wordings={}))
    counts = pd.Series([candidate.name for candidate in tried]).value_counts()
    assert set(counts) == {tuning.BUDGET}
    assert len({setting_of(candidate.method) for candidate in tried}) == len(tried)


def test_what_costs_too_much_is_not_tried_on_attacks(tiny_profile, tmp_path, monkeypatch):
    """Plain CFG keeps 0.8 here; what keeps most of its method's goes on all the same."""
    tried = tuning.candidates(tiny_profile)[:3]
    tried = [replace(c, name=name) for c, name in zip(tried, ["a", "a", "b"], strict=True)]
    kept = dict(zip([setting_of(c.method) for c in tried], [0.79, 0.6, 0.5], strict=True))
    kept[setting_of(vldnp.CFG())] = 0.8
    asked = []

    def run(study, *models, workers=None, backend=None, recompute=None):
        asked.append([setting_of(method) for method in study.methods])
        rows = images_of([(setting, 0.4, kept[setting]) for setting in asked[-1]])
        rows["prompt_set"] = rows["prompt_set"].replace({"benign": "tuning-benign"})
        harmless = rows["prompt_set"] == "tuning-benign"
        return rows[harmless if study.part == "harmless" else ~harmless]

    monkeypatch.setattr(tuning, "candidates", lambda profile: tried)
    monkeypatch.setattr(tuning.run, "run", run)
    (tmp_path / "tiny-tuning").mkdir()
    table = tuning.tune(tiny_profile, tmp_path)
    plain, first, _, third = asked[0]
    assert asked[1] == [plain, first, third]
    assert list(table["asr"].isna()) == [False, True, False]
    assert list(table["chosen"]) == [True, False, True]


def test_safree_is_tried_in_all_that_it_has():
    tries = tuning.safree_tries(["list", "categories"])
    assert len(tries) == tuning.BUDGET
    for name, values in tuning.SAFREE_GRID.items():
        assert len({options[name] for options, _ in tries[2:]} & set(values)) > 1, name
    assert {options["phrases"] for options, _ in tries} == {"list", "categories"}
    kinds = {(options.get("rule"), omega is None) for options, omega in tries}
    assert kinds == {(None, True), ("replaced", True), (None, False)}
    assert tries == tuning.safree_tries(["list", "categories"])


def images_of(settings, retention="retention"):
    """Rows of ten images of each setting on two attacks and harmless prompts."""
    return pd.DataFrame(
        {
            "setting": setting,
            "prompt_set": prompt_set,
            "unsafe": k < round(10 * unsafe),
            "retention": kept if retention == "retention" else float("nan"),
            "clip_score": 0.1 + kept,
            "clip_chance": 0.1,
            "vlm_calls": 0,
            "model_evaluations": 75,
        }
        for setting, unsafe, kept in settings
        for prompt_set, unsafe in (("one", unsafe), ("two", unsafe / 2), ("benign", 0))
        for k in range(10)
    )


@pytest.mark.parametrize("fidelity", ["retention", "clip"])
def test_tuning_chooses_the_safest_that_keeps_what_is_harmless(tiny_profile, fidelity):
    tried = [c for c in tuning.candidates(tiny_profile) if c.name == "static"][:4]
    measured = [(0.0, 0.5), (0.2, 0.77), (0.4, 0.8), (0.6, 0.8)]
    settings = [(setting_of(c.method), *of) for c, of in zip(tried, measured, strict=True)]
    images = images_of([(setting_of(vldnp.CFG()), 0.8, 0.8), *settings], fidelity)
    table = tuning.scored(tried, images, "benign")
    assert list(table["asr-one"]) == pytest.approx([0.0, 0.2, 0.4, 0.6])
    assert list(table["asr"]) == pytest.approx([0.0, 0.15, 0.3, 0.45])
    assert list(table["kept"]) == pytest.approx([0.625, 0.9625, 1, 1], abs=1e-6)
    assert list(table["chosen"]) == [False, True, False, False]
    fields = tuning.as_profile(table)
    assert fields["static_rule"] == "added" and fields["chosen"] == {"static": 3.0}
    shown = tuning.as_text(table)
    assert yaml.safe_load(shown.partition("for the profile:")[2]) == fields


def test_of_equals_the_cheapest_is_chosen_and_of_losers_the_least_harmful():
    table = pd.DataFrame(
        {
            "method": ["vl-dnp"] * 4 + ["static"] * 2,
            "asr": [0.10, 0.10, 0.10, 0.30, 0.1, 0.2],
            "kept": [0.97, 0.97, 0.97, 1.0, 0.8, 0.9],
            "vlm_calls": [25, 10, 10, 1, 0, 0],
            "model_evaluations": [60.0, 62.0, 61.0, 50.0, 75.0, 75.0],
        }
    )
    assert sorted(tuning.choices(table)) == [2, 5]


def test_chosen_strengths_enter_the_comparison():
    profile = SimpleNamespace(
        chosen={"vl-dnp": 8.0, "static": 4.0},
        chosen_omega=lambda name: {"vl-dnp": 8.0, "static": 4.0}[name],
    )
    methods = (
        vldnp.CFG(),
        *(vldnp.Static("knife", w) for w in (2, 4, 8)),
        vldnp.SAFREE("knife"),
        vldnp.SAFREE("knife", "knife", "added", 4),
    )
    found = profile_methods.chosen(profile, methods)
    assert {name: method.omega for name, method in found.items()} == {
        "cfg": None,
        "static": 4,
        "safree": None,
    }
    assert yaml.safe_dump(profile.chosen)
