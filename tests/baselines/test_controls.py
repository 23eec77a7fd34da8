import json

import numpy as np
import pandas as pd
import pytest
import torch
from tiny import ScriptedVLM, by_brightness, sd_pipeline

from vldnp.baselines.controls import AnswersNone, Oracle, RandomConcepts, foresee, seen_in
from vldnp.baselines.sld import sld
from vldnp.core.concepts import load_concepts
from vldnp.core.methods import VLDNP
from vldnp.core.negatives import SampleId
from vldnp.core.sampler import sample
from vldnp.models.backbone import Backbone
from vldnp.models.judges import Judgement
from vldnp.models.vlm import VLMError, identified

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
    with pytest.raises(ValueError, match="need an image's seed"):
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
