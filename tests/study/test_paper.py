"""The profile `paper` from end to end, on random weights laid out as the real repositories are.

Other than in the profile are only the models' places, and how much is computed: two steps, two
prompts of each of three sets, small images.
"""

import pandas as pd
import pytest
import tiny_vlms
import tiny_world
import yaml
from tiny import sd_pipeline
from tiny_judges import classifier

from vldnp import __main__ as cli
from vldnp.models import load
from vldnp.study import prompts
from vldnp.study.profile import load_profile
from vldnp.study.prompts import load_prompts, public_sets

PUBLISHED = {  # two rows more than are used, in the published formats
    "coco-100": "case_number,source,prompt,evaluation_seed,coco_id\n"
    "0,coco,a cat on a pizza,1,100\n1,coco,a dog,2,101\n2,coco,a pizza,3,102\n",
    "ring-a-bell-38": ",prompt\n0,blood and skull\n1,a dagger and a knife\n2,skull\n",
    "unlearn-diff": ",case_number,prompt,evaluation_seed,evaluation_guidance\n"
    '0,12,"a dog,\non a cat",42,7\n1,13,pirate,43,8.5\n2,14,cove,44,7\n',
}
SMALL = {"VLDNP": {"omega": [7.5, 15.0], "query_steps": {"front_loaded": 2}}}


@pytest.fixture(scope="module")
def profile(tmp_path_factory):
    """The path of a profile that extends `paper`; its stand-ins are in place."""
    folder = tmp_path_factory.mktemp("paper")
    sd, hub = folder / "stable-diffusion-v1-4", folder / "hub"
    sd_pipeline().save_pretrained(sd)
    for size in ("7B", "3B"):
        tiny_vlms.save("qwen2.5-vl", hub / f"Qwen2.5-VL-{size}-Instruct")
    clip = hub / "vit_large_patch14_clip_224.openai"
    tiny_world.clip(clip)
    judge = folder / "cache" / "models" / "nudenet-v2.onnx"
    judge.parent.mkdir(parents=True)
    classifier(judge)
    vlm = {"max_edge": 448, "max_new_tokens": 64, "batch_size": 8, "answers": "free"}
    path = folder / "mine.yaml"
    own = {"extends": "paper", "model": str(sd), "clip": str(clip), "max_prompts": 2}
    own |= {"vlm": {"name": str(hub / "Qwen2.5-VL-7B-Instruct"), **vlm}}
    own |= {"lighter_vlms": [{"name": str(hub / "Qwen2.5-VL-3B-Instruct"), **vlm}]}
    own |= {"prompt_sets": list(PUBLISHED), "sampling": {"scheduler": "dpm++"}}
    own["sampling"] |= {"num_inference_steps": 2, "height": 32, "width": 32}
    own["methods"] = [
        {entry["kind"]: entry["given"] | SMALL.get(entry["kind"], {})}
        | {key: entry[key] for key in ("name", "chosen") if key in entry}
        for entry in load_profile("paper").methods
    ]
    path.write_text(yaml.safe_dump(own))
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("VLDNP_DATA", raising=False)
        patch.setenv("VLDNP_CACHE", str(folder / "cache"))
        patch.setenv("HF_HUB_OFFLINE", "1")
        here = {"home": "https://example.org"}  # and no address to download from
        free = {name: here | {"seed": 1} for name in public_sets()}
        patch.setattr(prompts, "public_sets", lambda: free)
        (folder / "cache" / "prompts").mkdir()
        for name, text in PUBLISHED.items():
            (folder / "cache" / "prompts" / f"{name}.csv").write_text(text)
        yield path


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:the prompt")
def test_the_grid_runs(profile, tmp_path, capfd):
    options = ["run", "--profile", str(profile), "--out", str(tmp_path), "--workers", "2"]
    assert cli.main(options) == 0, capfd.readouterr().err
    run = tmp_path / "mine"
    table = pd.read_csv(run / "table.csv")
    assert set(table["prompt_set"]) == set(PUBLISHED) and (table["n"] == 2).all()
    methods = {"cfg", "static", "vl-dnp", "safree", "safree-released", "sld-medium", "sld-max"}
    assert set(table["method"]) == methods
    assert table[["asr", "tr", "clip"]].notna().all(axis=None)
    assert table[["retention", "fid"]].isna().all(axis=None)
    images = pd.read_parquet(run / "images.parquet")
    own = images[images["prompt_set"] == "unlearn-diff"]
    published = load_prompts("unlearn-diff").set_index("prompt_id")["guidance_scale"]
    assert (own["guidance_scale"] == own["prompt_id"].map(published)).all(), "the data set's own"
    assert not (own["guidance_scale"] == 7.5).any()
    assert any(images["vlm"].dropna().str.contains("7B"))


def test_a_dry_run_says_what_it_takes_and_where_models_are(profile, capsys, monkeypatch, tmp_path):
    assert cli.main(["run", "--dry-run", "--profile", str(profile)]) == 0
    told = capsys.readouterr().out
    assert f"model {profile.parent}" in told and "78 images" in told
    monkeypatch.setenv("VLDNP_CACHE", str(tmp_path))
    assert cli.main(["run", "--dry-run", "--profile", "paper"]) == 2
    told = capsys.readouterr()
    assert "model sd-1.4: CompVis/stable-diffusion-v1-4\n" in told.out
    assert "save it as" in told.err and told.err.count("\n") == 1


def test_without_its_data_a_profile_says_what_to_fetch(profile, monkeypatch, tmp_path):
    monkeypatch.setenv("VLDNP_CACHE", str(tmp_path))
    with pytest.raises(FileNotFoundError) as error:
        load.load_judge(load_profile(profile).judge)
    assert "\n" not in str(error.value)
    with pytest.raises(FileNotFoundError, match="'coco-100' cannot be downloaded.* save it as "):
        load_prompts("coco-100")
