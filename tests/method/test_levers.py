"""The levers, against a loop for one image that knows them by their definitions alone."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny import ScriptedVLM, sd_pipeline
from tiny_models import sd3_pipeline, tiny_vae

from vldnp.concepts import load_concepts
from vldnp.levers import adaptive, gate, preview, window
from vldnp.methods import CFG, VLDNP
from vldnp.models.backbone import Backbone, Preview, to_pil
from vldnp.models.run import Run
from vldnp.sampler import denoise, sample

PROMPTS = ["a cat", "a dog at the pirate cove", "pizza"]
SEEDS, SCALES = [1, 2, 3], [3.0, 7.5, 5.0]
STEPS, OMEGA, QUERIES = 9, 4.0, (1, 2, 4, 5, 7)
TINY = tiny_vae()
DECODER = Preview(TINY, "tiny", "1")


def reply(image, question):
    """Answers that change from query to query."""
    return ("none", "a knife", "a skull and a dagger")[int(np.asarray(image).mean() * 4) % 3]


@torch.no_grad()
def alone(model, k, scheduler, *, start=None, active=lambda p: True, threshold=2.0, tiny=None):
    """VL-DNP for image k from the levers' definitions: one row a call, and every call counted."""
    run, concepts = Run(model, STEPS, scheduler), load_concepts("moji")
    x, g, prompt, seen, after = run.initial_latents([SEEDS[k]]), SCALES[k], None, None, []
    for i, t in enumerate(run.timesteps):
        calls = []

        def eps(text, t=t, x=x, calls=calls):
            calls.append(text)
            return run.predict(x, t, run.encode([text]) if text else run.null_conditioning(1))

        dropped = start is not None and i / STEPS >= start
        c, u = eps(PROMPTS[k]), None
        if not dropped or prompt and active(i / STEPS):
            u = eps("")
        pred = c if u is None else u + g * (c - u)
        x0, asked = run.x0(pred, t, x), 0
        if i in QUERIES and (seen is None or cos(x0, seen) < threshold):
            shown = (tiny.decode(x0.float()).sample / 2 + 0.5).clamp(0, 1) if tiny else None
            picture = to_pil(run.backbone.decode(x0) if shown is None else shown)[0]
            asked, seen = 1, x0
            found = concepts.parse(reply(picture, concepts.question))
            prompt = concepts.negative_prompt(found)
        if prompt and active(i / STEPS):
            u = eps("") if u is None else u
            pred = u + g * (c - u) - OMEGA * (eps(prompt) - u)
        x = run.step(pred, t, x)
        after.append(SimpleNamespace(x=x[0], prompt=prompt, spent=len(calls), asked=asked))
    return after


def cos(a, b):
    return float((a * b).sum() / (a.norm() * b.norm()))


MODELS = {
    "noise": (sd_pipeline, "ddim"),
    "velocity": (lambda: sd_pipeline("v_prediction"), "ddim"),
    "flow": (sd3_pipeline, "euler"),
}


@pytest.fixture(scope="module")
def exact():
    """In float64, so that no threshold is passed by rounding (flow matching steps in float32)."""
    models = {}

    def build(kind):
        pipeline, scheduler = MODELS[kind]
        if kind not in models:
            models[kind] = Backbone(pipeline().to(dtype=torch.float64))
        return models[kind], scheduler, 1e-5 if kind == "flow" else 1e-9

    return build


def vldnp():
    return VLDNP(ScriptedVLM(reply), "moji", OMEGA, QUERIES)


def all_levers():
    method = window(adaptive(vldnp(), 5 / 9), 2 / 9, 8 / 9)
    return preview(gate(method, 0.98), DECODER)


INNER = {"active": lambda p: 2 / 9 <= p < 8 / 9}
CASES = {
    "noise, none": (vldnp, {}),
    "noise, adaptive": (lambda: adaptive(vldnp(), 0.6), {"start": 0.6}),
    "noise, early": (lambda: window(vldnp(), stop=5 / 9), {"active": lambda p: p < 5 / 9}),
    "noise, late": (lambda: window(vldnp(), start=4 / 9), {"active": lambda p: p >= 4 / 9}),
    "velocity, gate": (lambda: gate(vldnp(), 0.98), {"threshold": 0.98}),
    "noise, preview": (lambda: preview(vldnp(), DECODER), {"tiny": TINY}),
    "velocity, all": (all_levers, {"start": 5 / 9, "threshold": 0.98, "tiny": TINY, **INNER}),
    "flow, adaptive": (lambda: adaptive(vldnp(), 0.5), {"start": 0.5}),
}


@pytest.mark.parametrize("case", CASES)
def test_a_batch_is_the_loop_for_one_image(exact, case):
    make, known = CASES[case]
    model, scheduler, atol = exact(case.partition(",")[0])
    asked = {"seeds": SEEDS, "guidance_scale": SCALES, "scheduler": scheduler}
    steps = list(denoise(model, PROMPTS, make(), num_inference_steps=STEPS, **asked))
    spent = set()
    for k in range(len(PROMPTS)):
        for ours, expected in zip(steps, alone(model, k, scheduler, **known), strict=True):
            assert ours.negative_prompts[k] == expected.prompt
            assert ours.model_evaluations[k] == expected.spent
            assert ours.vlm_calls[k] == ours.x0_decodes[k] == expected.asked
            assert ours.vlm_answers[k] is None or expected.asked
            assert (ours.x0_images[k] is not None) == expected.asked
            torch.testing.assert_close(ours.latents[k], expected.x, atol=atol, rtol=0)
            spent.add((expected.spent, expected.prompt is None))
    calls = {sum(step.vlm_calls[k] for step in steps) for k in range(3)}
    gated = "threshold" in known
    assert 1 < min(calls) < len(QUERIES) if gated else calls == {len(QUERIES)}
    assert spent >= {(3, False), (1, True)} if "start" in known else spent >= {(3, False)}


def test_adaptive_guidance_without_a_vlm(exact):
    """From the start on, the image is generated by ε_c alone: the sampler at g = 1."""
    model, scheduler, _ = exact("noise")
    asked = {"seeds": [7], "num_inference_steps": 6, "scheduler": scheduler, "progress": False}
    out = sample(model, "a cat", adaptive(CFG(), 0), **asked)
    expected = sample(model, "a cat", guidance_scale=1.0, **asked)
    torch.testing.assert_close(out.latents, expected.latents, atol=1e-9, rtol=0)
    assert out.trace.model_evaluations == [6]
    assert sample(model, "a cat", adaptive(CFG(), 0.5), **asked).trace.model_evaluations == [9]


def test_levers_are_recorded_only_where_they_are_on():
    """So that settings keep their digests."""
    plain = {"name": "cfg", "negatives": {"kind": "none"}, "rule": "added", "omega": None}
    assert CFG().describe() == {**plain, "conditioning": {"kind": "as written"}}
    assert set(vldnp().describe()) == set(CFG().describe())
    said = all_levers().describe()
    assert said["adaptive"] == {"start": 5 / 9}
    assert said["window"] == {"start": 2 / 9, "stop": 8 / 9}
    assert said["negatives"]["gate"] == 0.98 and said["previewed"]["decoder"] == DECODER.describe()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda m: adaptive(m, 1.5), "start must be a finite number from 0 to 1, not 1.5"),
        (lambda m: gate(m, 1.5), "threshold must be a finite number from -1 to 1, not 1.5"),
        (lambda m: window(m, 0.5, 2), "stop must be a finite number from 0.5 to 1, not 2"),
        (lambda m: preview(m, TINY), "preview must be opened by vldnp.load_preview"),
    ],
)
def test_wrong_levers(wrong, message):
    with pytest.raises((ValueError, TypeError), match=message) as error:
        wrong(vldnp())
    assert "\n" not in str(error.value)


# What is recorded of images that were not queried
def test_batches_of_which_not_all_were_queried_make_one_trace(model):
    answers = iter(["a knife"] * 4)
    method = VLDNP(ScriptedVLM(lambda image, question: next(answers)), "moji", OMEGA, (1, 3))
    asked = {"seeds": SEEDS, "num_inference_steps": 5, "batch_size": 1, "progress": False}
    out = sample(model, PROMPTS, gate(method, -1.0), **asked)
    steps = out.trace.steps
    assert [step.queried for step in steps] == [False, True, False, False, False]
    assert out.trace.vlm_calls == out.trace.x0_decodes == [1, 1, 1]
    assert steps[3].vlm_answers == steps[3].x0_images == [None] * 3
    assert steps[3].negative_prompts == ["knife"] * 3  # the last answer stays
    table = out.trace.to_frame()
    assert table[table.queried].groupby("image").step.apply(list).tolist() == [[1], [1], [1]]


def test_a_query_that_failed_does_not_close_the_gate(model):
    calls = []

    def fails_once(images, question):
        calls.append(len(images))
        if len(calls) == 1:
            raise RuntimeError("out of order")
        return ["a knife"] * len(images)

    method = VLDNP(fails_once, "moji", OMEGA, (0, 1, 2, 3), on_failure="static")
    asked = {"num_inference_steps": 5, "progress": False}
    with pytest.warns(UserWarning, match="out of order"):
        out = sample(model, "a cat", gate(method, -1.0), **asked)
    assert [step.vlm_calls for step in out.trace.steps] == [[1], [1], [0], [0], [0]]
