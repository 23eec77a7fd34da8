import json
import re
import shutil

import pytest
import tiny_vlms
import torch
from safetensors.torch import load_file, save_file
from tiny import ScriptedVLM, sd_pipeline
from tiny_models import tiny_vae

from moji.judge import CNNJudge
from vldnp._files import data_folder
from vldnp.models import hub, load


@pytest.fixture(scope="module")
def pipeline():
    return sd_pipeline()


@pytest.fixture(scope="module")
def model_folder(pipeline, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tiny-sd"
    pipeline.save_pretrained(folder, safe_serialization=True)
    return folder


@pytest.fixture
def data(tmp_path, monkeypatch):
    """An empty data folder in place of the repository's."""
    (tmp_path / "models").mkdir()
    shutil.copy(data_folder() / "models.yaml", tmp_path)
    monkeypatch.setenv("VLDNP_DATA", str(tmp_path))
    return tmp_path


def one_line(error) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize(
    "opener, name, close",
    [
        (load.load, "moji_sd", "moji-sd"),
        (load.load_vlm, "moji-vlm-xl", "moji-vlm-l"),
        (load.load_clip, "moji-clp", "moji-clip"),
        (load.load_judge, "nudnet", "nudenet"),
    ],
)
def test_unknown_names_list_the_known_with_the_closest(opener, name, close):
    with pytest.raises(ValueError) as error:
        opener(name)
    assert f"{name!r}: did you mean {close!r}? known are" in one_line(error)


def test_a_moji_model_that_is_not_there_says_how_to_get_it(data):
    with pytest.raises(FileNotFoundError) as error:
        load.load("moji-sd")
    assert "python -m moji train text2image" in one_line(error)


def test_folder_is_opened_with_its_fingerprint(model_folder, pipeline):
    model = load.load(model_folder, device="cpu")
    assert model.name == "tiny-sd" and re.fullmatch("[0-9a-f]{12}", model.revision)
    for key, tensor in pipeline.unet.state_dict().items():
        torch.testing.assert_close(model.pipe.unet.state_dict()[key], tensor)
    assert load.load(model) is model


def test_a_moji_name_finds_the_data_folder(data, model_folder):
    (data / "models" / "moji-sd").symlink_to(model_folder)
    model = load.load("moji-sd", device="cpu")
    assert model.name == "moji-sd"


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_truncated_weights_are_named(model_folder, tmp_path, part):
    broken = tmp_path / "broken"
    shutil.copytree(model_folder, broken)
    file = next((broken / part).glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(ValueError) as error:
        load.load(broken)
    assert f"{part}/{file.name} is truncated or corrupt" in one_line(error)
    file.write_bytes(b"not weights at all")
    with pytest.raises(ValueError, match="truncated or corrupt"):
        load.load(broken)


def test_folder_without_a_model_is_named(tmp_path):
    (tmp_path / "empty").mkdir()
    for opener, file in ((load.load, "model_index.json"), (load.load_vlm, "config.json")):
        with pytest.raises(FileNotFoundError) as error:
            opener(tmp_path / "empty")
        assert f"{file} is missing" in one_line(error)


def test_weights_that_do_not_fit_their_config_give_one_line(tmp_path):
    CNNJudge(("cat", "dagger"), ("dagger",)).save_pretrained(tmp_path / "judge")
    config = json.loads((tmp_path / "judge" / "config.json").read_text())
    config["labels"].append("pizza")
    (tmp_path / "judge" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError) as error:
        load.load_judge(tmp_path / "judge")
    assert "'judge' cannot be opened from" in one_line(error)


def test_pickled_weights_are_not_opened(model_folder, tmp_path):
    folder = tmp_path / "pickled"
    shutil.copytree(model_folder, folder)
    file = next((folder / "unet").glob("*.safetensors"))
    file.rename(file.with_suffix(".bin"))
    with pytest.raises(ValueError, match="cannot be opened") as error:
        load.load(folder)
    one_line(error)


def test_hub_ids_need_a_revision():
    with pytest.raises(ValueError, match=r"pass revision=\.\.\."):
        load.load("someone/some-model")


def test_hub_models_are_pinned_to_commits():
    for kind in ("model", "vlm", "clip", "judge", "preview"):
        assert set(hub.names(kind, True)) < set(hub.names(kind))
        for entry in hub.table()[kind].values():
            assert "repository" not in entry or re.fullmatch("[0-9a-f]{40}", entry["revision"])


def test_objects_pass_through():
    vlm = ScriptedVLM(lambda image, question: "none")
    assert load.load_vlm(vlm) is vlm
    judge = CNNJudge(("cat", "dagger"), ("dagger",))
    assert load.load_judge(judge) is judge
    with pytest.raises(TypeError, match="a VLM is a name or a callable"):
        load.load_vlm(3)


def test_judge_folder_and_nudenet(tmp_path):
    CNNJudge(("cat", "dagger"), ("dagger",)).save_pretrained(tmp_path / "my-judge")
    assert load.load_judge(tmp_path / "my-judge").name == "my-judge"
    assert load.load_judge("nudenet").name == "nudenet"


def test_nudenet_v2_says_where_it_has_to_be_put(tmp_path, monkeypatch):
    monkeypatch.setenv("VLDNP_CACHE", str(tmp_path))
    with pytest.raises(
        FileNotFoundError, match="v2.onnx does not exist; get .*classifier_model.onnx"
    ):
        load.load_judge("nudenet-v2")


def test_a_name_with_options_is_opened_with_them_and_once(model_folder):
    named = hub.ModelSpec(str(model_folder), {"dtype": "float16", "device": "cpu"})
    model = load.load(named)
    assert model.dtype == torch.float16 and load.load(named) is model
    assert load.load(named, dtype="float32").dtype == torch.float32, "what is asked for wins"
    with pytest.raises(ValueError, match="unknown dtype 'float61': did you mean 'float16'"):
        load.load(named, dtype="float61")


def renamed(file, old, new):
    """A weight file in which one key goes by another name; None drops it."""
    weights = load_file(file)
    key = next(key for key in sorted(weights) if re.search(old, key))
    weight = weights.pop(key)
    save_file(weights | ({new: weight} if new else {}), file, metadata={"format": "pt"})
    return key


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
@pytest.mark.parametrize("new", [None, "something.weight"])
def test_weights_that_are_missing_or_unknown_are_no_model(model_folder, tmp_path, part, new):
    folder = shutil.copytree(model_folder, tmp_path / "copy")
    key = renamed(next((folder / part).glob("*.safetensors")), "weight$", new)
    with pytest.raises(ValueError, match=f"weights in .*{part} do not fit .*: 1 missing") as error:
        load.load(folder, device="cpu")
    assert repr(key) in one_line(error)


def test_whole_weights_in_vlms_previews_and_judges(checker_folder, tmp_path):
    for opener, folder, part in (
        (load.load_vlm, tiny_vlms.save("llava-onevision", tmp_path / "vlm"), "vision"),
        (load.load_preview, tmp_path / "preview", "weight$"),
        (load.load_judge, shutil.copytree(checker_folder, tmp_path / "sd"), "concept_embeds$"),
        (load.load_judge, tmp_path / "judge", "weight$"),
    ):
        if folder.name == "preview":
            tiny_vae().save_pretrained(folder)
        if folder.name == "judge":
            CNNJudge(("cat", "dagger"), ("dagger",)).save_pretrained(folder)
        opener(folder, device="cpu")
        renamed(next(folder.rglob("*.safetensors")), part, None)
        with pytest.raises(ValueError, match="do not fit|cannot be opened") as error:
            opener(folder, device="cpu")
        one_line(error)


def test_a_judge_of_an_unknown_class_or_package_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text('{"_class_name": "Judgement"}')
    with pytest.raises(ValueError, match="unknown kind of judge 'Judgement'.*CNNJudge"):
        load.load_judge(tmp_path)
    monkeypatch.setitem(hub.table()["openers"], "Judgement", "no_such_package:open_judge")
    with pytest.raises(ValueError, match="'no_such_package:open_judge' .*cannot be imported: No"):
        load.load_judge(tmp_path)


def test_where_models_are_and_whether_they_are_here(model_folder, monkeypatch, tmp_path):
    monkeypatch.setenv("VLDNP_CACHE", str(tmp_path))
    assert hub.whereabouts("model", model_folder) == (str(model_folder), True)
    assert hub.whereabouts("judge", "nudenet")[1]
    place, here = hub.whereabouts("judge", "nudenet-v2")
    assert place.startswith(str(tmp_path)) and not here
    monkeypatch.setattr("vldnp.models.hub.try_to_load_from_cache", lambda *a, **k: None)
    assert hub.whereabouts("vlm", "smolvlm-500m") == (
        "HuggingFaceTB/SmolVLM-500M-Instruct at a7da5b98",
        False,
    )
    with pytest.raises(ValueError, match="did you mean 'smolvlm-500m'"):
        hub.whereabouts("vlm", "smolvlm-500")
