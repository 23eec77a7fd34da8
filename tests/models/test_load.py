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
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tiny-sd"
    sd_pipeline().save_pretrained(folder, safe_serialization=True)
    return folder


def judge():
    return CNNJudge(("cat", "dagger"), ("dagger",))


def one_line(error) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    "opener, name, message",
    [
        (load.load, "moji_sd", "'moji_sd': did you mean 'moji-sd'\\? known are"),
        (load.load_vlm, "moji-vlm-xl", "did you mean 'moji-vlm-l'"),
        (load.load_clip, "moji-clp", "did you mean 'moji-clip'"),
        (load.load_judge, "nudnet", "did you mean 'nudenet'"),
        (load.load_preview, "taes", "unknown preview 'taes': did you mean 'taesd'"),
        (load.load_preview, "someone/some-vae", "preview 'someone/some-vae' .* needs a commit"),
        (load.load, "someone/some-model", r"pass revision=\.\.\."),
    ],
)
def test_names_that_are_none(opener, name, message):
    with pytest.raises(ValueError, match=message) as error:
        opener(name)
    one_line(error)


def test_a_name_is_a_folder_of_the_data_or_says_how_to_get_it(model_folder, tmp_path, monkeypatch):
    for part in ("models", "profiles", "concepts", "prompts"):
        (tmp_path / part).mkdir()
    shutil.copy(data_folder() / "models.yaml", tmp_path)
    monkeypatch.setenv("VLDNP_DATA", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="python -m moji train text2image"):
        load.load("moji-sd")
    (tmp_path / "models" / "moji-sd").symlink_to(model_folder)
    assert load.load("moji-sd", device="cpu").name == "moji-sd"
    monkeypatch.setenv("VLDNP_CACHE", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="get .*classifier_model.onnx and save it as .*v2"):
        load.load_judge("nudenet-v2")


def test_folder_is_opened_with_its_fingerprint(model_folder):
    model = load.load(model_folder, device="cpu")
    assert model.name == "tiny-sd" and re.fullmatch("[0-9a-f]{12}", model.revision)
    for key, tensor in sd_pipeline().unet.state_dict().items():
        torch.testing.assert_close(model.pipe.unet.state_dict()[key], tensor)
    assert load.load(model) is model


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_truncated_weights_are_named(model_folder, tmp_path, part):
    broken = shutil.copytree(model_folder, tmp_path / "broken")
    file = next((broken / part).glob("*.safetensors"))
    for content in (file.read_bytes()[:-10], b"not weights at all"):
        file.write_bytes(content)
        message = f"{part}/{file.name} is truncated or corrupt"
        with pytest.raises(ValueError, match=message) as error:
            load.load(broken)
        one_line(error)


def test_folders_that_hold_no_model(tmp_path, model_folder):
    for opener, file in (
        *((load.load, "model_index.json"), (load.load_vlm, "config.json")),
        *((load.load_preview, "config.json"), (load.load_clip, "open_clip_config.json")),
        (load.load_judge, "config.json"),
    ):
        with pytest.raises((FileNotFoundError, OSError), match=file):
            opener(tmp_path)
    judge().save_pretrained(tmp_path / "judge")
    config = json.loads((tmp_path / "judge" / "config.json").read_text())
    config["labels"].append("pizza")
    (tmp_path / "judge" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="'judge' cannot be opened from") as error:
        load.load_judge(tmp_path / "judge")
    one_line(error)
    folder = shutil.copytree(model_folder, tmp_path / "pickled")
    file = next((folder / "unet").glob("*.safetensors"))
    file.rename(file.with_suffix(".bin"))
    with pytest.raises(ValueError, match="cannot be opened") as error:
        load.load(folder)
    one_line(error)
    (tmp_path / "config.json").write_text('{"_class_name": "Judgement"}')
    with pytest.raises(ValueError, match="unknown kind of judge 'Judgement'.*CNNJudge"):
        load.load_judge(tmp_path)


def test_hub_models_are_pinned_to_commits():
    for kind in ("model", "vlm", "clip", "judge", "preview"):
        for entry in hub.table()[kind].values():
            assert "repository" not in entry or re.fullmatch("[0-9a-f]{40}", entry["revision"])


def test_objects_pass_through():
    vlm, judged = ScriptedVLM(lambda image, question: "none"), judge()
    assert load.load_vlm(vlm) is vlm and load.load_judge(judged) is judged
    with pytest.raises(TypeError, match="a VLM is a name or a callable"):
        load.load_vlm(3)


def test_what_is_opened_says_how_another_process_opens_it_too(tmp_path):
    tiny_vae().save_pretrained(tmp_path / "tiny-vae")
    preview = load.load_preview(tmp_path / "tiny-vae", device="cpu")
    latents = torch.randn(2, 4, 8, 8)
    with torch.no_grad():
        shown = (tiny_vae().decode(latents).sample / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(preview.decode(latents), shown)
    said = {"name": "tiny-vae", "revision": preview.revision, "dtype": "torch.float32"}
    assert preview.describe() == said and len(preview.revision) == 12
    name, source, args, options = preview.opened_as
    again = getattr(load, name)(source, *args, **options)
    assert torch.equal(again.decode(latents), preview.decode(latents))
    assert load.load_preview(preview) is preview


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


def test_whole_weights_in_vlms_previews_clips_and_judges(clip_folder, tmp_path):
    tiny_vae().save_pretrained(tmp_path / "preview")
    judge().save_pretrained(tmp_path / "judge")
    for opener, folder, part in (
        (load.load_vlm, tiny_vlms.save("llava-onevision", tmp_path / "vlm"), "vision"),
        (load.load_preview, tmp_path / "preview", "weight$"),
        (load.load_clip, shutil.copytree(clip_folder, tmp_path / "clip"), "visual.*weight$"),
        (load.load_judge, tmp_path / "judge", "weight$"),
    ):
        opener(folder, device="cpu")
        key = renamed(next(folder.rglob("*.safetensors")), part, None)
        with pytest.raises(ValueError, match="do not fit|cannot be opened") as error:
            opener(folder, device="cpu")
        assert key.split(".")[-2] in one_line(error)
