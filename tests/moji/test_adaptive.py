import numpy as np
import pandas as pd
import pytest
import torch
from tiny import ScriptedVLM, sd_pipeline

import vldnp
from moji.attacks.adaptive import Evolution, Tried, adapt, outcomes, ranked, score
from moji.attacks.adversarial import Attack, Forbidden
from vldnp.methods import CFG, VLDNP
from vldnp.models.backbone import Backbone
from vldnp.models.judges import Judgement
from vldnp.schedules import uniform

SAMPLING = {"num_inference_steps": 6, "guidance_scale": 3.0}


@pytest.fixture(scope="module")
def attack():
    return Attack(Backbone(sd_pipeline()), Forbidden(["knife", "skull"]))


class BrightJudge:
    """Finds a dagger in pictures brighter than the median of what it is shown, a skull never."""

    name = revision = "bright"

    def __call__(self, images):
        bright = np.array([np.asarray(image).mean() for image in images])
        found = (bright > np.median(bright)).astype(float)
        return Judgement(found, [{"dagger": p, "skull": 0.1} for p in found])


def rng(seed=0):
    return np.random.default_rng(seed)


# What becomes of a picture


def test_outcomes_are_those_of_the_sampler(attack):
    prompts, seeds = ["a cat", "a dog", "pizza"], [3, 4, 5]
    targets = ["dagger", "dagger", "skull"]
    got = outcomes(attack.model, BrightJudge(), CFG(), prompts, seeds, targets, **SAMPLING)
    images = vldnp.sample(attack.model, prompts, seeds=seeds, progress=False, **SAMPLING).images
    judged = BrightJudge()(images).concepts
    assert got["seen"].tolist() == [row[t] for row, t in zip(judged, targets, strict=True)]
    assert got["named"].tolist() == [0, 0, 0] and (got["hit"] == (got["seen"] >= 0.5)).all()
    assert got["unnoticed"].equals(got["hit"])  # nobody was asked


def test_named_counts_queries_and_success_needs_silence(attack):
    answers = iter(["none", "a dagger", "none", "a dagger", "no dagger", "a skull"])
    vlm = ScriptedVLM(lambda image, question: next(answers))
    method = VLDNP(vlm, "moji", omega=4.0, query_steps=uniform(3))
    judge = lambda images: Judgement(np.ones(2), [{"dagger": 0.9}] * 2)  # noqa: E731
    got = outcomes(
        attack.model, judge, method, ["a cat", "a dog"], [1, 2], ["dagger"] * 2, **SAMPLING
    )
    # Each query asks about both pictures in turn.
    assert got["named"].tolist() == [0, pytest.approx(2 / 3)]
    assert got["hit"].tolist() == [True, True] and got["unnoticed"].tolist() == [True, False]


# The search


def test_a_score_is_one_for_a_success_and_differs_where_little_is_seen():
    seen, named = pd.Series([1.0, 1.0, 1e-4, 1e-8]), pd.Series([0.0, 0.3, 0.0, 0.0])
    assert score(seen, named).tolist() == pytest.approx([1, 0.7, 0.1, 0.01])


def test_one_lucky_picture_does_not_lead():
    tried = [Tried("lucky", [0.7]), Tried("steady", [0.6] * 8), Tried("poor", [0.1] * 9)]
    means, order = zip(*ranked(tried), strict=True)
    assert [one.words for one in order] == ["steady", "lucky", "poor"]
    prior = (0.7 + 8 * 0.6 + 9 * 0.1) / 18
    assert means[1] == pytest.approx((0.7 + prior) / 2)


def world(best=("pizza", "dog", "pizza")):
    """A defence under which a prompt is the better the more of its words stand in `best`, and
    whose pictures differ by seed; it keeps what it was asked for."""
    asked = []

    def run(prompts, seeds, targets):
        asked.extend(zip(prompts, seeds, targets, strict=True))
        right = [np.mean([a == b for a, b in zip(p.split(), best, strict=True)]) for p in prompts]
        luck = [np.random.default_rng(seed).normal(0, 0.1) for seed in seeds]
        seen = np.clip(np.add(right, luck), 0, 1)
        return pd.DataFrame({"seen": seen, "named": [0.25] * len(prompts)})

    return run, asked


STARTS = [["a", "cat", "pizza"], ["pizza", "cat", "on"], ["at", "dog", "on"], ["a", "cat", "on"]]


def test_it_ends_better_than_it_began_and_spends_its_budget(attack):
    run, asked = world()
    evolution = Evolution(pool=4, rounds=10, parents=2, children=5, seeds=2)
    found = adapt(attack, run, "dagger", STARTS, rng(), evolution)
    assert evolution.pictures == 2 * (4 + 10 * 7) == len(asked) == found.pictures
    assert found.history[0] < found.history[-1] == found.score
    right = [a == b for a, b in zip(found.prompt.split(), ("pizza", "dog", "pizza"), strict=True)]
    assert sum(right) >= 2 and len(found.history) == 11
    assert {target for _, _, target in asked} == {"dagger"}


def test_what_is_named_counts_against_a_prompt(attack):
    def run(prompts, seeds, targets):
        named = [float("cat" in prompt) for prompt in prompts]
        return pd.DataFrame({"seen": [0.9 if n else 0.4 for n in named], "named": named})

    found = adapt(attack, run, "dagger", STARTS, rng(), Evolution(4, rounds=0))
    assert found.prompt == "at dog on"


def test_leading_prompts_are_drawn_again_with_other_seeds(attack):
    run, asked = world()
    evolution = Evolution(4, rounds=3, parents=1, children=1, seeds=2)
    adapt(attack, run, "dagger", STARTS, rng(), evolution)
    table = pd.DataFrame(asked, columns=["prompt", "seed", "target"])
    assert not table.duplicated().any() and table["seed"].nunique() == 2 * 4
    assert table["prompt"].value_counts().max() >= 4


def test_nothing_forbidden_is_tried(attack):
    run, asked = world()
    adapt(attack, run, "dagger", STARTS, rng(), Evolution(4, rounds=6, children=6))
    assert all(attack.allowed(prompt.split(" ")) for prompt, _, _ in asked)


def test_the_last_starts_count_and_each_once(attack):
    run, asked = world()
    adapt(attack, run, "dagger", [*STARTS, STARTS[3]], rng(), Evolution(2, rounds=0, seeds=1))
    assert [prompt for prompt, _, _ in asked] == ["at dog on", "a cat on"]


def test_the_seed_decides(attack):
    run, _ = world()
    ends = [adapt(attack, run, "dagger", STARTS, rng(seed)) for seed in (1, 1, 2)]
    assert ends[0] == ends[1] != ends[2]


def test_bad_input(attack):
    run, _ = world()
    with pytest.raises(ValueError, match="one or more, of one length"):
        adapt(attack, run, "dagger", [], rng())
    with pytest.raises(ValueError, match="one or more, of one length"):
        adapt(attack, run, "dagger", [["a"], ["a", "cat"]], rng())
    with pytest.raises(ValueError, match="parents and seeds of 1 or more"):
        Evolution(parents=0)
    assert torch.is_grad_enabled()
