"""The explorer's runs, without a browser: what is shown, remembered and written as a command."""

import base64
import io
import re
import shlex
from pathlib import Path

import papermill
import pytest
from PIL import Image
from tiny_judges import EverythingUnsafe

import vldnp
from vldnp.show.choice import METHODS, Choice, command, methods, remarks
from vldnp.show.explorer import REMEMBERED, Explorer

ROOT = Path(__file__).parents[2]

NASTY = '<img src=x onerror=alert(1)> a cat\'s "hat"; rm -rf $HOME `ls`'


@pytest.fixture(scope="module")
def opened(tiny_folder):
    """Models are opened once."""
    return {"model": vldnp.load("moji-sd"), "vlms": {"moji-vlm-l": vldnp.load_vlm("moji-vlm-l")}}


@pytest.fixture
def panel(opened):
    return Explorer("tiny", judge=EverythingUnsafe(), **opened)


def run(panel, **values):
    for name, value in values.items():
        getattr(panel, name).value = value
    panel.run.click()
    panel.thread.join()


def test_it_paints_what_sample_paints(panel, opened):
    run(panel, prompt="a cat", method="vl-dnp", omega=3, queries=2, seed=5, schedule="uniform")
    method = vldnp.VLDNP(opened["vlms"]["moji-vlm-l"], "moji", 3, vldnp.uniform(2))
    settings = vldnp.load_profile("tiny")
    expected = vldnp.sample(
        opened["model"], "a cat", method, seeds=[5], progress=False, **settings.sampling
    )
    ((choice, picture, found),) = panel.runs
    assert picture.tobytes() == expected.images[0].tobytes()
    assert choice == Choice("a cat", "vl-dnp", "moji-vlm-l", 3.0, "uniform", 2, 5)
    shown = re.findall(r"base64,([^\"]+)", panel.picture.value)[-1]  # the first is the blurred one
    assert Image.open(io.BytesIO(base64.b64decode(shown))).size == picture.size
    assert "<details" in panel.picture.value and "judged unsafe: knife" in panel.picture.value
    assert panel.bar.value == panel.bar.max == settings.num_inference_steps
    assert panel.words.value.count("step ") == 2 and "done" in panel.status.value


def test_methods_are_those_of_the_package(opened):
    made = methods("tiny", omega=3, vlm=opened["vlms"]["moji-vlm-l"])
    assert tuple(made) == METHODS == tuple(method.name for method in made.values())
    assert made["static"].omega == made["vl-dnp"].omega == 3
    chosen = methods("tiny", vlm=opened["vlms"]["moji-vlm-l"])
    assert (chosen["static"].omega, chosen["vl-dnp"].omega) == (2, 8)
    with pytest.raises(ValueError, match="unknown schedule 'unifrom': did you mean 'uniform'"):
        methods("tiny", schedule="unifrom")


def test_controls_that_a_method_does_not_use_are_disabled(panel):
    for method, expected in {
        "cfg": {"vlm", "omega", "schedule", "queries"},
        "static": {"vlm", "schedule", "queries"},
        "vl-dnp": set(),
    }.items():
        panel.method.value = method
        names = ("prompt", "vlm", "omega", "schedule", "queries", "seed")
        assert {name for name in names if getattr(panel, name).disabled} == expected
    assert panel.omega.value == 8  # each method at the strength that was chosen for it
    panel.method.value = "static"
    assert panel.omega.value == 2


def test_a_thumbnail_brings_its_settings_back(panel):
    told = {"method": "static", "prompt": "a dog", "omega": 5, "seed": 7}
    run(panel, **told)
    first = panel.runs[0][0]
    run(panel, prompt="a cat", method="vl-dnp", queries=1, schedule="uniform", seed=1)
    picture, button = panel.history.children[1].children
    assert "P(unsafe) = 0.90" in picture.value and "a dog" in picture.value
    button.click()
    assert panel.choice == first and {n: getattr(first, n) for n in told} == told
    assert len(panel.runs) == 2  # nothing was painted


def test_words_that_the_model_does_not_know_are_named(panel, opened):
    panel.prompt.value = "a cat"
    assert panel.note.value == ""
    panel.prompt.value = "a <b>zebra, cat"
    assert "spelled in pieces: " in panel.note.value and "zebra" in panel.note.value
    assert "<b>zebra" not in panel.note.value
    long = " ".join(["a cat"] * 20) + " and a dog"
    (cut,) = remarks(opened["model"], long)
    assert cut.endswith("and a dog") and "never sees" in cut
    model = vldnp.load(ROOT / "data" / "models" / "moji-sd")
    (said,) = remarks(model, "a naked woman, oil painting of a cat")
    assert said.endswith("spelled in pieces: naked, woman, oil, painting.")


def test_cancelling_keeps_the_thumbnails(panel):
    run(panel, prompt="a cat", method="cfg")
    judge = panel.judge
    panel.judge = lambda images: (panel.cancel.click(), judge(images))[1]  # during the first step
    run(panel, prompt="a dog")
    assert panel.status.value == "cancelled after step 1 of 6"
    assert len(panel.runs) == 1 and panel.command.value == ""
    assert not panel.run.disabled and panel.cancel.disabled
    panel.judge = judge
    run(panel)
    assert len(panel.runs) == 2


def test_the_last_eight_runs_stay(panel):
    for seed in range(REMEMBERED + 1):
        run(panel, prompt="a cat", method="cfg", seed=seed)
    assert [choice.seed for choice, *_ in panel.runs] == list(range(REMEMBERED, 0, -1))
    assert len(panel.history.children) == REMEMBERED
    figure = panel.sheet()
    assert len(figure.axes) == REMEMBERED and all(axes.texts for axes in figure.axes)  # blurred


def test_nothing_typed_becomes_markup(panel):
    run(panel, prompt=NASTY, method="cfg")
    thumbnail = panel.history.children[0].children[0]
    for widget in (panel.picture, panel.words, panel.command, panel.note, panel.status, thumbnail):
        tags = re.findall(r"<\s*(\w+)[^>]*", widget.value)
        assert set(tags) <= {
            "img",
            "div",
            "span",
            "button",
            "b",
            "i",
            "br",
            "code",
            "details",
            "summary",
        }
        assert "<img src=x" not in widget.value
    assert "&lt;img src=x" in thumbnail.value


def test_errors_are_said_in_the_panel(panel):
    run(panel, prompt="   ", method="cfg")
    assert "the prompt is empty" in panel.status.value and not panel.run.disabled
    with pytest.raises(ValueError, match="press run"):
        panel.sheet()


def test_the_command_says_every_choice_in_the_notebooks_own_parameters():
    choice = Choice(NASTY, "vl-dnp", "moji-vlm-s", 2.5, "uniform", 3, 7)
    words = shlex.split(command(choice, "tiny"))
    assert words[:5] == [
        "papermill", "notebooks/01_trajectories.ipynb", "explored.ipynb", "--cwd", "notebooks"
    ]  # fmt: skip
    given = dict(zip(words[6::3], words[7::3], strict=True))
    assert given["prompt"] == NASTY and given["omega"] == "2.5" and given["seed"] == "7"
    assert dict(zip(words[6::3], words[5::3], strict=True))["prompt"] == "-r"
    declared = papermill.inspect_notebook(ROOT / "notebooks" / "01_trajectories.ipynb")
    assert given.keys() <= declared.keys()
    assert {"prompt", "vlm", "omega", "schedule", "queries", "seed", "profile"} <= given.keys()
