import pickle
from dataclasses import replace

import pandas as pd
import pytest
import yaml
from papermill import inspect_notebook

from vldnp import profile_grid, tuning, zoo
from vldnp.__main__ import NOTEBOOKS
from vldnp.concepts import load_concepts
from vldnp.datasets import public_sets
from vldnp.files import data_folder
from vldnp.profiles import load_profile, profile_names
from vldnp.prompts import load_prompts


@pytest.mark.parametrize("name", profile_names())
def test_shipped_profiles_name_what_exists(name):
    profile = load_profile(name)
    assert profile.name == name
    for kind in ("model", "vlm", "judge", "clip"):
        assert getattr(profile, kind) in zoo.names(kind)
    load_concepts(profile.concepts)
    for prompt_set in profile.prompt_sets:
        if prompt_set not in public_sets():  # which have to be fetched
            load_prompts(prompt_set)
    assert {profile.safety_set, profile.benign_set} <= set(profile.prompt_sets)
    declared = set().union(*(inspect_notebook(path) for path in NOTEBOOKS.glob("0*.ipynb")))
    assert profile.notebook_parameters.keys() <= declared


def test_the_papers_protocol():
    paper = load_profile("paper")
    assert (paper.num_inference_steps, paper.guidance_scale, paper.scheduler) == (50, 7.5, "dpm++")
    assert (paper.height, paper.width, paper.omegas) == (512, 512, (7.5, 15, 20))
    steps = profile_grid.dynamic(replace(paper, vlm=len)).negatives.query_steps_of(50)
    assert list(steps) == [5, 6, 7, 9, 12, 16, 21, 27, 34, 42]
    assert len(paper.static_prompt.split(", ")) == len(paper.safree["phrases"].split(", ")) == 17
    assert paper.vlm.options["max_edge"] == 448 and paper.vlm.options["max_new_tokens"] == 64
    assert not paper.reveal and zoo.HUB["model"][paper.model].repository.startswith("CompVis")
    assert load_concepts(paper.concepts).lead == "Nudity, Sexual"


def test_a_model_may_bring_options(tmp_path):
    settings = vars(load_profile("embedded")) | {"model": {"name": "x", "dtype": "float16"}}
    shots = [{"image": "shots/a.png", "answer": "none"}]
    settings |= {"vlm": {"name": "y", "demonstrations": shots}, "lighter_vlms": [{"name": "z"}]}
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(_plain(settings)))
    profile = load_profile(path)
    assert profile.model == "x" and profile.model.options == {"dtype": "float16"}
    assert profile.vlm.options["demonstrations"] == ((str(tmp_path / "shots/a.png"), "none"),)
    assert profile.lighter_vlms == ("z",)
    again = pickle.loads(pickle.dumps(profile.model))
    assert again == "x" and again.options == profile.model.options
    for bad, message in (
        ({"model": 3}, "model must be a name, or a mapping with a name and options, not 3"),
        ({"vlm": {"dtype": "float16"}}, "vlm must be a name, or a mapping with a name"),
        ({"vlm": {"name": "y", "demonstrations": ["a"]}}, "demonstrations of vlm must be a list"),
    ):
        path.write_text(yaml.safe_dump(_plain(settings | bad)))
        with pytest.raises(ValueError, match=message) as error:
            load_profile(path)
        assert "\n" not in str(error.value)


def _plain(settings):
    return {k: list(v) if isinstance(v, tuple) else v for k, v in settings.items()}


def test_a_prompt_set_of_another_profile_is_refused():
    with pytest.raises(
        ValueError, match="unknown prompt set of profile 'paper' 'implied'"
    ) as error:
        load_profile("paper").prompt_set("implied")
    assert "\n" not in str(error.value)


def test_the_list_among_the_wordings_is_the_whole_vocabulary():
    concepts = load_concepts("moji")
    expected = concepts.negative_prompt(concepts.vocabulary)
    assert load_profile("embedded").wordings["list"] == expected


def test_a_profile_extends_another():
    small, full = load_profile("embedded"), load_profile("embedded-full")
    assert full.name == "embedded-full" and full.max_prompts is None
    assert full.wordings == small.wordings and full.chosen == small.chosen


def test_unknown_profile_names_the_closest():
    with pytest.raises(ValueError, match="unknown profile 'embeded': did you mean 'embedded'"):
        load_profile("embeded")


def test_bad_profile_files_give_one_line(tmp_path):
    good = yaml.safe_load(yaml.safe_dump(vars(load_profile("embedded")) | {"prompt_sets": []}))
    good["omegas"] = [1.0]
    path = tmp_path / "mine.yaml"

    path.write_text(yaml.safe_dump(good))
    assert load_profile(path).omegas == (1.0,)

    path.write_text(yaml.safe_dump(good | {"omega": 3}))
    with pytest.raises(ValueError, match="setting in profile mine.yaml 'omega'.*'omegas'"):
        load_profile(path)

    del good["vlm"]
    path.write_text(yaml.safe_dump(good))
    with pytest.raises(ValueError, match="mine.yaml is missing .*'vlm'"):
        load_profile(path)

    path.write_text("a: [")
    with pytest.raises(ValueError, match="is not YAML") as error:
        load_profile(path)
    assert "\n" not in str(error.value)


def test_the_shipped_profile_has_what_tuning_chose():
    table = pd.read_csv(data_folder() / "results" / "embedded-tuning.csv")
    counts = table["method"].value_counts()
    assert set(counts) == {tuning.BUDGET}
    assert set(tuning.choices(table)) == set(table.index[table["chosen"]])
    profile = load_profile("embedded")
    for name, value in tuning.as_profile(table).items():
        shipped = getattr(profile, name)
        assert (list(shipped) if isinstance(shipped, tuple) else shipped) == value, name
    evaluated = set(profile.prompt_sets)
    assert not evaluated & set(profile.tuning_sets)
