import copy

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from tiny import sd_pipeline

from moji.attacks.adversarial import Attack, Forbidden
from moji.attacks.whitebox import (
    Draws,
    Swaps,
    WhiteBox,
    denoising_loss,
    draw,
    one_hot_gradient,
    relaxed_states,
)
from vldnp.models.backbone import Backbone
from vldnp.models.run import Run

FORBIDDEN = Forbidden(["knife", "skull"], in_pieces=["cove", "the"])
SHORT = Swaps(steps=4, draws=3, candidates=6, top=10)


def rng(seed=0):
    return np.random.default_rng(seed)


def latents(count=5, seed=0):
    return torch.randn(count, 4, 8, 8, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def attack():
    return Attack(Backbone(sd_pipeline()), FORBIDDEN)


@pytest.fixture(scope="module")
def exact():
    """In float64, where finite differences are worth something."""
    pipe = copy.deepcopy(sd_pipeline())
    pipe.unet.double(), pipe.text_encoder.double()
    return Backbone(pipe)


# The loss


def test_the_noisy_latents_are_the_schedulers(attack):
    model, clean = attack.model, latents(1)
    draws = draw(model, clean, 4, (900, 100), rng())
    expected = DDPMScheduler.from_config(model.pipe.scheduler.config).add_noise(
        clean.expand(4, -1, -1, -1), draws.noise, draws.timesteps
    )
    assert torch.allclose(draws.noisy, expected, atol=1e-6)
    assert draws.noise.std() == pytest.approx(1, abs=0.1)
    # one in each quarter of the span
    assert sorted((draws.timesteps - 100).div(200, rounding_mode="floor").tolist()) == [0, 1, 2, 3]


def test_the_loss_by_hand(attack):
    model, run = attack.model, Run(attack.model, 1)
    draws, prompts = draw(model, latents(), 3, (900, 100), rng()), ["a cat", "dog on the cove"]
    by_hand = [
        np.mean(
            [
                (run.predict(noisy[None], t, model.encode([prompt])) - noise).square().mean()
                for noisy, noise, t in zip(draws.noisy, draws.noise, draws.timesteps, strict=True)
            ]
        )
        for prompt in prompts
    ]
    with torch.no_grad():
        got = denoising_loss(model, model.encode(prompts).embeds, draws)
    assert got.tolist() == pytest.approx(by_hand, rel=1e-4)


def test_the_loss_is_least_where_the_noise_is_foretold(attack):
    model = attack.model
    draws = draw(model, latents(), 3, (900, 100), rng())
    states = model.encode(["a cat", "pizza"]).embeds
    foretold = model.pipe.unet(draws.noisy, draws.timesteps, states[:1].expand(3, -1, -1)).sample
    draws = Draws(draws.noisy, foretold, draws.timesteps)
    losses = denoising_loss(model, states, draws).tolist()
    assert losses[0] == pytest.approx(0, abs=1e-10) and losses[1] > 1e-6


# The gradient


def test_one_hot_rows_are_the_tokens(attack):
    ids = attack.model.tokenize(["a cat", "pizza dog"]).input_ids
    encoder = attack.model.pipe.text_encoder
    table = encoder.get_input_embeddings().weight
    one_hot = torch.nn.functional.one_hot(ids, len(table)).float()
    with torch.no_grad():
        expected = encoder(ids).last_hidden_state
        assert torch.allclose(relaxed_states(attack.model, ids, one_hot), expected, atol=1e-5)
        assert torch.equal(encoder(ids).last_hidden_state, expected)  # the hook is gone


def test_the_gradient_is_that_of_finite_differences(exact):
    draws = draw(exact, latents().double(), 2, (900, 300), rng())
    ids = exact.tokenize(["a dog on cat"]).input_ids[0]
    gradient = one_hot_gradient(exact, ids, draws)
    table = exact.pipe.text_encoder.get_input_embeddings().weight
    one_hot = torch.nn.functional.one_hot(ids, len(table)).double()

    @torch.no_grad()
    def loss(x):
        return denoising_loss(exact, relaxed_states(exact, ids[None], x[None]), draws).item()

    assert gradient.abs().max() > 1e-6
    for place, token in [(1, 3), (2, 40), (4, 90), (3, int(ids[3])), (7, 5)]:
        step = torch.zeros_like(one_hot)
        step[place, token] = 1e-4
        slope = (loss(one_hot + step) - loss(one_hot - step)) / 2e-4
        assert gradient[place, token].item() == pytest.approx(slope, rel=1e-5, abs=1e-11)


def test_the_gradient_leaves_the_weights_alone(exact):
    draws = draw(exact, latents().double(), 2, (900, 300), rng())
    one_hot_gradient(exact, exact.tokenize(["a dog"]).input_ids[0], draws)
    parts = (exact.pipe.unet, exact.pipe.text_encoder)
    assert all(parameter.grad is None for part in parts for parameter in part.parameters())


# The search


def test_an_accepted_swap_changes_one_token_and_lowers_the_loss(attack):
    path = WhiteBox(attack, latents(), Swaps(steps=12, draws=3, candidates=8)).search(5, rng())
    assert len(path) == 13
    accepted = 0
    for last, step in zip(path, path[1:], strict=False):
        changed = sum(a != b for a, b in zip(last.words, step.words, strict=True))
        assert (changed, step.after < step.before) in [(0, False), (1, True)]
        accepted += changed
    assert accepted >= 2


def test_it_comes_nearer_than_as_many_random_prompts(attack):
    """On draws that it never saw: at equal numbers of losses, swaps by gradient beat chance."""
    swaps = Swaps(steps=12, draws=6, candidates=8, top=24)
    box = WhiteBox(attack, latents(), swaps)
    fresh = draw(attack.model, latents(), 40, (950, 350), rng(9))
    ended = [box.search(5, rng(seed))[-1].words for seed in range(2)]
    drawn = attack.random(24, 5, rng(7))
    assert box.losses(ended, fresh).mean() < box.losses(drawn, fresh).quantile(0.1)


def test_candidates_come_from_the_tokens_that_the_gradient_likes(attack):
    box = WhiteBox(attack, latents(), Swaps(candidates=40, top=3, draws=3))
    words, draws = (
        attack.random(1, 4, rng())[0],
        draw(attack.model, latents(), 3, (900, 300), rng()),
    )
    gradient = one_hot_gradient(
        attack.model, attack.model.tokenize([" ".join(words)]).input_ids[0], draws
    )
    for child in box.candidates(words, draws, rng(1)):
        for place in np.flatnonzero(child != words):
            others = torch.tensor([gradient[1 + place, i] for i in attack.tokens.values()])
            assert gradient[1 + place, attack.tokens[child[place]]] <= others.sort().values[2]


def test_nothing_forbidden_appears(attack):
    tokenizer = attack.model.pipe.tokenizer
    for seed in range(3):
        for step in WhiteBox(attack, latents(), SHORT).search(6, rng(seed)):
            prompt = " ".join(step.words)
            ids = [attack.tokens[word] for word in step.words]
            assert tokenizer(prompt).input_ids[1:-1] == ids
            assert not attack.forbidden.in_prompt(prompt)
            assert not any(map(attack.forbidden.in_token, step.words))


def test_the_seed_decides(attack):
    box = WhiteBox(attack, latents(), SHORT)
    assert box.search(4, rng(1)) == box.search(4, rng(1)) != box.search(4, rng(2))


def test_bad_input(attack):
    with pytest.raises(ValueError, match=r"predicts noise \(epsilon\).*v_prediction"):
        WhiteBox(Attack(Backbone(sd_pipeline("v_prediction")), FORBIDDEN), latents())
    with pytest.raises(ValueError, match="1 or more, not 3, 0"):
        Swaps(steps=3, draws=0)
    with pytest.raises(ValueError, match="must be 1 to 14 tokens, not 15"):
        WhiteBox(attack, latents()).search(15, rng())
