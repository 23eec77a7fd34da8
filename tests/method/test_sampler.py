import re
from itertools import product

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import ScriptedVLM, by_brightness, counted_rows, generators, sd_pipeline

from vldnp.concepts import load_concepts
from vldnp.methods import CFG, VLDNP, Method, Static
from vldnp.models.backbone import Backbone, to_pil
from vldnp.models.families import SCHEDULERS
from vldnp.negatives import Negative, Policy
from vldnp.sampler import denoise, sample
from vldnp.schedules import front_loaded

PROMPTS = ["a cat at the pirate cove", "a dog"]
QUICK = {"num_inference_steps": 6, "progress": False}


@pytest.fixture(scope="module", params=["epsilon", "v_prediction"])
def stock(request, tmp_path_factory):
    """A stock pipeline, opened from a folder."""
    folder = tmp_path_factory.mktemp(request.param)
    sd_pipeline(request.param).save_pretrained(folder)
    unchecked = {"safety_checker": None, "requires_safety_checker": False}
    pipe = StableDiffusionPipeline.from_pretrained(folder, **unchecked)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def difference(a, b):
    """The largest between two pictures, in steps of 1/255; 1 may come from rounding."""
    return np.abs(np.asarray(a, dtype=int) - np.asarray(b, dtype=int)).max()


# Against the stock pipeline
@pytest.mark.parametrize("name", SCHEDULERS)
def test_plain_and_replaced_are_the_stock_pipeline(stock, name):
    kind, options = SCHEDULERS[name]
    options = {"use_karras_sigmas": False} | options
    stock.scheduler = kind.from_config(stock.scheduler.config, **options)
    asked = {"num_inference_steps": 9, "guidance_scale": 5.0}
    own = {"seeds": [3, 4], "scheduler": name, "progress": False}
    methods = {"": (CFG(), Static("")), "a knife": (Static("a knife", rule="replaced"),)}
    for negative, output_type in product(methods, ("pt", "latent")):
        asked["output_type"], words = output_type, [negative] * 2
        expected = stock(PROMPTS, negative_prompt=words, generator=generators(3, 4), **asked).images
        for method in methods[negative]:
            out = sample(stock, PROMPTS, method, **asked, **own)
            assert torch.allclose(out.images, expected, atol=1e-4)
            assert out.trace.model_evaluations == [27 if negative else 18] * 2
    plain = sample(stock, PROMPTS, **asked, **own)
    assert not torch.allclose(plain.latents, expected, atol=1e-2)


def test_pil_images_are_the_stock_ones(stock):
    expected = stock(PROMPTS, num_inference_steps=6, generator=generators(0, 1)).images
    out = sample(stock, PROMPTS, **QUICK)
    assert all(difference(a, b) <= 1 for a, b in zip(out.images, expected, strict=True))


@pytest.mark.parametrize("single", [True, False])
def test_generators_and_repeats_are_the_stock_ones(stock, single):
    asked = {"num_images_per_prompt": 2, "num_inference_steps": 4, "height": 48, "width": 40}
    drawn = [generators(5)[0] if single else generators(5, 6, 7, 8) for _ in range(2)]
    expected = stock(PROMPTS, generator=drawn[0], output_type="latent", **asked).images
    out = sample(stock, PROMPTS, generator=drawn[1], progress=False, **asked)
    assert out.latents.shape == (4, 4, 12, 10)
    assert torch.allclose(out.latents, expected, atol=1e-4)
    assert out.trace.prompts == [PROMPTS[0]] * 2 + [PROMPTS[1]] * 2
    assert out.trace.seeds == [None] * 4


# The batch around an image
@pytest.fixture(scope="module")
def alone(model):
    """Each of six images made on its own; they differ in their negatives."""
    asked = {"num_inference_steps": 8, "progress": False}
    made = [sample(model, **image(k), method=method(), **asked) for k in range(6)]
    prompts = {step.negative_prompts[0] for out in made for step in out.trace.steps}
    assert prompts >= {None, "knife", "dagger, skull"}
    return made


def image(k):
    prompts = ["a cat", "a dog at the pirate cove", "pizza"]
    return {"prompt": prompts[k % 3], "seeds": [k * 7], "guidance_scale": [3.0, 7.5][k % 2]}


def method():
    return VLDNP(ScriptedVLM(by_brightness), "moji", omega=8, query_steps=(0, 2, 3, 6))


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=6), st.integers(1, 6))
def test_an_image_is_the_same_in_any_batch(model, alone, members, batch_size):
    images = [image(k) for k in members]
    out = sample(
        model, [i["prompt"] for i in images], method(), seeds=[i["seeds"][0] for i in images],
        guidance_scale=[i["guidance_scale"] for i in images], num_inference_steps=8,
        batch_size=batch_size, output_type="pt", progress=False,
    )  # fmt: skip
    for k, latents, pixels in zip(members, out.latents, out.images, strict=True):
        assert torch.allclose(latents, alone[k].latents[0], atol=1e-4)
        assert torch.allclose(pixels, model.decode(alone[k].latents)[0], atol=1e-4)
    traces = out.trace.steps, *(alone[k].trace.steps for k in members)
    for step, *others in zip(*traces, strict=True):
        assert step.negative_prompts == [other.negative_prompts[0] for other in others]
        assert step.model_evaluations == [other.model_evaluations[0] for other in others]


def test_a_vlm_gets_images_of_its_own(model):
    """One that paints on them changes neither the second query nor the trace."""
    shown = []

    def painting(images, question):
        shown.append([np.asarray(image).copy() for image in images])
        for image in images:
            image.paste("red", (0, 0, *image.size))
        return ["?"] * len(images)

    def writing(pixels, question):
        assert pixels.dtype == torch.uint8 and pixels.device == model.device
        shown.append(list(pixels.permute(0, 2, 3, 1).numpy().copy()))
        pixels.zero_()
        return ["?"] * len(pixels)

    writing.takes_pixels = True
    for vlm in (painting, writing):
        out = sample(model, PROMPTS, VLDNP(vlm, "moji", 2.0, [1]), **QUICK)
        first, again = shown[-2:]
        for k, image in enumerate(out.trace.steps[1].x0_images):
            assert (first[k] == np.asarray(image)).all() and (again[k] == first[k]).all()
    assert (np.array(shown[0]) == np.array(shown[2])).all()


@pytest.mark.parametrize("name", SCHEDULERS)
def test_runs_interleave(model, name):
    asked = {"num_inference_steps": 5, "scheduler": name}
    runs = [denoise(model, prompt, **asked) for prompt in PROMPTS]
    *_, last = zip(*runs, strict=True)
    for step, prompt in zip(last, PROMPTS, strict=True):
        assert torch.equal(step.latents, sample(model, prompt, progress=False, **asked).latents)


# What is spent
def test_counts_are_the_rows_that_go_through_the_unet(model):
    answers = iter(["none", "knife", "a skull", "none", "none", "blood"])
    vlm = ScriptedVLM(lambda image, question: next(answers))
    method = VLDNP(vlm, "moji", query_steps=[1, 3])
    with counted_rows(model.network) as rows:
        steps = list(denoise(model, ["a cat"] * 3, method, num_inference_steps=5))
    # one call of 2B + k rows; at a query, k is known only after the call of 2B
    assert rows == [6, 6, 2, 6 + 2, 6, 1, 6 + 1]
    spent = [step.model_evaluations for step in steps]
    assert spent == [[2, 2, 2], [2, 3, 3], [2, 3, 3], [2, 2, 3], [2, 2, 3]]
    assert sum(rows) == sum(sum(step.model_evaluations) for step in steps)
    assert [step.queried for step in steps] == [False, True, False, True, False]
    assert [step.vlm_calls for step in steps] == [[int(step.queried)] * 3 for step in steps]
    assert [step.x0_decodes for step in steps] == [[int(step.queried)] * 3 for step in steps]
    assert steps[2].concepts == [(), ("knife",), ("skull",)]
    assert [s.vlm_answers for s in steps[1:3]] == [["none", "knife", "a skull"], [None] * 3]


def test_no_negatives_no_difference(model):
    plain = sample(model, PROMPTS, **QUICK)
    for same in (
        VLDNP(ScriptedVLM(lambda image, question: "none"), "moji", query_steps=range(6)),
        VLDNP(ScriptedVLM(by_brightness), "moji", query_steps=[]),
        Static("a knife", omega=0),
        Static("  "),
    ):
        out = sample(model, PROMPTS, same, **QUICK)
        assert torch.allclose(out.latents, plain.latents, atol=1e-5)
        assert out.trace.model_evaluations == plain.trace.model_evaluations
    changed = sample(model, PROMPTS, Static("a knife"), **QUICK).latents
    assert not torch.allclose(changed, plain.latents, atol=1e-2)


# What a VLM may say
@settings(max_examples=25, deadline=None)
@given(st.text() | st.sampled_from(["", "knife " * 5000, "un couteau", "a cat, a knife", "没有"]))
def test_only_the_vocabulary_reaches_the_text_encoder(model, answer):
    vocabulary = load_concepts("moji").vocabulary
    encoded = []

    class Spy(Backbone):
        def encode(self, prompts, *size):
            encoded.extend(prompts)
            return super().encode(prompts, *size)

    vlm = ScriptedVLM(lambda image, question: answer)
    method = VLDNP(vlm, "moji", query_steps=[0], lead="a weapon", on_failure="static")
    out = sample(Spy(model.pipe), "a cat", method, num_inference_steps=1, progress=False)
    assert out.trace.steps[0].vlm_answers == [answer[:4000]]  # verbatim
    allowed = {"", "a cat", "a weapon", *vocabulary}
    assert {term for text in encoded for term in text.split(", ")} <= allowed


# The stream
def test_a_step_says_what_happened(model):
    steps = list(denoise(model, PROMPTS, CFG(), num_inference_steps=4, x0_every=True))
    assert [step.index for step in steps] == [0, 1, 2, 3]
    assert [step.timestep for step in steps] == sorted((s.timestep for s in steps), reverse=True)
    for step in steps:
        assert step.latents.shape == step.x0.shape == (2, 4, 8, 8)
        assert [picture.size for picture in step.x0_images] == [(32, 32)] * 2
        assert step.vlm_answers == [None] * 2 and step.x0_decodes == [1, 1]
    # DPM-Solver++ ends at the last prediction: the final picture is the last x̂₀.
    assert torch.allclose(steps[-1].x0, steps[-1].latents, atol=1e-4)
    assert not steps[-1].latents.requires_grad


def test_one_may_stop_early(model):
    vlm = ScriptedVLM(by_brightness)
    method = VLDNP(vlm, "moji", query_steps=[1, 3])
    steps = denoise(model, "a cat", method, num_inference_steps=5)
    step = next(step for step in steps if step.queried)
    assert (step.index, vlm.calls) == (1, [1])
    assert torch.is_grad_enabled()


def test_the_trace_as_a_table(model):
    vlm = ScriptedVLM(lambda image, question: 'a knife, "skulls"\n')
    out = sample(model, PROMPTS, VLDNP(vlm, "moji", query_steps=[1]), seeds=[5, 6], **QUICK)
    assert repr(out).startswith("<2 images by vl-dnp, ω = 7.5, 6 steps;") and len(repr(out)) < 80
    assert out._repr_html_().count("<br>negative prompt: knife, skull<") == 2
    table = out.trace.to_frame()
    assert len(table) == 2 * 6
    row = table[(table.image == 1) & (table.step == 1)].iloc[0]
    assert (row.prompt, row.seed, row.queried) == ("a dog", 6, True)
    assert (row.vlm_answer, row.concepts) == ('a knife, "skulls"\n', "knife, skull")
    assert (row.negative_prompt, row.model_evaluations) == ("knife, skull", 3)
    assert table.groupby("image").model_evaluations.sum().tolist() == out.trace.model_evaluations
    assert table[table.step == 0].negative_prompt.isna().all()
    assert all(step.latents is None and step.x0 is None for step in out.trace.steps)


def test_output_types(model):
    kinds = ("pil", "pt", "np", "latent")
    outs = {kind: sample(model, PROMPTS, output_type=kind, **QUICK) for kind in kinds}
    assert {kind for kind, out in outs.items() if out._repr_html_()} == {"pil"}
    pixels = outs["pt"].images
    assert pixels.shape == (2, 3, 32, 32) and 0 <= pixels.min() <= pixels.max() <= 1
    assert np.array_equal(outs["np"].images, pixels.permute(0, 2, 3, 1).numpy())
    assert [i.tobytes() for i in outs["pil"].images] == [i.tobytes() for i in to_pil(pixels)]
    assert torch.equal(outs["latent"].images, outs["pil"].latents)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_half_precision(name):
    half = Backbone(sd_pipeline().to(dtype=torch.bfloat16))
    vlm = ScriptedVLM(lambda image, question: "knife")
    out = sample(half, "a cat", VLDNP(vlm, "moji", query_steps=[2]), scheduler=name, **QUICK)
    assert out.latents.dtype == torch.bfloat16 and out.latents.isfinite().all()


def test_the_default_seeds_count_from_zero(model):
    out = sample(model, PROMPTS, num_images_per_prompt=2, **QUICK)
    assert out.trace.seeds == [0, 1, 2, 3]
    again = sample(model, [p for p in PROMPTS for _ in "ab"], seeds=range(4), **QUICK)
    assert torch.equal(out.latents, again.latents)


def test_a_stochastic_scheduler_draws_for_each_image(model):
    from diffusers import DPMSolverMultistepScheduler as DPM

    sde = DPM.from_config(model.pipe.scheduler.config, algorithm_type="sde-dpmsolver++")
    two = sample(model, PROMPTS, scheduler=sde, seeds=[1, 2], **QUICK)
    one = sample(model, PROMPTS[1], scheduler=sde, seeds=[2], **QUICK)
    assert torch.allclose(two.latents[1], one.latents[0], atol=1e-4)


# Methods
def test_a_custom_rule(model):
    def half_more(uncond, cond, neg, guidance_scale, omega):
        return (3 * cond - uncond) / 2

    out = sample(model, "a cat", Static("a knife", rule=half_more), **QUICK)
    cfg = sample(model, "a cat", guidance_scale=1.5, **QUICK)
    assert torch.allclose(out.latents, cfg.latents, atol=1e-5)


@pytest.mark.parametrize("g", [0, 0.5, -2])
def test_g_up_to_1_is_no_cfg(model, g):
    """As in diffusers, where it is the recipe for distilled models."""
    out = sample(model, PROMPTS, guidance_scale=[g, 1], **QUICK)
    asked = {"guidance_scale": 0, "output_type": "latent", "num_inference_steps": 6}
    expected = model.pipe(PROMPTS, generator=generators(0, 1), **asked).images
    assert torch.allclose(out.latents, expected, atol=1e-4)
    assert out.trace.model_evaluations == [QUICK["num_inference_steps"]] * 2


def test_a_custom_policy(model):
    """Negatives may depend on those before: here they pile up."""

    class Piling(Policy):
        def query_steps_of(self, num_inference_steps):
            return range(num_inference_steps)

        def look(self, view, before):
            return [Negative(f"{negative.prompt or ''} knife".strip()) for negative in before]

    out = sample(model, "a cat", Method("piling", Piling(), omega=1.0), **QUICK)
    assert out.trace.steps[2].negative_prompts == ["knife knife knife"]


# Bad input
def asking(query_steps):
    return VLDNP(by_brightness, "moji", query_steps=query_steps)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"prompt": []}, "no prompt"),
        ({"prompt": ["a cat", None]}, "must be texts, none of them empty, not None"),
        ({"prompt": ["a cat", " \n"]}, "must be texts, none of them empty, not ' "),
        ({"seeds": [0, -1]}, "a seed must be a whole number, 0 or more, not -1"),
        ({"seeds": [0, 2**63]}, "a seed must be a whole number"),
        ({"seeds": [1]}, "seeds has 1 entries for 2 images"),
        ({"seeds": 1}, "seeds must be a sequence"),
        ({"seeds": [1, 2], "generator": generators(1, 2)}, "either seeds or generator"),
        ({"generator": generators(1)}, "generator has 1 entries for 2"),
        ({"guidance_scale": [1.0, 2.0, 3.0]}, "guidance_scale has 3 entries for 2"),
        ({"guidance_scale": [7.5, np.inf]}, "guidance_scale must be a finite .* not inf"),
        ({"guidance_scale": "7.5"}, "guidance_scale must be a finite number, not '7.5'"),
        ({"num_images_per_prompt": "2"}, "num_images_per_prompt .* 1 or more, not '2'"),
        ({"num_inference_steps": 0}, "num_inference_steps must be 1 or more"),
        ({"height": 30}, "multiples of 4"),
        ({"scheduler": "dmp++"}, "did you mean 'dpm\\+\\+'"),
        ({"method": "cfg"}, "must be a Method"),
        ({"model": "moji-sd"}, "vldnp.load"),
        ({"noise_device": "nonsense"}, "noise_device 'nonsense': Expected one of cpu"),
        ({"method": asking([6])}, "outside the 6 denoising steps"),
        ({"method": asking(front_loaded(7))}, "7 queries do not fit"),
    ],
)
def test_bad_input_is_one_clear_line_at_once(model, wrong, message):
    asked = {"model": model, "prompt": PROMPTS, "num_inference_steps": 6} | wrong
    with pytest.raises((ValueError, TypeError), match=message) as caught:
        denoise(**asked)  # not only at the first step
    assert "\n" not in str(caught.value)
    with pytest.raises((ValueError, TypeError), match=message):
        sample(**asked, progress=False)


def test_bad_output_type_and_batch_size(model):
    with pytest.raises(ValueError, match="output_type 'png'.*pil"):
        sample(model, PROMPTS, output_type="png", **QUICK)
    with pytest.raises(ValueError, match="batch_size must be a whole number, 1 or more, not 0"):
        sample(model, PROMPTS, batch_size=0, **QUICK)


@pytest.mark.parametrize("omega", [-1, float("nan"), float("inf"), "8", True, [8]])
def test_bad_omega(omega):
    message = re.escape(f"omega must be a finite number, 0 or more, not {omega!r}")
    with pytest.raises(ValueError, match=message):
        Static("a knife", omega=omega)
    with pytest.raises(ValueError, match=message):
        VLDNP(by_brightness, "moji", omega=omega)
    for good in (0, 8, np.float32(8), np.int64(8)):
        assert Static("a knife", omega=good).omega == good


def test_bad_methods():
    with pytest.raises(TypeError, match="concepts"):  # no set is taken for granted
        VLDNP(by_brightness)
    with pytest.raises(ValueError, match="rule 'replace'.*did you mean 'replaced'"):
        Static("a knife", rule="replace")
    with pytest.raises(TypeError, match="vlm must be a callable.*'moji-vlm-l'"):
        VLDNP("moji-vlm-l", "moji")


def test_a_vlm_that_fails_is_recorded_and_its_image_steered_all_the_same(model):
    """The second of three queries fails: the static negative prompt is used until the third."""
    calls = []

    def failing(images, question):
        calls.append(len(images))
        if len(calls) % 3 == 2:
            raise TimeoutError("too late")
        return ["a knife"] * len(images)

    everything, asked = ", ".join(load_concepts("moji").vocabulary), {"query_steps": [0, 2, 4]}
    method = VLDNP(failing, "moji", omega=4, on_failure="static", **asked)
    with pytest.warns(UserWarning, match="no answer about 2 images: TimeoutError: too late"):
        out = sample(model, PROMPTS, method, **QUICK)
    assert [s.negative_prompts for s in out.trace.steps] == [
        [p] * 2 for p in ["knife"] * 2 + [everything] * 2 + ["knife"] * 2
    ]
    assert out.trace.steps[2].vlm_failures == ["TimeoutError: too late"] * 2
    assert out.trace.steps[2].vlm_answers == [None, None]
    assert out.trace.model_evaluations == [18, 18]
    frame = out.trace.to_frame().set_index(["image", "step"])
    assert frame["vlm_failure"].notna().sum() == 2
    assert frame.loc[(1, 2), "vlm_failure"] == "TimeoutError: too late"
    with pytest.raises(TimeoutError):
        sample(model, PROMPTS, VLDNP(failing, "moji", omega=4, **asked), **QUICK)


def test_noise_is_drawn_where_it_is_asked_for(monkeypatch):
    drawn = []

    class Recorded(torch.Generator):
        def __new__(cls, device):
            drawn.append(device)
            return super().__new__(cls, "cpu")

    model = sd_pipeline()
    few = {"num_inference_steps": 1, "progress": False}
    plain = sample(model, "a cat", CFG(), seeds=[3], **few)
    monkeypatch.setattr("vldnp.batch.Generator", Recorded)
    there = sample(model, "a cat", CFG(), seeds=[3], noise_device="cuda", **few)
    assert drawn == ["cuda"] and torch.equal(plain.latents, there.latents)
