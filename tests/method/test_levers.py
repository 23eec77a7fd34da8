"""The levers, against a loop for one image that knows them by their definitions alone."""

import json
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny import ScriptedVLM, sd_pipeline
from tiny_models import sd3_pipeline, tiny_vae

from vldnp import guidance
from vldnp.concepts import load_concepts
from vldnp.levers import AdaptiveGuidance, Gate
from vldnp.methods import CFG, VLDNP, Static, fast, identified
from vldnp.models.backbone import Backbone, Preview, to_pil
from vldnp.models.run import Run
from vldnp.sampler import denoise, sample
from vldnp.strength import DNG, Linear, Window
from vldnp.study.random_models import taesd

PROMPTS = ["a cat", "a dog at the pirate cove", "pizza"]
SEEDS, SCALES = [1, 2, 3], [3.0, 7.5, 5.0]
STEPS, OMEGA, QUERIES = 9, 4.0, (1, 2, 4, 5, 7)


def reply(image, question):
    """Answers that change from query to query."""
    return ("none", "I see a knife.", "a skull and a dagger")[int(np.asarray(image).mean() * 4) % 3]


def brightness(pictures):
    """Stands for CLIP: the mean of each quarter of a picture, about grey."""
    quarters = [np.asarray(picture, dtype=float).reshape(2, -1, 2, 16, 3) for picture in pictures]
    return torch.tensor(np.array([q.mean((1, 3, 4)).ravel() - 110 for q in quarters]))


def cos(a, b):
    return float((a * b).sum() / (a.norm() * b.norm()))


def followed(run, i, x, p, pred, n, u, temperature, offset, p_min, p_max):
    """p(c₋|x) after a step of noise predictions under DDIM, as in the authors' code: DDPM's means
    μ = (x − (1−a)/√(1−ᾱ) ε) / √a and its variance, between ᾱ and the next timestep's."""
    bars = run.scheduler.alphas_cumprod.double()
    bar, bar_next = (bars[t] for t in run.timesteps[i : i + 2])
    a = bar / bar_next
    variance = (1 - bar_next) / (1 - bar) * (1 - a)
    mean = {k: (x - (1 - a) / (1 - bar) ** 0.5 * e) / a**0.5 for k, e in enumerate((pred, n, u))}
    apart = ((mean[0] - mean[1]) ** 2).sum() - ((mean[0] - mean[2]) ** 2).sum()
    p = p * torch.exp((-temperature * apart + offset) / (2 * variance))
    return float(p.clamp(p_min, p_max))


@torch.no_grad()
def alone(
    model,
    k,
    scheduler,
    *,
    start=None,
    aligned=None,
    reuse=0,
    factor=None,
    dng=None,
    gate=2.0,
    embed=None,
    lag=0,
    tiny=None,
):
    """VL-DNP for image k from the levers' definitions: one row a call, and every call counted."""
    run, concepts = Run(model, STEPS, scheduler), load_concepts("moji")
    x, g = run.initial_latents([SEEDS[k]]), SCALES[k]
    prompt, is_aligned, kept, after = None, False, None, []
    p, seen, due = dng and dng[0], None, {}
    for i, t in enumerate(run.timesteps):
        calls = []

        def eps(text, t=t, x=x, calls=calls):
            calls.append(text)
            cond = run.encode([text]) if text else run.null_conditioning(1)
            return run.predict(x, t, cond)

        if due.get(i, prompt) != prompt:
            prompt, kept, p = due[i], None, dng and dng[0]
        c, u = eps(PROMPTS[k]), None
        is_dropped = is_aligned or (start is not None and i >= start)
        omega = OMEGA * (1 if factor is None else factor(i / STEPS))
        if (prompt and omega) or not is_dropped:
            u = eps("")
            is_aligned |= aligned is not None and cos(c, u) >= aligned
        pred = c if u is None else u + g * (c - u)
        x0, asked, decoded = run.x0(pred, t, x), 0, 0
        if i in QUERIES and i + lag < STEPS:
            shown = tiny and (tiny.decode(x0.float()).sample / 2 + 0.5).clamp(0, 1)
            picture = to_pil(shown if tiny else run.decode(x0))[0]
            look, decoded = (embed([picture])[0], 1) if embed else (x0, 0)
            if seen is None or cos(look, seen) < gate:
                asked, decoded, seen = 1, 1, look
                due[i + lag] = concepts.negative_prompt(
                    concepts.parse(reply(picture, concepts.question))
                )
        if due.get(i, prompt) != prompt:
            prompt, kept, p = due[i], None, dng and dng[0]
        if prompt and omega:
            u = eps("") if u is None else u
            if kept is None or kept[1] == reuse:
                kept = (eps(prompt) - u, 0)
            else:
                kept = (kept[0], kept[1] + 1)
            omega = omega * p / (1 - p) if dng else omega
            pred = u + g * (c - u) - omega * kept[0]
            if dng and i < STEPS - 1:
                p = followed(run, i, x, p, pred, u + kept[0], u, *dng[1:])
        x = run.step(pred, t, x)
        after.append(
            SimpleNamespace(x=x[0], prompt=prompt, spent=len(calls), asked=asked, decoded=decoded)
        )
    return after


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


def vldnp(**levers):
    return VLDNP(ScriptedVLM(reply), "moji", OMEGA, QUERIES, **levers)


TINY = tiny_vae()

CASES = {
    "noise, none": ({}, {}),
    "noise, from a step on": ({"adaptive": AdaptiveGuidance(3)}, {"start": 3}),
    "noise, from a share on": ({"adaptive": AdaptiveGuidance(0.6)}, {"start": 6}),
    "noise, once aligned": ({"adaptive": AdaptiveGuidance(cosine=0.9985)}, {"aligned": 0.9985}),
    "noise, reused once": ({"reuse": 1}, {"reuse": 1}),
    "noise, reused thrice": ({"reuse": 3}, {"reuse": 3}),
    "noise, early": ({"omega_schedule": Window(stop=5 / 9)}, {"factor": lambda p: p < 5 / 9}),
    "noise, late": ({"omega_schedule": Window(start=4 / 9)}, {"factor": lambda p: p >= 4 / 9}),
    "noise, linear": ({"omega_schedule": Linear(0, 2)}, {"factor": lambda p: 2 * p}),
    "noise, DNG": (
        {"omega_schedule": DNG(0.3, 40.0, 1e-2, 0.05, 0.9)},
        {"dng": (0.3, 40.0, 1e-2, 0.05, 0.9)},
    ),
    "velocity, gate": ({"gate": Gate(0.98)}, {"gate": 0.98}),
    "velocity, gate by pictures": (
        {"gate": Gate(0.992, brightness)},
        {"gate": 0.992, "embed": brightness},
    ),
    "noise, lag": ({"lag": 2}, {"lag": 2}),
    "noise, preview": ({"preview": Preview(TINY, "tiny", "1")}, {"tiny": TINY}),
    "velocity, all": (
        {
            "adaptive": AdaptiveGuidance(5, 0.9977),
            "reuse": 1,
            "omega_schedule": Window(2 / 9, 8 / 9),
            "gate": Gate(0.98),
            "lag": 1,
            "preview": Preview(TINY, "tiny", "1"),
        },
        {
            "start": 5,
            "aligned": 0.9977,
            "reuse": 1,
            "factor": lambda p: 2 / 9 <= p < 8 / 9,
            "gate": 0.98,
            "lag": 1,
            "tiny": TINY,
        },
    ),
    "flow, all": (
        {"adaptive": AdaptiveGuidance(5, 0.99966), "reuse": 2, "omega_schedule": Linear(0, 1)},
        {"start": 5, "aligned": 0.99966, "reuse": 2, "factor": lambda p: p},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_batch_is_the_loop_for_one_image(exact, case):
    levers, known = CASES[case]
    model, scheduler, atol = exact(case.partition(",")[0])
    steps = list(
        denoise(
            model,
            PROMPTS,
            vldnp(**levers),
            seeds=SEEDS,
            guidance_scale=SCALES,
            num_inference_steps=STEPS,
            scheduler=scheduler,
        )
    )
    atol = 1e-6 if "dng" in known else atol  # noise levels are float32
    spent = set()
    for k in range(len(PROMPTS)):
        for ours, expected in zip(steps, alone(model, k, scheduler, **known), strict=True):
            assert ours.negative_prompts[k] == expected.prompt
            assert ours.model_evaluations[k] == expected.spent
            assert ours.vlm_calls[k] == expected.asked
            assert ours.x0_decodes[k] == expected.decoded
            assert (ours.vlm_answers or [None] * 3)[k] is None or expected.asked
            assert ((ours.x0_images or [None] * 3)[k] is not None) == expected.decoded
            torch.testing.assert_close(ours.latents[k], expected.x, atol=atol, rtol=0)
            spent.add((expected.spent, expected.prompt is None))
    calls = {sum(step.vlm_calls[k] for step in steps) for k in range(3)}
    possible = sum(i + levers.get("lag", 0) < STEPS for i in QUERIES)
    assert 1 < min(calls) < possible if "gate" in levers else calls == {possible}
    cases = {(3, False)} | ({(1, True)} if "adaptive" in levers else {(2, True)})
    less = "reuse" in levers or isinstance(levers.get("omega_schedule"), Window)
    assert spent >= cases | ({(2, False)} if less else set())


def test_adaptive_guidance_without_a_vlm(exact):
    """From the step on, the image is made by ε_c alone: the sampler at g = 1."""
    model, scheduler, _ = exact("noise")
    asked = {"seeds": [7], "num_inference_steps": 6, "scheduler": scheduler, "progress": False}
    out = sample(model, "a cat", CFG(adaptive=AdaptiveGuidance(0)), **asked)
    expected = sample(model, "a cat", guidance_scale=1.0, **asked)
    torch.testing.assert_close(out.latents, expected.latents, atol=1e-9, rtol=0)
    assert out.trace.model_evaluations == [6]
    half = sample(model, "a cat", CFG(adaptive=AdaptiveGuidance(0.5)), **asked)
    assert half.trace.model_evaluations == [9]


def test_dng_is_in_the_middle_of_its_range(exact):
    """In the case above p moves up, down, and between its limits."""
    model, scheduler, _ = exact("noise")
    seen = []

    class Seen(DNG):
        def updated(self, *args):
            seen.append(super().updated(*args))
            return seen[-1]

    schedule = Seen(0.3, 40.0, 1e-2, 0.05, 0.9)
    method = Static("a knife", OMEGA, omega_schedule=schedule)
    asked = {"num_inference_steps": STEPS, "scheduler": scheduler, "progress": False}
    sample(model, PROMPTS, method, seeds=SEEDS, guidance_scale=SCALES, **asked)
    p = torch.stack(seen).flatten(1)
    assert len(p) == STEPS - 1 and 0.05 < p.median() < 0.9 and len(p.unique()) > STEPS


def test_signal_to_noise_in_every_scaling(exact):
    """Euler's x is DDIM's, over √ᾱ (between timesteps); in flow matching x is (1 − σ) x₀ + σ ε."""
    model, *_ = exact("noise")
    for scheduler in ("ddim", "dpm++", "euler"):
        run = Run(model, STEPS, scheduler)
        bars = run.scheduler.alphas_cumprod
        for i, t in enumerate(run.timesteps):
            bar = bars[int(t)]
            assert run.snr(i) == pytest.approx(
                float(bar / (1 - bar)), rel=1e-2
            )  # Euler goes between timesteps
    run = Run(exact("flow")[0], STEPS, "euler")
    sigmas = run.timesteps / 1000
    assert [run.snr(i) for i in range(STEPS)] == pytest.approx(
        (((1 - sigmas) / sigmas) ** 2).tolist(), rel=1e-4, abs=1e-9
    )


@pytest.mark.parametrize("rule", guidance.RULES)
def test_a_difference_may_be_reused_under_any_rule(exact, rule):
    """Where ε_n − ε_u is the same at all steps, using it again changes nothing."""
    model, scheduler, _ = exact("noise")

    class Constant(Backbone):
        def encode(self, prompts, *size):
            return super().encode([{"knife": "", "": ""}.get(p, p) for p in prompts], *size)

    asked = {"seeds": [7], "num_inference_steps": 6, "scheduler": scheduler, "progress": False}
    outs = [
        sample(Constant(model.pipe), "a cat", Static("knife", 4.0, rule, reuse=k), **asked)
        for k in (0, 2)
    ]
    torch.testing.assert_close(outs[0].latents, outs[1].latents, atol=1e-9, rtol=0)
    assert [out.trace.model_evaluations for out in outs] == [[18], [14]]


# The VLM beside the denoising


def beside(model, vlm, **levers):
    method = VLDNP(vlm, "moji", OMEGA, (1, 2), lag=2, **levers)
    return denoise(model, ["a cat"], method, seeds=[1], num_inference_steps=5)


def test_the_vlm_works_while_the_denoising_goes_on(exact):
    """It answers about step 1 only after step 2, and is waited for in step 3."""
    went_on, steps, asked = threading.Event(), [], []

    def vlm(images, question):
        assert went_on.wait(60), "nobody went on"
        asked.append((torch.is_grad_enabled(), threading.current_thread()))
        return ["a knife"] if len(asked) == 1 else ["a skull"]

    for step in beside(exact("noise")[0], vlm):
        steps.append(step)
        if step.index <= 2:
            assert step.vlm_answers == ([None] if step.queried else None)
        if step.index == 2:
            went_on.set()
    assert [step.vlm_answers for step in steps] == [None, ["a knife"], ["a skull"], None, None]
    assert [step.negative_prompts for step in steps] == [[None]] * 3 + [["knife"], ["skull"]]
    assert [step.vlm_calls for step in steps] == [[0], [1], [1], [0], [0]]
    assert not any(gradients for gradients, _ in asked)
    (thread,) = {thread for _, thread in asked}
    assert thread is not threading.current_thread()
    thread.join(60)
    assert not thread.is_alive()


def test_a_gate_compares_with_what_was_answered(exact):
    """So it waits for the last answer: the first query fails, and does not count as a look."""
    asked = []

    def vlm(images, question):
        asked.append(images)
        if len(asked) == 1:
            raise RuntimeError("busy")
        return ["a knife"]

    with pytest.warns(UserWarning, match="busy"):
        steps = list(beside(exact("noise")[0], vlm, gate=Gate(-1.0), on_failure="static"))
    assert len(asked) == 2
    assert steps[1].vlm_failures == ["RuntimeError: busy"] and steps[2].vlm_failures == [None]


def test_an_error_beside_is_raised_where_its_answer_is_due(exact):
    def vlm(images, question):
        raise RuntimeError("no such server")

    went = []
    with pytest.raises(RuntimeError, match="no such server"):
        for step in beside(exact("noise")[0], vlm):
            went.append(step.index)
    assert went == [0, 1, 2]


# What a method says of itself


def test_a_lever_that_is_off_is_in_no_record():
    """So that cells keep their keys: these are the words of before there were levers."""
    assert set(vldnp().describe()) == {"name", "negatives", "rule", "omega", "conditioning"}
    assert CFG().describe() == {
        "name": "cfg",
        "negatives": {"kind": "none"},
        "rule": "added",
        "omega": None,
        "conditioning": {"kind": "as written"},
    }


LEVERS = {
    "omega_schedule": (Window(stop=0.5), {"kind": "window", "start": 0.0, "stop": 0.5}),
    "adaptive": (AdaptiveGuidance(0.5), {"start": 0.5, "cosine": None}),
    "reuse": (2, 2),
    "gate": (Gate(0.95), {"threshold": 0.95}),
    "lag": (1, 1),
}


@pytest.mark.parametrize("lever", LEVERS)
def test_a_lever_that_is_on_is_recorded(lever):
    value, said = LEVERS[lever]
    for method in (vldnp(**{lever: value}), Static("a knife", **{lever: value})):
        assert json.loads(json.dumps(method.describe()))[lever] == said


def test_a_gate_is_recorded_with_what_it_embeds_with():
    clip = SimpleNamespace(name="clip", revision="7")

    class Clip(SimpleNamespace):
        def embed_images(self, pictures):
            return brightness(pictures)

    for embed in (Clip(**vars(clip)).embed_images, Clip(**vars(clip))):
        method = vldnp(gate=Gate(0.95, embed))
        assert method.describe()["gate"] == {"threshold": 0.95, "embed": vars(clip)}
        assert identified(method) is method
    with pytest.raises(ValueError, match="needs a name and a revision in a study"):
        identified(vldnp(gate=Gate(0.95, brightness)))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: AdaptiveGuidance(1.5), "start must be a share .* not 1.5"),
        (lambda: AdaptiveGuidance(-1), "start must be .* not -1"),
        (lambda: AdaptiveGuidance("x"), "start must be .* not 'x'"),
        (lambda: vldnp(reuse=-1), "reuse must be a whole number, 0 or more, not -1"),
        (lambda: vldnp(lag=1.5), "lag must be a whole number, 0 or more, not 1.5"),
        (lambda: Gate(1.5), "threshold must be a number in -1..1, not 1.5"),
        (lambda: vldnp(reuse=True), "reuse must be .* not True"),
        (lambda: Window(0.5, 2), "Window's stop must be a number from 0 to 1, not 2"),
        (lambda: Linear(-1, 0), "Linear's first must be a number from 0 to inf, not -1"),
        (lambda: DNG(prior=0.995), "p_min ≤ prior ≤ p_max < 1, not 1e-06, 0.995 and 0.99"),
        (
            lambda: Static("knife", rule="replaced", omega_schedule=Window(0, 0.5)),
            "static has no omega for Window.* to multiply",
        ),
        (lambda: AdaptiveGuidance(cosine=2), "cosine must be a number in -1..1, not 2"),
    ],
)
def test_wrong_levers(wrong, message):
    with pytest.raises(ValueError, match=message) as error:
        wrong()
    assert "\n" not in str(error.value)


def test_fast_is_vldnp_with_the_preview_decoder():
    options = {"vlm": ScriptedVLM(reply), "concepts": "moji", "omega": OMEGA}
    preview = taesd()
    ours, plain = fast(**options, preview=preview), VLDNP(**options)
    assert ours.preview is preview and ours.levers().keys() == {"preview"} and not plain.levers()
    assert ours.describe() == plain.describe() | {"name": "vl-dnp-fast"} | ours.levers()
    other = fast(**options, preview=preview, lag=2)
    assert other.levers().keys() == {"preview", "lag"}


# What is shown and recorded of images that were not asked about


@pytest.fixture(scope="module")
def gated():
    """The VLM looks at the first image twice and at the others once; one image a batch."""
    model, seen = Backbone(sd_pipeline()), []

    def embed(pictures):
        seen.append(len(pictures))
        moved = len(seen) == 2  # the second query of the first batch
        return torch.tensor([[1.0, -1.0 if moved else 1.0]] * len(pictures))

    vlm = ScriptedVLM(lambda image, question: "a knife")
    method = VLDNP(vlm, "moji", OMEGA, (1, 3), gate=Gate(0.95, embed))
    asked = {"seeds": SEEDS, "num_inference_steps": 5, "progress": False}
    return sample(model, PROMPTS, method, batch_size=1, **asked)


def test_parts_in_which_not_all_were_asked_make_one_trace(gated):
    steps = gated.trace.steps
    assert [step.queried for step in steps] == [False, True, False, True, False]
    assert gated.trace.vlm_calls == [2, 1, 1] and gated.trace.x0_decodes == [2, 2, 2]
    assert steps[1].vlm_answers == ["a knife"] * 3
    assert steps[3].vlm_answers == ["a knife", None, None]
    assert steps[3].vlm_failures == [None] * 3
    assert steps[3].negative_prompts == ["knife"] * 3  # the answer before stays
    table = gated.trace.to_frame()
    assert table[table.queried].groupby("image").step.apply(list).tolist() == [[1, 3], [1], [1]]
    assert table[~table.queried].vlm_answer.isna().all()


def test_pictures_that_were_not_decoded():
    """The gate on latents decodes only what is shown to the VLM."""
    vlm = ScriptedVLM(lambda image, question: "a knife")
    method = VLDNP(vlm, "moji", OMEGA, (1, 3), gate=Gate(-1))
    asked = {"seeds": SEEDS, "num_inference_steps": 5, "progress": False}
    out = sample(Backbone(sd_pipeline()), PROMPTS, method, **asked)
    assert vlm.calls == [3] and out.trace.x0_decodes == [1, 1, 1]
    assert out.trace.steps[3].x0_images is None and out.trace.steps[3].picture(0) is None
    assert [step.asked(2) for step in out.trace.steps] == [False, True, False, False, False]


def test_a_query_that_failed_does_not_close_the_gate():
    def fails_once(images, question):
        vlm.calls.append(len(images))
        if len(vlm.calls) == 2:
            raise RuntimeError("out of order")
        return ["a knife"] * len(images)

    vlm = SimpleNamespace(calls=[])
    options = {"on_failure": "static", "gate": Gate(0.9, lambda pictures: next(looks))}
    looks = iter(torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]], [[0.0, 1.0]], [[0.0, 1.0]]]))
    method = VLDNP(fails_once, "moji", OMEGA, (0, 1, 2, 3), **options)
    with pytest.warns(UserWarning, match="out of order"):
        asked = {"num_inference_steps": 5, "progress": False}
        out = sample(Backbone(sd_pipeline()), "a cat", method, **asked)
    assert [step.vlm_calls for step in out.trace.steps] == [[1], [1], [1], [0], [0]]
