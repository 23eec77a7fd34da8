from dataclasses import replace

import pandas as pd
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from papermill import inspect_notebook

from vldnp._files import data_folder
from vldnp.baselines.controls import AnswersNone
from vldnp.concepts import load_concepts
from vldnp.models import hub
from vldnp.study import profile_methods, sweep, tuning
from vldnp.study.profile import load_profile, numbers, profile_names
from vldnp.study.prompts import load_prompts
from vldnp.study.public import public_sets
from vldnp.study.reproduce import NOTEBOOKS, notebooks_in


@pytest.mark.parametrize("name", profile_names())
def test_shipped_profiles_name_what_exists(name):
    profile = load_profile(name)
    assert profile.name == name
    for kind in ("model", "vlm", "judge", "clip"):
        assert str(getattr(profile, kind)) in hub.names(kind)
    assert str(profile.preview) in hub.names("preview")
    load_concepts(profile.concepts)
    for prompt_set in profile.prompt_sets:
        if prompt_set not in public_sets():  # which have to be fetched
            load_prompts(prompt_set)
    assert {profile.safety_set, profile.benign_set} <= set(profile.prompt_sets)
    declared = set().union(*(inspect_notebook(path) for path in notebooks_in(NOTEBOOKS)))
    assert profile.notebook_parameters.keys() <= declared


def test_the_papers_protocol():
    paper = load_profile("paper")
    assert (paper.num_inference_steps, paper.guidance_scale, paper.scheduler) == (50, 7.5, "dpm++")
    assert (paper.height, paper.width, paper.omegas) == (512, 512, (7.5, 15, 20))
    steps = profile_methods.dynamic(replace(paper, vlm=len)).negatives.query_steps_of(50)
    assert list(steps) == [5, 6, 7, 9, 12, 16, 21, 27, 34, 42]
    assert len(paper.static_prompt.split(", ")) == len(paper.safree["phrases"].split(", ")) == 17
    assert paper.chosen_omega("vl-dnp") == paper.chosen_omega("static") == 15
    assert paper.noise_device == "cuda" and paper.sampling["noise_device"] == "cuda"
    assert (paper.model.options["dtype"], paper.vlm.options["dtype"]) == ("float32", "float16")
    assert paper.benign_set == "coco-100" and public_sets()["coco-100"]["prompts"] == 100
    assert {known["seed"] for known in public_sets().values() if "seed" in known} == {1}
    assert paper.vlm.options["max_edge"] == 448 and paper.vlm.options["max_new_tokens"] == 64
    assert not paper.reveal and hub.find("model", str(paper.model)).location.startswith("CompVis")
    concepts = load_concepts(paper.concepts)
    assert concepts.lead == "Nudity, Sexual" and concepts.end == "."
    question = "Which of the following bare human body parts can you spot in the image?"
    assert concepts.question.startswith(f'{question} "female genitalia, buttocks, ')
    assert ", ".join(concepts.vocabulary) in concepts.question


def test_the_papers_safree_has_its_phrases_in_place_of_the_empty_prompt():
    found = profile_methods.profile_methods("paper", names=["safree"])
    plain = {method.name: method for method in found if method.omega is None}
    assert set(plain) == {"safree", "safree-released"}
    for method in plain.values():
        assert method.rule == "replaced" and method.negatives.prompt.startswith("Sexual Acts, ")
    assert plain["safree"].conditioning.re_attention
    assert not plain["safree-released"].conditioning.re_attention
    swept = [method for method in found if method.omega is not None]
    assert {(m.name, m.rule) for m in swept} == {("safree", "added")} and len(swept) == 3


def test_the_papers_demonstrations_are_a_recipe_that_loads(tmp_path):
    lines = (data_folder() / "profiles" / "paper.yaml").read_text(encoding="utf-8").splitlines()
    recipe = [line[4:] for line in lines if line.startswith("#   ")]
    path = tmp_path / "mine.yaml"
    path.write_text("\n".join(recipe))
    shots = load_profile(path).vlm.options["demonstrations"]
    assert len(shots) == 4 and shots[0][0] == str(tmp_path / "bluebird.png")
    found = [load_concepts("nudity").parse(answer) for _, answer in shots]
    assert found[0] == found[3] == ()
    assert {"female breast", "belly", "feet"} <= set(found[1])
    assert {"male breast", "armpits", "male genitalia", "feet"} <= set(found[2])


def test_a_model_may_bring_options(tmp_path):
    settings = vars(load_profile("moji")) | {"model": {"name": "x", "dtype": "float16"}}
    shots = [{"image": "shots/a.png", "answer": "none"}]
    settings |= {"vlm": {"name": "y", "demonstrations": shots}, "lighter_vlms": [{"name": "z"}]}
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(_plain(settings)))
    profile = load_profile(path)
    assert profile.model == hub.ModelSpec("x", {"dtype": "float16"}) and str(profile.model) == "x"
    assert profile.vlm.options["demonstrations"] == ((str(tmp_path / "shots/a.png"), "none"),)
    assert profile.lighter_vlms == (hub.ModelSpec("z"),)
    for bad, message in (
        ({"model": 3}, "model must be a name, or a mapping with a name and options, not 3"),
        ({"vlm": {"dtype": "float16"}}, "vlm must be a name, or a mapping with a name"),
        (
            {"vlm": {"name": "y", "demonstrations": ["a"]}},
            "vlm has demonstrations that are no list of map",
        ),
    ):
        path.write_text(yaml.safe_dump(_plain(settings | bad)))
        with pytest.raises(ValueError, match=message) as error:
            load_profile(path)
        assert "\n" not in str(error.value)


def _plain(settings):
    """As a file has them."""

    def plain(value):
        if isinstance(value, tuple):
            return [plain(entry) for entry in value]
        return str(value) if isinstance(value, hub.ModelSpec) else value

    return {name: plain(value) for name, value in settings.items()}


def test_a_prompt_set_of_another_profile_is_refused():
    with pytest.raises(
        ValueError, match="unknown prompt set of profile 'paper' 'implicit'"
    ) as error:
        load_profile("paper").prompt_set("implicit")
    assert "\n" not in str(error.value)


def test_the_list_among_the_wordings_is_the_whole_vocabulary():
    concepts = load_concepts("moji")
    expected = concepts.negative_prompt(concepts.vocabulary)
    assert load_profile("moji").wordings["list"] == expected


def test_variants_are_compared_beside_the_methods_they_vary():
    profile = load_profile("moji-full")
    found = profile_methods.profile_methods(profile, [2.0, 3.0], names=["static", "safree"])
    listed, released = (
        [method for method in found if method.name == name]
        for name in ("static-list", "safree-released")
    )
    assert [(m.omega, m.negatives.prompt) for m in listed] == [(6.7, profile.wordings["list"])]
    assert [m.omega for m in found if m.name in ("static", "safree")] == [2, 3, None, 2, 3]
    (released,) = released
    assert released.negatives.prompt == profile.wordings["categories"]
    assert released.rule == "replaced" and released.conditioning.alpha == profile.safree["alpha"]
    # Added at a strength is SAFREE's negative prompt, where it has one, and not its phrases.
    added = [m.negatives.prompt for m in found if m.name == "safree" and m.omega]
    assert set(added) == {"something forbidden"}


def test_each_method_has_its_chosen_strength_besides():
    chosen = {"static": 9.5, "vl-dnp": 4.0}
    profile = replace(load_profile("moji"), omegas=(4.0, 8.0), chosen=chosen, vlm=len)
    found = profile_methods.profile_methods(profile, names=["static", "vl-dnp", "safree"])
    strengths = [
        [m.omega for m in found if m.name == name] for name in ("static", "vl-dnp", "safree")
    ]
    assert strengths == [[4, 8, 9.5], [4, 8], [None, 4, 8]]
    asked = profile_methods.profile_methods(profile, [5.0], names=["static"])
    asked = [method.omega for method in asked if method.name == "static"]
    assert asked == [5], "but what is asked for is what there is"


def test_a_profile_extends_another():
    small, full = load_profile("moji"), load_profile("moji-full")
    assert full.name == "moji-full" and full.max_prompts is None
    assert full.wordings == small.wordings and full.batch_size == small.batch_size


def test_unknown_profile_names_the_closest():
    with pytest.raises(ValueError, match="unknown profile 'mojji': did you mean 'moji'"):
        load_profile("mojji")


def test_bad_profile_files_give_one_line(tmp_path):
    good = _plain(vars(load_profile("moji"))) | {"omegas": [1.0]}
    path = tmp_path / "mine.yaml"

    path.write_text(yaml.safe_dump(good))
    assert load_profile(path).omegas == (1.0,)

    path.write_text(yaml.safe_dump(good | {"omega": 3}))
    with pytest.raises(ValueError, match="key in profile mine.yaml 'omega'.*'omegas'"):
        load_profile(path)

    del good["vlm"]
    path.write_text(yaml.safe_dump(good))
    with pytest.raises(ValueError, match="mine.yaml is missing .*'vlm'"):
        load_profile(path)

    path.write_text("a: [")
    with pytest.raises(ValueError, match="is not YAML") as error:
        load_profile(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "said, message",
    [
        ({"extends": "mine.yaml"}, "profile .*mine.yaml extends itself"),
        ({"extends": "other.yaml"}, "mine.yaml extends itself"),
        ({"extends": ["moji"]}, "extends must be a name or a YAML file, not"),
        ({"extends": "nosuch.yaml"}, "no profile .*nosuch.yaml: there is no such file"),
        ({"omegas": []}, "omegas: it should have at least 1 item"),
        ({"omegas": 8}, "omegas: it should be a valid list, not 8"),
        ({"omegas": ["8"]}, "omegas: it should be a valid number, not '8'"),
        ({"omegas": [-1]}, "omegas: it should be greater than or equal to 0, not -1"),
        ({"schedule": "front"}, "schedule: it should be 'front_loaded', 'uniform' or 'late', not"),
        ({"batch_size": True}, "batch_size: it should be a valid integer, not True"),
        ({"batch_size": 0}, "batch_size: it should be greater than or equal to 1, not 0"),
        ({"queries": 2.5}, "queries: it should be a valid integer"),
        ({"guidance_scale": float("nan")}, "guidance_scale: it should be a finite number"),
        ({"max_prompts": {"implicit": -3}}, "max_prompts: it should be greater than .* not -3"),
        ({"wordings": ["a"]}, "wordings: it should be a valid mapping"),
        ({"sld_strengths": ["strongest"]}, "sld_strengths: it should be 'weak', 'medium'"),
        ({"reveal": "maybe"}, "reveal: it should be a valid boolean"),
        ({"safety_set": "implid"}, "unknown prompt set of profile 'mine' 'implid': did you mean"),
        ({"benign_set": "bening"}, "unknown prompt set of profile 'mine' 'bening': did you mean"),
    ],
)
def test_bad_settings_give_one_line_that_names_the_file(tmp_path, said, message):
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({"extends": "moji"} | said))
    (tmp_path / "other.yaml").write_text("extends: mine.yaml")
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        load_profile(path)
    assert "\n" not in str(error.value) and ".yaml" in str(error.value)


@pytest.mark.parametrize("content", [b"name: \xff\xfe", b"name: 2026-13-01", b"- a"])
def test_what_is_no_profile_gives_one_line(tmp_path, content):
    path = tmp_path / "mine.yaml"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="profile .*mine.yaml (is not|must be)") as error:
        load_profile(path)
    assert "\n" not in str(error.value)


def test_a_profile_is_extended_as_seen_from_its_folder(tmp_path):
    (tmp_path / "base.yaml").write_text("extends: moji\nname: base\nqueries: 3\n")
    (tmp_path / "mine.yaml").write_text("extends: base.yaml\n")
    mine = load_profile(tmp_path / "mine.yaml")
    assert (mine.name, mine.queries) == ("mine", 3)


@pytest.mark.parametrize("said", ["[2, 4.5]", "2, 4.5", [2, 4.5], (2, 4.5), " [2,4.5] "])
def test_numbers_are_read_as_papermill_passes_them(said):
    assert numbers(said) == (2, 4.5)
    strengths = profile_methods.profile_methods("moji", said, names=["static"])
    assert [method.omega for method in strengths if method.name == "static"] == [2, 4.5]


@given(st.lists(st.integers(0, 99) | st.floats(0, 99)))
def test_lists_of_numbers_survive_being_text(values):
    assert numbers(str(values)) == numbers(values) == tuple(values)


@given(st.text())
def test_any_text_is_numbers_or_one_line(text):
    try:
        assert all(number >= 0 for number in numbers(text, "omegas"))
    except ValueError as error:
        assert str(error).startswith("omegas must be a list of numbers") and "\n" not in str(error)


@pytest.mark.parametrize("said", [None, [-1], [True], "[a]", "[2", ".nan", [[1]], {1: 2}])
def test_what_is_no_list_of_numbers_is_said(said):
    with pytest.raises(ValueError, match="omegas must be a list of numbers, 0 or more, such as"):
        numbers(said, "omegas")


def test_counts_of_queries_may_be_text():
    settings = replace(load_profile("moji"), vlm=AnswersNone())
    found = sweep.sweep(settings, "counts", {"queries": "[1, 2]"}, prompt_sets=["implicit"])
    assert set(found.factors["queries"]) == {1, 2}


@pytest.mark.parametrize(
    ("name", "tuned"),
    [("moji", "moji-tuning-main/tuning.csv"), ("moji-full", "moji-tuning-*/tuning.csv")],
)
def test_the_shipped_profile_has_what_tuning_chose(name, tuned):
    files = sorted((data_folder() / "results").glob(tuned))
    table = pd.concat(map(pd.read_csv, files), ignore_index=True)
    counts = table["method"].value_counts()
    assert counts.nunique() == 1, "each method had as many tries as the others"
    assert table[table["chosen"]]["method"].is_unique
    profile = load_profile(name)
    for name, value in tuning.as_profile(table).items():
        shipped = getattr(profile, name)
        assert (list(shipped) if isinstance(shipped, tuple) else shipped) == value, name
    evaluated = set(profile.prompt_sets)
    assert not evaluated & set(profile.tuning_sets)
