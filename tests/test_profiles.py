import pandas as pd
import pytest
import yaml

from vldnp import tuning, zoo
from vldnp.concepts import load_concepts
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
        load_prompts(prompt_set)


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
