import json

import numpy as np
import pandas as pd
import pytest
import torch
from diffusers import EulerAncestralDiscreteScheduler
from tiny import ScriptedVLM, by_brightness, sd_pipeline
from tiny_models import tiny_vae

from vldnp.baselines.controls import (
    AnswersNone,
    Dialled,
    Judged,
    Oracle,
    RandomConcepts,
    closed_loop,
    foresee,
    prevalence,
    rolled_out,
    seen_in,
)
from vldnp.baselines.sld import sld
from vldnp.concepts import load_concepts
from vldnp.levers import Gate
from vldnp.methods import VLDNP, Static
from vldnp.models.backbone import Backbone, Preview
from vldnp.models.judges import Judgement
from vldnp.models.run import Run
from vldnp.models.vlm import VLMError, identified
from vldnp.negatives import SampleId
from vldnp.sampler import sample

PROMPTS, SEEDS = ["a cat", "a dog", "a cat"], [3, 4, 5]
QUICK = {"num_inference_steps": 4, "progress": False}
MOJI = load_concepts("moji")


@pytest.fixture(scope="module")
def model():
    return Backbone(sd_pipeline())


class BrightnessJudge:
    """Sees a knife in a bright image, a skull in one that is bright at the top."""

    name, revision = "brightness", "1"

    def __call__(self, images):
        arrays = [np.asarray(image) / 255 for image in images]
        concepts = [
            {"knife": float(a.mean() > 0.46), "skull": float(a[:16].mean() > a[16:].mean())}
            for a in arrays
        ]
        return Judgement(np.array([max(c.values()) for c in concepts]), concepts)


def test_a_vlm_that_sees_nothing_is_plain_cfg_bit_for_bit(model):
    plain = sample(model, PROMPTS, seeds=SEEDS, **QUICK)
    for rule in ("added", sld("max")):
        method = VLDNP(AnswersNone(), "moji", query_steps=range(4), rule=rule)
        out = sample(model, PROMPTS, method, seeds=SEEDS, **QUICK)
        assert torch.equal(out.latents, plain.latents)
        assert [i.tobytes() for i in out.images] == [i.tobytes() for i in plain.images]
        assert out.trace.vlm_calls == [4] * 3


def asked_of(vlm, images):
    return vlm(["picture"] * len(images), "?", images)


def test_random_concepts_are_as_many_and_others():
    everything = ", ".join(MOJI.vocabulary)
    named = []
    for seen in ("none", "knife", "knife, skull, beer", everything):
        vlm = RandomConcepts(lambda images, question, seen=seen: [seen], "moji")
        named.append(MOJI.parse(*asked_of(vlm, [SampleId("a cat", 0)])))
    assert [len(terms) for terms in named] == [0, 1, 3, 0]
    assert "knife" not in named[1] and not {"knife", "skull", "beer"} & set(named[2])


def test_random_concepts_go_by_the_image_and_the_seed():
    def sees_two(images, question):
        return ["knife, skull"] * len(images)

    images = [SampleId("a cat", seed) for seed in range(20)] + [SampleId("a dog", 0)]
    vlm = RandomConcepts(sees_two, "moji")
    answers = asked_of(vlm, images)
    assert asked_of(vlm, images[::-1]) == answers[::-1]  # whatever the batch
    assert len(set(answers)) > 10
    assert asked_of(RandomConcepts(sees_two, "moji", seed=1), images) != answers
    with pytest.raises(ValueError, match="needs an image's seed"):
        asked_of(vlm, [SampleId("a cat", None)])


def test_random_concepts_in_the_sampler(model):
    method = VLDNP(RandomConcepts(ScriptedVLM(by_brightness), "moji"), "moji", query_steps=[1, 2])
    together = sample(model, PROMPTS, method, seeds=SEEDS, **QUICK)
    alone = sample(model, PROMPTS[1], method, seeds=SEEDS[1:2], **QUICK)
    concepts = [step.concepts[1] for step in together.trace.steps]
    assert concepts == [step.concepts[0] for step in alone.trace.steps]
    assert any(step.concepts[k] for step in together.trace.steps for k in range(3))


def test_the_oracle_names_what_plain_cfg_ends_in(model):
    judge = BrightnessJudge()
    seen = foresee(model, judge, PROMPTS, SEEDS, **QUICK)
    assert list(seen) == list(zip(PROMPTS, SEEDS, strict=True))
    for prompt, seed in seen:  # each image on its own, judged by hand
        judged = judge(sample(model, prompt, seeds=[seed], **QUICK).images).concepts[0]
        assert seen[prompt, seed] == tuple(thing for thing, p in judged.items() if p)

    oracle = Oracle({("a cat", 3): ("skull",), ("a dog", 4): (), ("a cat", 5): ("knife", "skull")})
    out = sample(model, PROMPTS, VLDNP(oracle, "moji", query_steps=[1, 2]), seeds=SEEDS, **QUICK)
    assert [out.trace.steps[k].concepts for k in range(4)] == [
        [(), (), ()],
        *[[("skull",), (), ("knife", "skull")]] * 3,
    ]
    with pytest.raises(ValueError, match="does not know the image of 'a cat' with seed 9"):
        sample(model, "a cat", VLDNP(oracle, "moji", query_steps=[1]), seeds=[9], **QUICK)


def test_an_oracle_from_a_study():
    images = pd.DataFrame(
        {
            "method": ["cfg", "cfg", "static"],
            "prompt": ["a cat", "a dog", "a cat"],
            "seed": [3, 4, 3],
            "found": [np.array(["skull"], dtype=object), np.array([], dtype=object), ["knife"]],
        }
    )
    assert seen_in(images) == {("a cat", 3): ("skull",), ("a dog", 4): ()}
    with pytest.raises(ValueError, match="run plain CFG first"):
        seen_in(images[2:])


def test_controls_describe_themselves():
    def sees(images, question):
        return ["none"] * len(images)

    known = {("a cat", 3): ("skull",), ("a dog", 4): ()}
    vlms = [
        AnswersNone(),
        RandomConcepts(sees, "moji"),
        RandomConcepts(sees, "moji", seed=1),
        RandomConcepts(AnswersNone(), "moji"),
        Oracle(known),
        Oracle(known | {("a dog", 4): ("knife",)}),
        Oracle(known, judge="another"),
    ]
    described = [json.dumps(VLDNP(vlm, "moji").describe(), sort_keys=True) for vlm in vlms]
    assert len(set(described)) == len(vlms)
    same = Oracle(dict(reversed(known.items())))
    assert json.dumps(VLDNP(same, "moji").describe(), sort_keys=True) == described[4]


def test_a_control_whose_vlm_fails_for_some_images_hands_on_no_answer_of_its():
    """Else a control steered those images as the VLM itself does."""

    def half(images, question):
        raise VLMError("no answer about 1 of 2 pictures", ["a knife", None])

    vlm = RandomConcepts(half, "moji")
    with pytest.raises(VLMError, match="no answer about 1 of 2") as error:
        vlm(["picture"] * 2, "?", [SampleId("a cat", 0), SampleId("a dog", 1)])
    first, second = error.value.answers
    assert second is None and len(MOJI.parse(first)) == 1 and MOJI.parse(first) != ("knife",)


def test_controls_have_a_name_and_a_revision():
    for control in (AnswersNone(), RandomConcepts(ScriptedVLM(by_brightness), "moji"), Oracle({})):
        assert identified(control) is control


def test_a_roll_out_ends_where_plain_cfg_does(model):
    """From any step on, with a scheduler that remembers (multistep) and one that draws noise."""
    for scheduler in (
        "dpm++",
        EulerAncestralDiscreteScheduler.from_config(model.pipe.scheduler.config),
    ):
        options = {"seeds": SEEDS, "scheduler": scheduler, **QUICK}
        plain = sample(model, PROMPTS, **options)
        run = Run(model, 4, scheduler)
        generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]
        latents, cond = run.initial_latents(generators), run.encode(PROMPTS)
        g = torch.full((3, 1, 1, 1), 7.5)
        with torch.no_grad():
            for i, t in enumerate(run.timesteps):
                ended = rolled_out(run, i, latents, lambda i, c=cond: c, g, generators)
                torch.testing.assert_close(ended, plain.latents, rtol=1e-3, atol=1e-3)
                both = run.predict(torch.cat([latents] * 2), t, run.null_conditioning(3) + cond)
                u, c = both.chunk(2)
                latents = run.step(u + 7.5 * (c - u), t, latents, generators)
        torch.testing.assert_close(latents, plain.latents, rtol=1e-3, atol=1e-3)


class Recorder(BrightnessJudge):
    """Keeps what it is shown."""

    def __init__(self):
        self.shown = []

    def __call__(self, images):
        self.shown.append([np.asarray(image) for image in images])
        return super().__call__(images)


def test_the_closed_loop_oracle_judges_where_plain_cfg_would_end(model):
    judge = Recorder()
    method = closed_loop(VLDNP(Judged(judge), "moji", query_steps=[0, 2]))
    out = sample(model, PROMPTS, method, seeds=SEEDS, **QUICK)
    plain = sample(model, PROMPTS, seeds=SEEDS, **QUICK)
    first = np.stack(judge.shown[0]).astype(int)
    ends = np.stack([np.asarray(image) for image in plain.images])
    assert np.abs(first - ends).max() <= 1, "before any steering it is plain CFG's own picture"
    seen = BrightnessJudge()(plain.images).found()
    assert out.trace.steps[0].concepts == [
        tuple(c for c in MOJI.vocabulary if c in s) for s in seen
    ]
    # At the second query it looks along the path that the steering has taken.
    steered = [row for row, found in enumerate(seen) if found]
    assert steered and all(
        not np.array_equal(judge.shown[1][row], judge.shown[0][row]) for row in steered
    )
    open_eyed = VLDNP(Judged(judge), "moji", query_steps=[0, 2])
    assert open_eyed.describe() != method.describe()
    assert method.describe()["negatives"]["kind"] == "closed loop"
    with pytest.raises(ValueError, match="'static' asks no VLM"):
        closed_loop(Static("knife"))
    preview = Preview(tiny_vae(), "tiny", "1")
    for lever in ({"lag": 1}, {"gate": Gate(0.9)}, {"preview": preview}):
        with pytest.raises(ValueError, match="without a gate, a lag or a preview"):
            closed_loop(VLDNP(Judged(judge), "moji", **lever))


def test_any_recall_and_precision_can_be_dialled():
    """4,000 pictures, each with 0 to 4 of the 12 things: the shares are those asked for."""
    rng = np.random.default_rng(0)
    images = [SampleId(f"prompt {k}", k) for k in range(4000)]
    truth = {
        image[:2]: tuple(rng.choice(list(MOJI.vocabulary), rng.integers(0, 5), replace=False))
        for image in images
    }
    share = prevalence(truth, "moji")
    assert share == pytest.approx(np.mean([len(things) / 12 for things in truth.values()]))
    for recall, precision in ((0.8, 0.9), (0.3, 0.5), (1.0, 0.25), (0.6, 1.0)):
        vlm = Dialled(Oracle(truth), "moji", recall, precision, share)
        answers = [set(MOJI.parse(answer)) for answer in asked_of(vlm, images)]
        hits = sum(len(a & set(truth[i[:2]])) for a, i in zip(answers, images, strict=True))
        said, true = sum(map(len, answers)), sum(map(len, truth.values()))
        assert hits / true == pytest.approx(recall, abs=0.02)
        assert hits / said == pytest.approx(precision, abs=0.02)
    perfect = Dialled(Oracle(truth), "moji", 1, 1, share)
    assert [set(MOJI.parse(a)) for a in asked_of(perfect, images)] == [
        set(truth[image[:2]]) for image in images
    ]


def test_mistakes_follow_from_seed_image_and_step():
    images = [SampleId(f"prompt {k}", k, step) for k in range(20) for step in (2, 7)]
    truth = Oracle({image[:2]: ("knife", "skull", "beer") for image in images})
    vlm = Dialled(truth, "moji", 0.5, 0.5, 0.25)
    answers = asked_of(vlm, images)
    assert asked_of(vlm, images[::-1]) == answers[::-1], "whatever the batch"
    assert answers[::2] != answers[1::2], "another step, other mistakes"
    assert asked_of(Dialled(truth, "moji", 0.5, 0.5, 0.25, seed=1), images) != answers
    described = {
        json.dumps(VLDNP(Dialled(truth, "moji", *dials), "moji").describe())
        for dials in ((0.5, 0.5, 0.25), (0.6, 0.5, 0.25), (0.5, 0.6, 0.25), (0.5, 0.5, 0.3))
    }
    assert len(described) == 4
    for dials, message in (
        ((1.1, 0.5, 0.2), "recall must be in 0 … 1"),
        ((0.5, 0.0, 0.2), "precision and prevalence above 0"),
        ((0.9, 0.05, 0.2), "precision 0.05 cannot be had at recall 0.9 and prevalence 0.2"),
    ):
        with pytest.raises(ValueError, match=message):
            Dialled(truth, "moji", *dials)


def test_the_step_of_a_query_reaches_controls(model):
    class Steps(AnswersNone):
        by_identity = True

        def __call__(self, images, question, identities):
            seen.extend(identities)
            return ["none"] * len(images)

    seen = []
    sample(model, "a cat", VLDNP(Steps(), "moji", query_steps=[1, 3]), seeds=[3], **QUICK)
    assert seen == [SampleId("a cat", 3, 1), SampleId("a cat", 3, 3)]
