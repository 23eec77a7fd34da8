import io
import re

import ipywidgets as widgets
import pytest
from ipywidgets.widgets.widget import _instances
from ipywidgets.widgets.widget_link import Link
from PIL import Image
from tiny import ScriptedVLM, sd_pipeline

from vldnp.backbone import Backbone
from vldnp.methods import CFG, VLDNP, Static
from vldnp.sampler import sample
from vldnp.viewer import contact_sheet, view

NASTY = "<script>alert(1)</script> a knife & $\\frac{ " + "endless " * 200
STEPS = 5


@pytest.fixture(scope="module")
def model():
    return Backbone(sd_pipeline())


def run(model, method, prompt="a <b>cat</b>", **options):
    return sample(model, prompt, method, num_inference_steps=STEPS, progress=False, **options)


@pytest.fixture(scope="module")
def guided(model):
    method = VLDNP(ScriptedVLM(lambda image, question: NASTY), omega=2, query_steps=[1, 3])
    return run(model, method, ["a <b>cat</b>", "a dog"])


def texts(widget):
    """All HTML under a widget."""
    if isinstance(widget, widgets.HTML):
        return [widget.value]
    return [text for child in getattr(widget, "children", ()) for text in texts(child)]


def pictures(widget):
    if isinstance(widget, widgets.Image):
        return [widget]
    return [image for child in getattr(widget, "children", ()) for image in pictures(child)]


def stack_of(viewer):
    controls, stack = viewer.children
    assert isinstance(stack, widgets.Stack)
    return stack


def test_a_place_for_each_step_and_the_final_image(guided):
    stack = stack_of(view(guided))
    assert len(stack.children) == STEPS + 1 and stack.selected_index == 0
    shown = [" ".join(texts(place)) for place in stack.children]
    for step, text in zip(guided.trace.steps, shown, strict=False):
        assert f"step {step.index}, t = {step.timestep:g}" in text
        assert ("VLM:" in text) == step.queried
    assert "away from: —" in shown[0]
    assert all("away from: knife" in text for text in shown[1:STEPS])
    assert "final image" in shown[-1] and "14 U-Net evaluations" in shown[-1]
    assert "vl-dnp, ω = 2" in shown[0]


def test_the_pictures_are_those_the_vlm_saw(guided):
    stack = stack_of(view(guided, image=1))
    shown = [pictures(place) for place in stack.children]
    assert [len(place) for place in shown] == [0, 1, 1, 1, 1, 1]
    expected = [guided.trace.steps[i].x0_images[1] for i in (1, 1, 3, 3)] + [guided.images[1]]
    for (picture,), same in zip(shown[1:], expected, strict=True):
        assert Image.open(io.BytesIO(picture.value)).tobytes() == same.tobytes()
    assert shown[1][0] is shown[2][0]  # stored once
    assert "(x̂₀ of step 1)" in " ".join(texts(stack.children[2]))


def test_no_markup_gets_through(guided):
    everything = " ".join(texts(view({"<u>label</u>": guided})))
    assert set(re.findall(r"<\s*/?\s*(\w+)", everything)) <= {"b", "i", "br", "div"}
    assert "&lt;script&gt;" in everything and "&lt;u&gt;label" in everything
    assert "&lt;b&gt;cat" in everything
    assert everything.count("endless") < 200  # an endless answer is shortened


def test_it_moves_without_a_kernel(guided):
    before = set(_instances)
    viewer = view(guided)
    (play, slider), stack = viewer.children[0].children, viewer.children[1]
    assert (play.max, slider.max) == (STEPS, STEPS)
    made = [widget for key, widget in _instances.items() if key not in before]
    links = [widget for widget in made if isinstance(widget, Link)]  # live in the browser
    assert [(link.source, link.target) for link in links] == [
        ((play, "value"), (slider, "value")),
        ((slider, "value"), (stack, "selected_index")),
    ]


def test_several_side_by_side(model, guided):
    plain, static = run(model, CFG(), x0_every=True), run(model, Static("a knife", omega=3))
    stack = stack_of(view([plain, static, guided]))
    assert all(len(place.children) == 3 for place in stack.children)
    first = " ".join(texts(stack.children[0]))
    assert all(label in first for label in ("cfg", "static, ω = 3", "vl-dnp, ω = 2"))
    assert [len(pictures(place)) for place in stack.children] == [1, 2, 2, 2, 2, 3]
    assert "mine" in " ".join(texts(view({"mine": plain})))


@pytest.mark.parametrize("output_type", ["pt", "np", "latent"])
def test_other_output_types(model, output_type):
    out = run(model, CFG(), "a cat", output_type=output_type)
    shown = pictures(stack_of(view(out)))
    assert len(shown) == (output_type != "latent")


def test_large_pictures_are_reduced(guided):
    (picture,) = pictures(stack_of(view(guided, width=16)).children[-1])
    assert Image.open(io.BytesIO(picture.value)).size == (16, 16)


def test_contact_sheet(guided, model):
    figure = contact_sheet(guided)
    figure.savefig(io.BytesIO(), format="png")  # a lone $ in an answer does not break it
    titles = [axis.get_title(loc="left") for axis in figure.axes]
    assert len(titles) == 3 and titles[0].startswith("step 1, t =") and titles[2] == "final image"
    assert "away from: knife" in titles[0] and len(titles[0]) < 300
    every = contact_sheet(run(model, CFG(), x0_every=True), columns=4)
    assert len(every.axes) == 8 and sum(bool(axis.images) for axis in every.axes) == STEPS + 1


def test_bad_input(model, guided):
    with pytest.raises(ValueError, match="no image 2: there are 2; use 0 to 1"):
        view(guided, image=2)
    with pytest.raises(ValueError, match="at least one"):
        view([])
    short = sample(model, "a cat", num_inference_steps=2, progress=False)
    with pytest.raises(ValueError, match=r"\[2, 5\] steps"):
        view([guided, short])
    with pytest.raises(ValueError, match="x0_every=True"):
        contact_sheet(short)
