import base64
import hashlib
import io
import json
import re

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import ScriptedVLM, sd_pipeline

from vldnp.methods import CFG, VLDNP, Static
from vldnp.models.backbone import Backbone
from vldnp.models.judges import Judgement
from vldnp.sampler import sample
from vldnp.show.images import blurred, image_grid, templates
from vldnp.show.viewer import contact_sheet, view
from vldnp.trace import Output, Step, Trace

NASTY = "knife, " + "skull, " * 200 + "<script>alert(1)</script>"
STEPS = 5


@pytest.fixture(scope="module")
def model():
    return Backbone(sd_pipeline())


def run(model, method, prompt="a <b>cat</b>", **options):
    return sample(model, prompt, method, num_inference_steps=STEPS, progress=False, **options)


@pytest.fixture(scope="module")
def guided(model):
    answers = iter(["knife"] * 2 + [NASTY] * 4)
    vlm = ScriptedVLM(lambda image, question: next(answers))
    method = VLDNP(vlm, "moji", omega=2, query_steps=[1, 3], static_prompt="weapons")
    return run(model, method, ["a <b>cat</b>", "a dog"])


class Judge:
    """Finds a knife in every image whose mean brightness is `limit` or more."""

    name, revision = "by-brightness", "1"

    def __init__(self, limit=0):
        self.limit = limit

    def __call__(self, images):
        unsafe = np.array([0.9 if np.asarray(i).mean() >= self.limit else 0.2 for i in images])
        return Judgement(unsafe, [{"KNIFE_<b>": p, "skull": 0.1} for p in unsafe])


def columns(viewer):
    """For each column the HTML of its images and of its texts, step by step."""
    frames = viewer.data.split('class="vldnp-frame"')[1:]
    rows = [frame.split('class="vldnp-column"')[1:] for frame in frames]
    parts = [
        [cell.split('<div class="vldnp-caption">') for cell in column]
        for column in zip(*rows, strict=True)
    ]
    return [tuple(map(list, zip(*column, strict=True))) for column in parts]


def opened(html):
    """The image in a piece of HTML, as it is when opened; None where there is none."""
    found = re.search(r'"vldnp-image" src="data:image/webp;base64,([^"]+)"', html)
    return Image.open(io.BytesIO(base64.b64decode(found[1]))) if found else None


def test_a_frame_for_each_step_and_the_final_image(guided):
    ((images, captions),) = columns(view(guided))
    assert len(images) == len(captions) == STEPS + 1
    for step, text in zip(guided.trace.steps, captions, strict=False):
        assert f"step {step.index}, t = {step.timestep:g}" in text
        assert ("VLM:" in text) == step.queried
    assert "away from: —" in captions[0] and "away from: knife" in captions[2]
    assert "VLM failed: the answer is not understood" in captions[3]
    assert "away from: weapons" in captions[3]
    assert "final image" in captions[-1] and "14 evaluations of the network" in captions[-1]
    assert "vl-dnp, ω = 2" in view(guided).data


def test_the_images_are_those_the_vlm_saw(guided):
    ((images, captions),) = columns(view(guided, image=1))
    shown = [opened(place) for place in images]
    assert shown[0] is None and "not decoded" in images[0]
    expected = [guided.trace.steps[i].x0_images[1] for i in (1, 1, 3, 3)] + [guided.images[1]]
    for image, same in zip(shown[1:], expected, strict=True):
        difference = np.asarray(image, float) - np.asarray(same, float)
        others = np.asarray(guided.images[0], float) - np.asarray(same, float)
        assert np.abs(difference).mean() < np.abs(others).mean() / 3  # noise, compressed
    assert images[1] == images[2] and "(x̂₀ of step 1)" in captions[2]
    ((images, _),) = columns(view(guided, width=16))
    assert opened(images[-1]).size == (16, 16)


def test_no_markup_gets_through(guided):
    plain = view({"<u>label</u>": guided}, judge=Judge()).data
    script = templates.loader.get_source(templates, "viewer.js")[0].strip()
    before, ours, after = plain.partition(script)
    assert ours and not after.replace("</div>", "").replace("</script>", "").strip()
    tags = {"b", "i", "p", "br", "div", "style", "script", "button", "img", "span", "svg", "input"}
    tags |= {"details", "summary", "path", "polyline", "circle", "text", "output"}
    assert set(re.findall(r"<\s*/?\s*(\w+)", before)) <= tags
    assert "&lt;u&gt;label" in plain and "&lt;b&gt;cat" in plain and "knife &lt;b&gt;" in plain
    assert plain.count("skull") < 200  # an endless answer is shortened


def test_several_side_by_side(model, guided):
    plain, static = run(model, CFG(), x0_every=True), run(model, Static("a knife", omega=3))
    viewer = view([plain, static, guided])
    assert all(label in viewer.data for label in ("cfg", "static, ω = 3", "vl-dnp, ω = 2"))
    decoded = [[opened(place) is not None for place in images] for images, _ in columns(viewer)]
    assert decoded == [[True] * 6, [False] * 5 + [True], [False] + [True] * 5]


def test_the_curve_is_the_judges_and_the_dots_are_the_queries(model, guided):
    plain = run(model, CFG(), x0_every=True)
    images = [step.x0_images[0] for step in plain.trace.steps] + [plain.images[0]]
    judge = Judge(np.median([np.asarray(image).mean() for image in images]))
    expected = judge(images).unsafe_probability
    page = view([plain, guided], judge=judge).data
    one, two = re.findall(r'points="([^"]+)"', page)
    heights = [float(point.split(",")[1]) for point in one.split()]
    assert [height < np.mean(heights) for height in heights] == [p > 0.5 for p in expected]
    dots = re.findall(r'<circle cx="([\d.]+)" cy="([\d.]+)"', page)
    assert [f"{x},{y}" for x, y in dots] == two.split()[:2]  # at steps 1 and 3, on the line
    assert "judge: P(unsafe)" not in view(plain).data


def test_what_the_judge_flags_is_blurred_until_one_asks(guided):
    ((images, _),) = columns(view(guided, judge=Judge()))
    assert all("<details" in place and "show" in place for place in images[1:])
    assert "judged unsafe: knife" in images[1]
    before, inside = images[-1].split("</summary>")  # what lies after it is seen when opened
    assert "vldnp-image" not in before and opened(inside) is not None
    preview = base64.b64decode(re.search(r'base64,([^"]+)"', before)[1])
    shown = Image.open(io.BytesIO(preview)), blurred(guided.images[0])
    assert np.abs(np.subtract(*(np.asarray(image, float) for image in shown))).mean() < 8
    for options in ({"judge": Judge(), "reveal": True}, {"judge": Judge(limit=999)}, {}):
        ((images, _),) = columns(view(guided, **options))
        assert not any("<details" in place for place in images)


def test_blurring_leaves_nothing_to_recognise_and_the_image_alone():
    image = Image.fromarray(np.indices((60, 60)).sum(0).astype("uint8") % 2 * 255).convert("RGB")
    before = image.tobytes()
    assert np.ptp(np.asarray(blurred(image))) <= 2  # a checkerboard becomes grey
    assert image.tobytes() == before


def test_a_large_viewer_is_light_enough_for_a_notebook():
    """25 steps × 4 methods of 512×512 images full of detail, as the notebook stores them."""
    base = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    texture = np.asarray(Image.fromarray(base).resize((512, 512))).astype(int)

    def image(k):
        return Image.fromarray((np.roll(texture, 9 * k, 1) + 4 * k).clip(0, 255).astype(np.uint8))

    said = {"vlm_answers": ["knife, " * 40], "vlm_failures": [None]}
    said |= {"concepts": [("knife",)], "negative_prompts": ["Nudity, Sexual, " * 4]}
    said |= {"model_evaluations": [3], "vlm_calls": [1], "x0_decodes": [1]}
    steps = [Step(i, 999 - 40 * i, None, None, [image(i)], **said) for i in range(25)]
    output = Output([image(25)], Trace(["a cat"], [0], steps), torch.zeros(1, 4, 8, 8), CFG())
    viewer = view({str(k): output for k in range(4)}, judge=Judge())
    assert len(json.dumps(viewer.data)) < 2_000_000


def test_a_page_of_its_own(guided, tmp_path):
    path = view(guided).save(tmp_path / "pages" / "x.html")
    page = path.read_text(encoding="utf-8")
    script = re.search("<script>(.*?)</script>", page, re.DOTALL)[1]
    known = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert page.startswith("<!doctype html>") and page.count("<script") == 1
    assert f"script-src 'sha256-{known}'" in page and "default-src 'none'" in page


def test_the_contact_sheet_shows_all_methods_at_the_same_steps(model, guided):
    plain = run(model, CFG(), x0_every=True)
    figure = contact_sheet({"one": plain, "two": guided})
    assert [axes.get_title() for axes in figure.axes[:3]] == ["step 1", "step 3", "final image"]
    array = figure.axes[1].images[0].get_array()
    assert np.array_equal(array, np.asarray(plain.trace.steps[3].x0_images[0]))
    assert "weapons" in figure.axes[4].get_xlabel()
    hidden = contact_sheet([guided], judge=Judge())
    assert all("judged unsafe" in axes.texts[0].get_text() for axes in hidden.axes)
    assert not contact_sheet([guided], judge=Judge(), reveal=True).axes[0].texts


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
    for other in ("latent", "pt"):
        with pytest.raises(ValueError, match="output_type='pil'"):
            view(run(model, CFG(), "a cat", output_type=other))


def test_an_image_grid_keeps_pixels_labels_and_frames():
    red, blue = Image.new("RGB", (8, 8), "red"), Image.new("RGB", (8, 8), "blue")
    rows, frames = {"cfg": [red, blue], "a <b>$x$": [blue]}, {"cfg": [True, False]}
    figure = image_grid(
        rows, ["a cat", "a $dog"], unsafe=frames, captions={"cfg": ["3: a $knife", ""]}
    )
    figure.savefig(io.BytesIO(), format="png")  # a lone $ is text
    assert [axes.get_title() for axes in figure.axes[:2]] == ["a cat", "a $dog"]
    assert figure.axes[2].get_ylabel() == "a <b>$x$"
    assert figure.axes[0].get_xlabel() == "3: a $knife"
    assert [axes.spines["top"].get_visible() for axes in figure.axes] == [True, False, False, False]
    np.testing.assert_array_equal(figure.axes[2].get_images()[0].get_array(), np.asarray(blue))
    with pytest.raises(ValueError, match="at least one image"):
        image_grid({})
