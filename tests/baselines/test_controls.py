from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import EulerAncestralDiscreteScheduler
from tiny import ScriptedVLM, by_brightness

from vldnp import CFG, VLDNP, sample
from vldnp.baselines.controls import AnswersNone, Judged, closed_loop, random_concepts, rolled_out
from vldnp.baselines.sld import sld
from vldnp.batch import batch_of
from vldnp.concepts import load_concepts
from vldnp.guider import View, guider
from vldnp.models.judges import Judgement
from vldnp.models.run import Run
from vldnp.negatives import Negative

PROMPTS, SEEDS = ["a cat", "a dog", "a cat"], [3, 4, 5]
QUICK = {"num_inference_steps": 4, "progress": False}
MOJI = load_concepts("moji")


class BrightnessJudge:
    """Finds a knife in a bright image, a skull in one that is bright at the top."""

    name, revision = "brightness", "1"

    def __init__(self):
        self.shown = []

    def __call__(self, images):
        arrays = [np.asarray(image) for image in images]
        self.shown.append(arrays)
        found = [(float(a.mean() > 117), float(a[:16].mean() > a[16:].mean())) for a in arrays]
        concepts = [dict(zip(("knife", "skull"), pair, strict=True)) for pair in found]
        return Judgement(np.array([max(pair) for pair in found]), concepts)


def says(*answers):
    return VLDNP(lambda images, question: list(answers), "moji")


def looked(method, samples, step=0):
    """The terms after a query about images of these prompts and seeds."""
    prompts, seeds = map(list, zip(*samples, strict=True))
    guider = SimpleNamespace(batch=SimpleNamespace(prompts=prompts, seeds=seeds))
    how = {"images": ["image"] * len(samples), "rows": range(len(samples)), "index": step}
    view = SimpleNamespace(guider=guider, **how)
    return [n.concepts for n in method.negatives.look(view, [Negative() for _ in samples])]


def test_a_vlm_that_sees_nothing_is_cfg_bit_for_bit(model):
    plain = sample(model, PROMPTS, seeds=SEEDS, **QUICK)
    for rule in ("added", sld("max")):
        method = VLDNP(AnswersNone(), "moji", query_steps=range(4), rule=rule)
        out = sample(model, PROMPTS, method, seeds=SEEDS, **QUICK)
        assert torch.equal(out.latents, plain.latents)
        assert out.trace.vlm_calls == [4] * 3


def test_random_concepts_are_as_many_and_others():
    everything = ", ".join(MOJI.vocabulary)
    method = random_concepts(says("none", "knife", "knife, skull, beer", everything))
    named = looked(method, [("a cat", seed) for seed in range(4)])
    assert [len(terms) for terms in named] == [0, 1, 3, 0]
    assert "knife" not in named[1] and not {"knife", "skull", "beer"} & set(named[2])


def test_random_concepts_follow_from_the_image_and_the_seed():
    samples = [("a cat", seed) for seed in range(20)] + [("a dog", 0)]
    method = says(*["knife, skull"] * 21)
    named = looked(random_concepts(method), samples)
    assert looked(random_concepts(method), samples[::-1]) == named[::-1]  # whatever the batch
    assert len(set(named)) > 10 and looked(random_concepts(method, seed=1), samples) != named
    with pytest.raises(ValueError, match="a random control needs seeds"):
        looked(random_concepts(says("knife")), [("a cat", None)])


def test_random_concepts_in_the_sampler(model):
    method = random_concepts(VLDNP(ScriptedVLM(by_brightness), "moji", query_steps=[1, 2]))
    together = sample(model, PROMPTS, method, seeds=SEEDS, **QUICK)
    alone = sample(model, PROMPTS[1], method, seeds=SEEDS[1:2], **QUICK)
    concepts = [step.concepts[1] for step in together.trace.steps]
    assert concepts == [step.concepts[0] for step in alone.trace.steps]
    assert any(step.concepts[k] for step in together.trace.steps for k in range(3))


def test_a_roll_out_ends_where_cfg_does(model):
    """From any step on, with a scheduler that remembers (multistep) and one that draws noise."""
    sde = EulerAncestralDiscreteScheduler.from_config(model.pipe.scheduler.config)
    for scheduler in ("dpm++", sde):
        plain = sample(model, PROMPTS, seeds=SEEDS, scheduler=scheduler, **QUICK)
        run, batch = Run(model, 4, scheduler), batch_of(PROMPTS, SEEDS)
        own, cond = guider(CFG(), run, batch), run.encode(PROMPTS)
        latents = run.initial_latents(batch.generators)
        with torch.no_grad():
            for i, t in enumerate(run.timesteps):
                ended = rolled_out(View(own, i, own.images, latents, latents))
                torch.testing.assert_close(ended, plain.latents, rtol=1e-3, atol=1e-3)
                both = run.predict(torch.cat([latents] * 2), t, run.null_conditioning(3) + cond)
                u, c = both.chunk(2)
                latents = run.step(u + 7.5 * (c - u), t, latents, batch.generators)
        torch.testing.assert_close(latents, plain.latents, rtol=1e-3, atol=1e-3)


def test_the_closed_loop_judges_where_cfg_would_end(model):
    judge = BrightnessJudge()
    method = closed_loop(VLDNP(Judged(judge), "moji", query_steps=[0, 2]))
    out = sample(model, PROMPTS, method, seeds=SEEDS, **QUICK)
    plain = sample(model, PROMPTS, seeds=SEEDS, **QUICK)
    first = np.stack(judge.shown[0]).astype(int)
    ends = np.stack([np.asarray(image) for image in plain.images])
    assert np.abs(first - ends).max() <= 1, "before any steering it is CFG's own image"
    seen = BrightnessJudge()(plain.images).found()
    assert [set(found) for found in out.trace.steps[0].concepts] == [set(s) for s in seen]
    # The second query follows the path that the steering has taken.
    steered = [row for row, found in enumerate(seen) if found]
    same = [np.array_equal(judge.shown[1][row], judge.shown[0][row]) for row in steered]
    assert steered and not any(same)
