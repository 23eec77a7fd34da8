import base64
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
from vldnp.show import blur
from vldnp.show.stills import contact_sheet, side_by_side
from vldnp.show.templating import text_of
from vldnp.show.trajectory_data import save_trajectory, trajectory_data
from vldnp.show.viewer import chart, view
from vldnp.trace import Output, Step, Trace

NASTY = "<script>alert(1)</script> a knife & $\\frac{ " + "endless " * 200
STEPS = 5


@pytest.fixture(scope="module")
def model():
    return Backbone(sd_pipeline())


def run(model, method, prompt="a <b>cat</b>", **options):
    return sample(model, prompt, method, num_inference_steps=STEPS, progress=False, **options)


@pytest.fixture(scope="module")
def guided(model):
    method = VLDNP(ScriptedVLM(lambda image, question: NASTY), "moji", omega=2, query_steps=[1, 3])
    return run(model, method, ["a <b>cat</b>", "a dog"])


class Judge:
    """Finds a knife in every picture whose mean brightness is `limit` or more."""

    name, revision = "by-brightness", "1"

    def __init__(self, limit=0):
        self.limit = limit

    def __call__(self, images):
        unsafe = np.array([0.9 if np.asarray(i).mean() >= self.limit else 0.2 for i in images])
        return Judgement(unsafe, [{"KNIFE_<b>": p, "skull": 0.1} for p in unsafe])


def columns(viewer):
    """For each column the HTML of its pictures and of its texts, place by place."""
    frames = viewer.data.split('class="vldnp-frame"')[1:]
    rows = [frame.split('class="vldnp-column"')[1:] for frame in frames]
    parts = [
        [cell.split('<div class="vldnp-caption">') for cell in column]
        for column in zip(*rows, strict=True)
    ]
    return [tuple(map(list, zip(*column, strict=True))) for column in parts]


def opened(html):
    """The picture in a piece of HTML, as it is when opened; None where there is none."""
    found = re.search(r'"vldnp-picture" src="data:image/webp;base64,([^"]+)"', html)
    return Image.open(io.BytesIO(base64.b64decode(found[1]))) if found else None


def test_a_place_for_each_step_and_the_final_image(guided):
    viewer = view(guided)
    ((pictures, captions),) = columns(viewer)
    assert len(pictures) == len(captions) == STEPS + 1
    for step, text in zip(guided.trace.steps, captions, strict=False):
        assert f"step {step.index}, t = {step.timestep:g}" in text
        assert ("VLM:" in text) == step.queried
    assert "away from: —" in captions[0]
    assert all("away from: knife" in text for text in captions[1:STEPS])
    assert "final image" in captions[-1] and "14 U-Net evaluations" in captions[-1]
    assert "vl-dnp, ω = 2" in viewer.data


def test_the_pictures_are_those_the_vlm_saw(guided):
    viewer = view(guided, image=1)
    ((pictures, captions),) = columns(viewer)
    shown = [opened(place) for place in pictures]
    assert shown[0] is None and "not decoded" in pictures[0]
    expected = [guided.trace.steps[i].x0_images[1] for i in (1, 1, 3, 3)] + [guided.images[1]]
    for picture, same in zip(shown[1:], expected, strict=True):
        assert picture.size == same.size
        difference = np.asarray(picture, float) - np.asarray(same, float)
        others = np.asarray(guided.images[0], float) - np.asarray(same, float)
        assert np.abs(difference).mean() < np.abs(others).mean() / 3  # noise, compressed
    assert pictures[1] == pictures[2]
    assert "(x̂₀ of step 1)" in captions[2]


def test_no_markup_gets_through(guided):
    plain = view({"<u>label</u>": guided}, judge=Judge()).data
    before, ours, after = plain.partition(text_of("viewer.js").strip())
    assert ours and not after.replace("</div>", "").replace("</script>", "").strip()
    tags = {"b", "i", "p", "br", "div", "style", "script", "button", "img", "span", "svg", "input"}
    tags |= {"details", "summary", "path", "polyline", "circle", "text", "output"}
    assert set(re.findall(r"<\s*/?\s*(\w+)", before)) <= tags
    assert "&lt;script&gt;" in plain and "&lt;u&gt;label" in plain
    assert "&lt;b&gt;cat" in plain and "knife &lt;b&gt;" in plain
    assert plain.count("endless") < 300  # an endless answer is shortened


def test_several_side_by_side(model, guided):
    plain, static = run(model, CFG(), x0_every=True), run(model, Static("a knife", omega=3))
    viewer = view([plain, static, guided])
    shown = viewer.data
    assert all(label in shown for label in ("cfg", "static, ω = 3", "vl-dnp, ω = 2"))
    decoded = [[opened(place) is not None for place in pictures] for pictures, _ in columns(viewer)]
    assert decoded == [[True] * 6, [False] * 5 + [True], [False] + [True] * 5]
    assert "mine" in view({"mine": plain}).data


def test_the_curve_is_the_judges_and_the_dots_are_the_queries(model, guided):
    plain = run(model, CFG(), x0_every=True)
    pictures = [step.x0_images[0] for step in plain.trace.steps] + [plain.images[0]]
    judge = Judge(np.median([np.asarray(picture).mean() for picture in pictures]))
    data = trajectory_data([plain, guided], judge=judge)
    first, second = data["columns"]
    expected = [float(p) for p in judge(pictures).unsafe_probability]
    assert [place["probability"] for place in first["places"]] == expected
    assert {0.2, 0.9} == set(expected)
    assert [place["probability"] is None for place in second["places"]] == [True, False] * 2 + [
        True,
        False,
    ]
    drawn = chart(data)
    one, two = re.findall(r'points="([^"]+)"', drawn)
    heights = [float(point.split(",")[1]) for point in one.split()]
    assert [height < np.mean(heights) for height in heights] == [p > 0.5 for p in expected]
    dots = re.findall(r'<circle cx="([\d.]+)" cy="([\d.]+)"', drawn)
    assert [f"{x},{y}" for x, y in dots] == two.split()[:2]  # at steps 1 and 3, on the line
    assert "judge" not in re.sub(r'aria-label="[^"]*"', "", chart(trajectory_data([plain])))


def test_what_the_judge_flags_is_blurred_until_one_asks(guided):
    ((pictures, _),) = columns(view(guided, judge=Judge()))
    assert all("<details" in place and "show" in place for place in pictures[1:])
    assert "judged unsafe: knife" in pictures[1]
    before, inside = pictures[-1].split("</summary>")  # what lies after it is seen when opened
    assert "vldnp-picture" not in before and opened(inside) is not None
    preview = base64.b64decode(re.search(r'base64,([^"]+)"', before)[1])
    expected = blur.blurred(guided.images[0])
    difference = np.asarray(Image.open(io.BytesIO(preview)), float) - np.asarray(expected, float)
    assert np.abs(difference).mean() < 8
    for options in ({"judge": Judge(), "reveal": True}, {"judge": Judge(limit=999)}, {}):
        ((pictures, _),) = columns(view(guided, **options))
        assert not any("<details" in place for place in pictures)


def test_figures_blur_it_too(guided):
    sharp = contact_sheet(guided).axes[0].images[0].get_array()
    for options, same in (
        ({"judge": Judge()}, False),
        ({"judge": Judge(), "reveal": True}, True),
        ({"judge": Judge(limit=999)}, True),
    ):
        axes = contact_sheet(guided, **options).axes[0]
        assert np.array_equal(axes.images[0].get_array(), sharp) == same
        assert bool(axes.texts) != same
    sheet = side_by_side([guided], judge=Judge())
    assert all("judged unsafe" in axes.texts[0].get_text() for axes in sheet.axes)


def test_blurring_leaves_nothing_to_recognise_and_the_picture_alone():
    picture = Image.fromarray(np.indices((60, 60)).sum(0).astype("uint8") % 2 * 255).convert("RGB")
    before = picture.tobytes()
    assert np.ptp(np.asarray(blur.blurred(picture))) <= 2  # a checkerboard becomes grey
    assert picture.tobytes() == before


def test_a_large_viewer_is_light_enough_for_a_notebook():
    """25 steps × 4 methods of 512×512 pictures full of detail, as the notebook stores them."""
    rng = np.random.default_rng(0)
    base = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
    texture = np.asarray(Image.fromarray(base).resize((512, 512))).astype(int)

    def picture(k):
        return Image.fromarray((np.roll(texture, 9 * k, 1) + 4 * k).clip(0, 255).astype(np.uint8))

    steps = [
        Step(
            index=i,
            timestep=999 - 40 * i,
            latents=None,
            x0=None,
            x0_images=[picture(i)],
            queried=i % 3 == 0,
            vlm_answers=["a knife, " * 40] if i % 3 == 0 else None,
            vlm_failures=[None] if i % 3 == 0 else None,
            concepts=[("knife",)],
            negative_prompts=["Nudity, Sexual, " * 4],
            model_evaluations=[3],
            vlm_calls=[1],
            x0_decodes=[1],
        )
        for i in range(25)
    ]
    output = Output([picture(25)], Trace(["a cat"], [0], steps), torch.zeros(1, 4, 8, 8), CFG())
    viewer = view({str(k): output for k in range(4)}, judge=Judge())
    assert len(json.dumps(viewer.data)) < 2_000_000


def test_the_static_sheet_shows_all_methods_at_the_same_steps(model, guided):
    plain = run(model, CFG(), x0_every=True)
    figure = side_by_side({"one": plain, "two": guided})
    assert len(figure.axes) == 2 * 3
    titles = [axes.get_title() for axes in figure.axes[:3]]
    assert titles == ["step 1", "step 3", "final image"]
    array = figure.axes[1].images[0].get_array()
    assert np.array_equal(array, np.asarray(plain.trace.steps[3].x0_images[0]))
    with pytest.raises(ValueError, match="x0_every=True"):
        side_by_side([run(model, CFG()), guided])


def test_a_saved_trajectory_and_its_pictures(guided, tmp_path):
    files = save_trajectory([guided], tmp_path / "trajectories", image=1, judge=Judge())
    assert [file.name for file in files] == ["a-dog-1.json", "a-dog-1-0-vl-dnp.png"]
    assert json.loads(files[0].read_text()) == trajectory_data([guided], image=1, judge=Judge())
    with Image.open(files[1]) as picture:
        assert picture.tobytes() == guided.images[1].tobytes()  # unaltered, though it is flagged


@pytest.mark.parametrize("output_type", ["pt", "np", "latent"])
def test_other_output_types(model, output_type):
    out = run(model, CFG(), "a cat", output_type=output_type)
    ((pictures, _),) = columns(view(out))
    assert [opened(place) is not None for place in pictures] == [False] * STEPS + [
        output_type != "latent"
    ]


def test_large_pictures_are_reduced(guided):
    ((pictures, _),) = columns(view(guided, width=16))
    assert opened(pictures[-1]).size == (16, 16)


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
