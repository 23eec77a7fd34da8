"""The explorer's runs, without a browser: what is shown, remembered and written as a command."""

import re
import shlex
from pathlib import Path

import papermill
import pytest
from tiny_judges import EverythingUnsafe

import vldnp
from vldnp.show.explorer import Explorer
from vldnp.study.profile import dynamic, load_profile

ROOT = Path(__file__).parents[2]
NASTY = '<img src=x onerror=alert(1)> a cat\'s "hat"; rm -rf $HOME `ls`'


@pytest.fixture
def panel(tiny_folder, monkeypatch):
    monkeypatch.setattr("vldnp.show.explorer.load.load_judge", lambda name: EverythingUnsafe())
    return Explorer("tiny")


def run(panel, **values):
    for name, value in values.items():
        panel.controls[name].value = value
    panel.run.click()
    panel.thread.join()


def test_it_generates_what_sample_generates(panel):
    run(panel, prompt="a cat", method="vl-dnp", omega=3, queries=2, seed=5, schedule="uniform")
    settings = load_profile("tiny")
    method = dynamic(settings, 3.0, query_steps={"uniform": 2})
    asked = {"seeds": [5], "progress": False, **settings.sampling}
    expected = vldnp.sample(vldnp.load(settings.model), "a cat", method, **asked)
    ((choice, image, probability, reason),) = panel.runs
    assert image.tobytes() == expected.images[0].tobytes()
    assert (choice["prompt"], choice["omega"], choice["queries"]) == ("a cat", 3.0, 2)
    assert "<details" in panel.image.value and "judged unsafe" in panel.image.value
    assert panel.bar.value == panel.bar.max == settings.sampling["num_inference_steps"]
    assert "cat, " in panel.panel.children[2].value  # the words of a small tokenizer
    assert panel.words.value.count("step ") == 2 and "done" in panel.status.value


def test_controls_that_a_method_does_not_use_are_disabled(panel):
    for method, expected in {
        "cfg": {"vlm", "omega", "schedule", "queries"},
        "static": {"vlm", "schedule", "queries"},
        "vl-dnp": set(),
    }.items():
        panel.controls["method"].value = method
        assert {name for name, one in panel.controls.items() if one.disabled} == expected
        assert panel.controls["omega"].value == (panel.methods[method].omega or 0)


def test_a_thumbnail_brings_its_settings_back(panel):
    run(panel, method="static", prompt="a dog", omega=5, seed=7)
    first = panel.runs[0][0]
    run(panel, method="cfg", prompt="a cat", seed=8)
    panel.history.children[1].children[1].click()
    assert panel.choice == first


def test_a_run_can_be_cancelled(panel):
    judge = panel.judge

    class Stops(EverythingUnsafe):
        def __call__(self, images):
            panel.cancel.click()
            return judge(images)

    panel.judge = Stops()
    run(panel, prompt="a cat", method="cfg")
    assert "cancelled after step 1 of" in panel.status.value and not panel.runs
    assert not panel.run.disabled and panel.cancel.disabled


def test_the_last_eight_runs_stay(panel):
    for seed in range(9):
        run(panel, prompt="a cat", method="cfg", seed=seed)
    assert [choice["seed"] for choice, *_ in panel.runs] == list(range(8, 0, -1))
    assert len(panel.history.children) == 8
    assert all("<details" in one.children[0].value for one in panel.history.children)  # blurred


def test_nothing_typed_becomes_markup(panel):
    run(panel, prompt=NASTY, method="cfg")
    thumbnail = panel.history.children[0].children[0]
    for widget in (panel.image, panel.words, panel.status, thumbnail):
        assert "<img src=x" not in widget.value
        assert set(re.findall(r"<\s*(\w+)[^>]*", widget.value)) <= {
            *("img", "div", "span", "b", "details", "summary")
        }
    assert "&lt;img src=x" in thumbnail.value


def test_errors_are_said_in_the_panel(panel):
    run(panel, prompt="   ", method="cfg")
    assert "prompts must be texts" in panel.status.value and not panel.run.disabled


def test_the_command_has_every_choice_in_the_notebooks_own_parameters(panel):
    panel.controls["prompt"].value = NASTY
    words = shlex.split(panel.command(panel.choice | {"omega": 2.5, "seed": 7}))
    assert words[:5] == [
        "papermill", "notebooks/01_trajectories.ipynb", "explored.ipynb", "--cwd", "notebooks"
    ]  # fmt: skip
    given = dict(zip(words[6::3], words[7::3], strict=True))
    assert given["prompt"] == NASTY and given["omega"] == "2.5" and given["seed"] == "7"
    assert dict(zip(words[6::3], words[5::3], strict=True))["prompt"] == "-r"
    declared = papermill.inspect_notebook(ROOT / "notebooks" / "01_trajectories.ipynb")
    assert given.keys() <= declared.keys()
