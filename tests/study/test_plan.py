"""The plan of a profile against what a run of it spends, and against counts by hand."""

from dataclasses import replace

import nbformat
import pytest
import torch
import yaml

from vldnp.__main__ import main
from vldnp.baselines.controls import AnswersNone, closed_loop
from vldnp.baselines.methods import SAFREE, SLD
from vldnp.methods import CFG, VLDNP, Static
from vldnp.models import load
from vldnp.sampler import sample
from vldnp.study import grid, plan, profile_methods, random_models
from vldnp.study.profile import load_profile


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    """The project's own data folder, and nothing fetched."""
    monkeypatch.delenv("VLDNP_DATA", raising=False)
    monkeypatch.setenv("VLDNP_CACHE", str(tmp_path / "cache"))
    return tmp_path


def always(images, question):
    return ["a dagger"] * len(images)


@pytest.mark.filterwarnings("ignore:the prompt")
def test_bounds_are_reached_by_a_vlm_that_always_names_something(tiny_profile):
    model = load.load(tiny_profile.model)
    for method in (
        CFG(),
        Static("a dagger", 2),
        Static("", 2),
        VLDNP(always, "moji", 2, (2, 4)),
        VLDNP(always, "moji", 2, (0, 5)),
        SAFREE("dagger", re_attention=False),
        SLD("dagger", "max"),
    ):
        out = sample(model, "a cat", method, num_inference_steps=6, progress=False)
        assert plan.evaluations(method, 6) == out.trace.model_evaluations[0], method.name
    looking = VLDNP(always, "moji", 2, (2, 4))  # ahead: four steps and two, which no trace counts
    assert plan.evaluations(closed_loop(looking), 6) == plan.evaluations(looking, 6) + 8 + 4


def test_the_grid_is_that_of_the_study(tiny_profile):
    counted = plan.grid(tiny_profile)
    main_grid = counted[counted["study"] == "main grid"]
    cells = grid.cells(
        profile_methods.profile_study(replace(tiny_profile, vlm=AnswersNone())),
        load.load(tiny_profile.model),
    )
    assert main_grid["images"].sum() == len(cells)
    asked = main_grid[main_grid["method"] == "vl-dnp"]
    assert (asked["vlm_calls"] == 2 * asked["images"]).all()
    named = ["04_query_schedule", "05_vlm_size", "05_vlm_size, dial", "06_guidance_rule", "10_fast"]
    assert list(counted["study"].unique()) == ["main grid", "07, lighter VLMs", *named]


def test_ablations_are_counted_as_the_notebooks_say(empty_cache, tmp_path):
    found = plan.ablations(replace(load_profile("moji"), vlm=AnswersNone("its own")))
    lighter = len(load_profile("moji").lighter_vlms)
    # Plain CFG and every step are in three curves, and four counts have three spacings; plain CFG,
    # the VLMs and four controls; six rules, static and dynamic, and two update_policies; two
    # recalls, two precisions and two counts, and the fixed prompt; 12 with one lever or none, and
    # two combinations.
    counts = {"query-schedule": 2 + 4 * 3, "vlm-size": 6 + lighter, "guidance-rule": 6 * 2 + 2}
    counts |= {"dial": 2 * 2 * 2 + 1, "fast": 12 + 2}
    assert {study.part: len(study.methods) for study in found.values()} == counts

    cells = [
        nbformat.v4.new_code_cell("counts = [1]\nn = 0", metadata={"tags": ["parameters"]}),
        nbformat.v4.new_code_cell("raise SystemExit"),
        nbformat.v4.new_code_cell(
            "ablation = sweep(settings, 'mine', {'queries': counts}, max_prompts=3)",
            metadata={"tags": ["sweep"]},
        ),
    ]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "00_mine.ipynb")
    own = replace(load_profile("moji"), notebooks={"counts": [2, 3, 4]})
    (study,) = plan.ablations(replace(own, vlm=AnswersNone()), tmp_path).values()
    steps = [method.negatives.query_steps_of(25) for method in study.methods]
    assert list(map(len, steps)) == [2, 3, 4] and study.max_prompts == 3


def test_models_that_are_here_are_timed(tiny_profile, capsys):
    assert main(["plan", "--profile", "tiny"]) == 0
    told = capsys.readouterr().out
    assert "with the profile's own models" in told and "to be fetched" not in told
    rates = plan.calibrated(tiny_profile)
    assert min(rates.evaluation, rates.vlm_call, rates.decode) > 0


def test_nothing_is_fetched_for_the_papers_plan(empty_cache, capsys, monkeypatch):
    def refused(*args, **kwargs):
        raise AssertionError("the plan went to the network")

    monkeypatch.setattr("socket.socket.connect", refused)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["plan", "--profile", "paper"]) == 0
    told = capsys.readouterr().out
    assert "1.07 G parameters" in told and "8.29 G parameters" in told
    assert "100 of 100" in told and "python -m vldnp data fetch mma" in told
    assert "an estimate, not timed" in told and "40 TFLOP/s" in told
    assert not (empty_cache / "cache").exists()
    counted = plan.grid(load_profile("paper"))
    cfg = counted[(counted["method"] == "cfg") & (counted["study"] == "main grid")]
    assert cfg["images"].sum() == 100 + 3 * 95 + 151 + 142 + 1000
    assert (cfg["evaluations"] == 100 * cfg["images"]).all()
    asked = counted[(counted["method"] == "vl-dnp") & (counted["study"] == "main grid")]
    assert (asked["evaluations"] == 145 * asked["images"]).all()  # a third one from step 5 on
    assert (asked["vlm_calls"] == 10 * asked["images"]).all()


def test_the_light_profiles_weights_leave_room_on_8_gb(empty_cache):
    assert 3e9 < plan.models(load_profile("paper-lite"))["loaded"].sum() < 5e9


def test_operations_are_as_many_as_counted(empty_cache):
    from torch.utils.flop_counter import FlopCounterMode

    said, parts = (
        random_models.known()["sd-1.4"]["operations"],
        random_models.build("sd-1.4", "meta"),
    )
    with torch.device("meta"), torch.no_grad():
        latents, t, cond = torch.zeros(1, 4, 64, 64), torch.zeros(1), torch.zeros(1, 77, 768)
        with FlopCounterMode(display=False) as evaluation:
            parts["unet"](latents, t, encoder_hidden_states=cond)
        with FlopCounterMode(display=False) as decode:
            parts["vae"].decode(latents)
    assert said["evaluation"] == pytest.approx(evaluation.get_total_flops(), rel=1e-3)
    assert said["decode"] == pytest.approx(decode.get_total_flops(), rel=1e-3)
    # 339 G multiplications and additions in convolutions and projections (arXiv 2305.15798, table
    # 1), two operations each; attention's own products come on top.
    assert 0.68e12 < said["evaluation"] < 0.85e12
    rates = plan.reckoned(load_profile("paper"))
    assert rates.evaluation * plan.FLOP_RATE == pytest.approx(said["evaluation"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vlm": "qwen2.5-vl-8b"}, "unknown vlm 'qwen2.5-vl-8b': did you mean 'qwen2.5-vl-7b'"),
        ({"model": "sdxl"}, "the shapes of the model 'sdxl' are not in"),
        (
            dict.fromkeys(["safety_set", "benign_set"], "coko") | {"prompt_sets": ["coko"]},
            "unknown prompt set 'coko': did you mean 'coco'",
        ),
        ({"prompt_sets": ["ring-a-bell-16"]}, "unknown prompt set of profile 'mine'"),
    ],
)
def test_bad_profiles_are_one_line(empty_cache, capsys, monkeypatch, changes, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    path = empty_cache / "mine.yaml"
    path.write_text(yaml.safe_dump({"extends": "paper", **changes}))
    assert main(["plan", "--profile", str(path)]) == 2
    told = capsys.readouterr().err
    assert message in told and told.count("\n") == 1
