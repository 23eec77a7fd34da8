from dataclasses import fields, replace
from pathlib import Path

import papermill
import pytest
import yaml
from tiny_models import tiny_vae

import vldnp
from vldnp._files import data_folder
from vldnp.baselines.controls import AnswersNone
from vldnp.concepts import load_concepts
from vldnp.models import load
from vldnp.models.backbone import Preview
from vldnp.models.load import ModelSpec
from vldnp.study.grid import setting_of
from vldnp.study.profile import (
    KINDS,
    Profile,
    chosen_methods,
    dynamic,
    load_profile,
    parameters,
    profile_methods,
    profile_names,
    profile_study,
)
from vldnp.study.prompts import load_prompts, public_sets

NONE = AnswersNone()


def test_a_profile_is_small():
    assert len(fields(Profile)) <= 16


@pytest.mark.parametrize("name", profile_names())
def test_shipped_profiles_name_what_exists(name, monkeypatch):
    monkeypatch.setattr(load, "load_preview", lambda said: Preview(tiny_vae(), str(said), "0"))
    profile = load_profile(name)
    assert profile.name == name
    load_concepts(profile.concepts)
    for prompt_set in profile.prompt_sets:
        if prompt_set not in public_sets():  # which are downloaded
            load_prompts(prompt_set)
    sets = {profile.notebooks.get("safety_set", "implicit"), profile.benign_set}
    assert sets <= set(profile.prompt_sets)
    assert profile.notebooks.keys() <= KINDS.keys()
    methods = chosen_methods(replace(profile, vlm=NONE))
    compared = {"cfg", "static", "vl-dnp", "safree"}
    assert ({"cfg", "summed"} if name == "moji-others" else compared) <= methods.keys()
    if name == "paper-fast":
        said = methods["vl-dnp"].describe()
        assert said["previewed"]["decoder"]["name"] == "taesd" and said["negatives"]["gate"] == 0.98


def test_the_papers_protocol():
    paper = load_profile("paper")
    sampling = {"num_inference_steps": 50, "guidance_scale": 7.5, "scheduler": "dpm++"}
    assert paper.sampling == sampling | {"height": 512, "width": 512, "noise_device": "cuda"}
    method = dynamic(paper, vlm=NONE)
    assert list(method.negatives.query_steps_of(50)) == [5, 6, 7, 9, 12, 16, 21, 27, 34, 42]
    methods = profile_methods(replace(paper, vlm=NONE))
    for name in ("static", "vl-dnp"):
        assert [m.omega for m in methods if m.name == name] == [7.5, 15, 20]
    chosen = chosen_methods(replace(paper, vlm=NONE))
    assert chosen["vl-dnp"].omega == chosen["static"].omega == 15
    assert len(chosen["static"].negatives.prompt.split(", ")) == 17
    assert (paper.model.options["dtype"], paper.vlm.options["dtype"]) == ("float32", "float16")
    assert paper.benign_set == "coco-100" and public_sets()["coco-100"]["prompts"] == 100
    assert {known["seed"] for known in public_sets().values() if "seed" in known} == {1}
    assert paper.vlm.options["max_edge"] == 448 and paper.vlm.options["max_new_tokens"] == 64
    assert not paper.reveal
    concepts = load_concepts(paper.concepts)
    assert concepts.lead == "Nudity, Sexual" and concepts.end == "."
    assert ", ".join(concepts.vocabulary) in concepts.question


def test_the_papers_safree_has_its_phrases_in_place_of_the_empty_prompt():
    chosen = chosen_methods(replace(load_profile("paper"), vlm=NONE))
    for name in ("safree", "safree-released"):
        assert chosen[name].rule.describe() == "replaced" and chosen[name].omega is None
        assert chosen[name].negatives.prompt.startswith("Sexual Acts, ")
    assert chosen["safree"].conditioning.re_attention
    assert not chosen["safree-released"].conditioning.re_attention


def test_the_papers_demonstrations_are_a_recipe_that_loads(tmp_path):
    lines = (data_folder() / "profiles" / "paper.yaml").read_text(encoding="utf-8").splitlines()
    recipe = [line[4:] for line in lines if line.startswith("#   ")]
    (tmp_path / "mine.yaml").write_text("\n".join(recipe))
    shots = load_profile(tmp_path / "mine.yaml").vlm.options["demonstrations"]
    assert len(shots) == 4 and shots[0][0] == str(tmp_path / "bluebird.png")


def profile_of(tmp_path, text: str, name: str = "mine") -> Profile:
    (tmp_path / f"{name}.yaml").write_text(text)
    return load_profile(tmp_path / f"{name}.yaml")


def test_methods_are_constructors_and_arguments(tmp_path):
    profile = profile_of(
        tmp_path,
        """
extends: moji
methods:
  - CFG
  - Static: {negative_prompt: a knife, omega: [2, 4.5], rule: perp-neg}
    name: perp-neg
    chosen: 2
  - VLDNP: {omega: [3, 7], query_steps: {uniform: 4}, lead: something}
  - Summed: {negative_prompts: [a knife, a gun], omega: 9}
""",
    )
    profile = replace(profile, vlm=NONE)
    found = [(method.name, method.omega) for method in profile_methods(profile)]
    assert found[:3] == [("cfg", None), ("perp-neg", 2), ("perp-neg", 4.5)]
    assert found[3:] == [("vl-dnp", 3), ("vl-dnp", 7), ("summed", 9)]
    by_hand = vldnp.VLDNP(NONE, "moji", 7.0, vldnp.uniform(4), lead="something")
    assert setting_of(profile_methods(profile)[4]) == setting_of(by_hand)
    assert setting_of(dynamic(profile)) == setting_of(by_hand)
    assert setting_of(dynamic(profile, 3.0)) == setting_of(profile_methods(profile)[3])
    few = dynamic(profile, query_steps=vldnp.uniform(2))
    assert len(few.negatives.query_steps_of(25)) == 2 and few.omega == 7
    chosen = chosen_methods(profile)
    assert chosen["perp-neg"].omega == 2 and chosen["vl-dnp"].omega == 7
    asked = profile_methods(profile, (5, 6), ["perp-neg", "summed"])
    assert [method.omega for method in asked] == [5, 6, 9]
    study = profile_study(profile, [few], name="few", prompt_sets=["implicit"], max_prompts=5)
    assert (study.name, study.batch_size) == ("few", 32)
    assert study.prompt_sets == ("implicit",) and len(study.prompts("implicit")) == 5
    assert study.sampling["guidance_scale"] == 3.0


def test_a_model_may_bring_options(tmp_path):
    text = "extends: moji\nmodel: {name: x, dtype: float16}\nlighter_vlms: [{name: z}]\n"
    shots = "vlm: {name: y, demonstrations: [{image: shots/a.png, answer: none}]}\n"
    profile = profile_of(tmp_path, text + shots)
    assert profile.model == ModelSpec("x", {"dtype": "float16"}) and str(profile.model) == "x"
    assert profile.vlm.options["demonstrations"] == ((str(tmp_path / "shots/a.png"), "none"),)
    assert profile.lighter_vlms == (ModelSpec("z"),)


def test_a_profile_is_extended_as_seen_from_its_folder(tmp_path):
    profile_of(tmp_path, "extends: moji\nname: base\nbatch_size: 3\n", "base")
    mine = profile_of(tmp_path, "extends: base.yaml\n")
    assert (mine.name, mine.batch_size, mine.concepts) == ("mine", 3, "moji")


def test_unknown_names_are_told_with_the_closest():
    with pytest.raises(ValueError, match="unknown profile 'mojji': did you mean 'moji'"):
        load_profile("mojji")
    with pytest.raises(ValueError, match="unknown prompt set of profile 'paper' 'implicit'"):
        load_profile("paper").prompt_set("implicit")


@pytest.mark.parametrize(
    "said, message",
    [
        ({"extends": "mine.yaml"}, "profile .*mine.yaml extends itself"),
        ({"extends": "other.yaml"}, "mine.yaml extends itself"),
        ({"extends": "nosuch.yaml"}, "no profile .*nosuch.yaml: there is no such file"),
        ({"method": []}, "key in profile mine.yaml 'method': did you mean 'methods'"),
        ({"methods": []}, "methods: it should have at least 1 item"),
        ({"methods": [{"VLDPN": {}}]}, "unknown method 'VLDPN': did you mean 'VLDNP'"),
        ({"methods": [{"name": "x"}]}, "unknown method ''"),
        ({"methods": [3]}, "methods must be constructors such as CFG, with their arguments, not 3"),
        ({"methods": [{"Static": 3}]}, "must have a mapping of arguments for Static, not 3"),
        ({"sampling": {"steps": 3}}, "unknown sampling setting 'steps'"),
        ({"batch_size": True}, "batch_size: it should be a valid integer, not True"),
        ({"batch_size": 0}, "batch_size: it should be greater than or equal to 1, not 0"),
        ({"max_prompts": {"implicit": -3}}, "max_prompts: it should be greater than .* not -3"),
        ({"reveal": "maybe"}, "reveal: it should be a valid boolean"),
        ({"model": 3}, "model must be a name, or a mapping with a name and options, not 3"),
        ({"vlm": {"dtype": "float16"}}, "vlm must be a name, or a mapping with a name"),
        ({"vlm": {"name": "y", "demonstrations": ["a"]}}, "vlm has demonstrations that are no"),
        ({"notebooks": {"safety_set": "implid"}}, "unknown prompt set of profile 'mine' 'implid'"),
        ({"name": "../../x"}, "name must be that of one folder, not '../../x'"),
    ],
)
def test_bad_settings_give_one_line_that_names_the_file(tmp_path, said, message):
    (tmp_path / "other.yaml").write_text("extends: mine.yaml")
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        profile_of(tmp_path, yaml.safe_dump({"extends": "moji"} | said))
    assert "\n" not in str(error.value) and ".yaml" in str(error.value)


def test_bad_arguments_of_a_method_give_one_line(tmp_path):
    profile = profile_of(tmp_path, "extends: moji\nmethods:\n  - Static: {prompt: x}\n")
    with pytest.raises(ValueError, match="profile 'mine': Static: .*argument") as error:
        profile_methods(profile)
    assert "\n" not in str(error.value)


BOMB = "a0: &a0 [x]\n" + "".join(f"a{i + 1}: &a{i + 1} [{f'*a{i}, ' * 10}]\n" for i in range(9))
CONTENT = [b"name: \xff\xfe", b"name: 2026-13-01", b"- a", b"a: [", b"a: " + b"[" * 9999]


@pytest.mark.parametrize("content", [*CONTENT, BOMB.encode()])
def test_what_is_no_profile_gives_one_line(tmp_path, content):
    path = tmp_path / "mine.yaml"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="profile .*mine.yaml (is not|must be)") as error:
        load_profile(path)
    assert "\n" not in str(error.value)


def test_parameters_are_converted():
    moji = load_profile("moji")
    said = {"quick": "false", "reveal": "True", "omegas": "[2, 4]", "max_prompts": "4"}
    found = parameters(moji, **said, omega="1.5", safety_set="implicit", run="../runs/mine")
    assert (found.quick, found.reveal, found.omegas) == (False, True, (2, 4))
    assert (found.max_prompts, found.omega, found.run) == (4, 1.5, "../runs/mine")
    assert parameters(moji, quick=False, images=6, prompt="7").images == 6
    for said in "[2, 4.5]", "2, 4.5", [2, 4.5], (2, 4.5), " [2,4.5] ":
        assert parameters(moji, omegas=said).omegas == (2, 4.5)
    assert parameters(moji, counts="0, 4").counts == (0, 4)
    for said in ["a", "b/c"], "a, b/c", "['a', \"b/c\"]":
        assert parameters(moji, vlms=said).vlms == ("a", "b/c")
    assert parameters(moji, omegas=[]).omegas == parameters(moji, omegas="").omegas == ()


def test_every_parameter_of_the_notebooks_has_a_kind():
    notebooks = Path(__file__).parents[2].glob("notebooks/*.ipynb")
    declared = [set(papermill.inspect_notebook(str(notebook))) for notebook in notebooks]
    assert len(declared) == 10 and set().union(*declared) == KINDS.keys()


@pytest.mark.parametrize(
    "said, message",
    [
        ({"quick": "no"}, "quick must be true or false, not 'no'"),
        ({"images": "four"}, "images must be a whole number, 0 or more, not 'four'"),
        ({"images": 4.5}, "images must be a whole number, 0 or more, not 4.5"),
        ({"images": -1}, "images must be a whole number, 0 or more, not -1"),
        ({"images": True}, "images must be a whole number, 0 or more, not True"),
        ({"omegas": "four"}, "omegas must be a list of numbers, 0 or more"),
        ({"omegas": [True]}, "omegas must be a list of numbers, 0 or more"),
        ({"vlms": [3]}, "vlms must be a list of names, not \\[3\\]"),
        ({"counts": "[1, 4.5]"}, "counts must be a list of whole numbers, 0 or more"),
        ({"images": "[" * 5000}, "images must be a whole number, 0 or more, not '\\[.*\\.\\.\\."),
        ({"omega": "nan"}, "omega must be a number, 0 or more, not 'nan'"),
        ({"omega": "1, 2"}, "omega must be a number, 0 or more, not '1, 2'"),
        ({"prompt": 3}, "prompt must be a text, not 3"),
        ({"benign_set": "bening"}, "unknown prompt set of profile 'moji' 'bening': did you mean"),
        ({"omgas": [1]}, "unknown notebook parameter 'omgas': did you mean 'omega"),
    ],
)
def test_bad_parameters_are_told_in_one_line(said, message):
    with pytest.raises(ValueError, match=message) as error:
        parameters(load_profile("moji"), **said)
    assert "\n" not in str(error.value)


def test_data_lies_where_the_environment_says(tmp_path, monkeypatch):
    (tmp_path / "profiles").mkdir()
    source = Path(data_folder()) / "profiles" / "moji.yaml"
    (tmp_path / "profiles" / "mine.yaml").write_text(source.read_text())
    monkeypatch.setenv("VLDNP_DATA", str(tmp_path))
    assert profile_names() == ["mine"] and load_profile("mine").name == "mine"
    with pytest.raises(FileNotFoundError):
        load.load_judge(load_profile("mine").judge)


def test_a_folder_follows_from_what_is_studied():
    moji = load_profile("moji")
    whole, few = profile_study(moji), profile_study(moji, max_prompts=4)
    assert whole.name == profile_study(moji, None, max_prompts=None).name == "moji"
    one, other = ([dynamic(moji, omega)] for omega in (1.0, 2.0))
    names = [profile_study(moji, m, part="x", prompt_sets=["benign"]).name for m in (one, other)]
    assert len({whole.name, few.name, *names}) == 4 and names[0].startswith("moji-x-")
    assert names[0] == profile_study(moji, one, part="x", prompt_sets=["benign"]).name
