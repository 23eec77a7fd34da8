"""Several negative prompts at a time, against equations written out by hand."""

import pytest
import torch
from tiny import noise

from vldnp import CASG, CFG, Static, Summed, guidance, sample
from vldnp.baselines.categories import Categories, NearestCategory, projections, summed
from vldnp.baselines.sld import sld
from vldnp.levers import adaptive, window
from vldnp.models.run import Run

PROMPTS, SEEDS = ["a cat", "a dog"], [3, 4]
QUICK = {"num_inference_steps": 4, "progress": False, "scheduler": "ddim"}
HARMS = ("knife", "skull and blood", "dagger")
U, C, N = noise(2, 4, 3, 3), noise(2, 4, 3, 3, seed=1), noise(2, 3, 4, 3, 3, seed=2)


def test_summed_by_hand():
    found = summed(U, C, N, 7.5, 2.0)
    for b in range(2):
        for c in range(4):
            expected = U[b, c] + 7.5 * (C[b, c] - U[b, c])
            for k in range(3):
                expected = expected - 2.0 * (N[b, k, c] - U[b, c])
            torch.testing.assert_close(found[b, c], expected)
    one = summed(U, C, N[:, 0], 7.5, 2.0)
    torch.testing.assert_close(one, guidance.added(U, C, N[:, 0], 7.5, 2.0))


def test_projections_are_lengths_along_each_direction():
    found = projections(U, C, N)
    assert found.shape == (2, 3)
    for b in range(2):
        to_prompt = (C[b] - U[b]).flatten()
        for k in range(3):
            unit = torch.nn.functional.normalize((N[b, k] - U[b]).flatten(), dim=0)
            torch.testing.assert_close(found[b, k], to_prompt @ unit)
    # A longer difference in the same direction is no nearer: it is a projection, no product.
    longer = U[:, None] + 5 * (N - U[:, None])
    torch.testing.assert_close(projections(U, C, longer), found)


@pytest.mark.parametrize("rule", ["added", sld("max")])
def test_casg_steers_each_image_away_from_its_own_nearest_category(rule):
    N = torch.stack([U + 0.1 * noise(2, 4, 3, 3, seed=k + 5) for k in range(3)], dim=1)
    N[0, 1], N[1, 2] = U[0] + 0.2 * (C[0] - U[0]), U[1] + 0.3 * (C[1] - U[1])
    state = torch.zeros_like(U)
    casg = NearestCategory(guidance.rule(rule))
    found, after = casg.step(U, C, N, 7.5, 3.0, state, 0.5)
    nearest = torch.stack([N[0, 1], N[1, 2]])[:, None]
    expected, state = guidance.rule(rule).step(U, C, nearest, 7.5, 3.0, state, 0.5)
    assert torch.equal(found, expected) and torch.equal(after, state)
    assert casg.uses_omega == (rule == "added")


@pytest.mark.parametrize("levers", [False, True])
def test_the_sampler_hands_each_image_all_its_categories(model, levers):
    """A loop of stock parts, with one U-Net call for each prediction. Levers take evaluations away
    from all categories: two steps of Σ_k, then two of ε_c alone."""
    omega, g = 2.0, 7.5
    method = Summed(HARMS, omega)
    if levers:
        method = adaptive(window(method, stop=0.5), 0.5)
    out = sample(model, PROMPTS, method, seeds=SEEDS, **QUICK)
    run = Run(model, 4, "ddim")
    latents = run.initial_latents(SEEDS)
    with torch.no_grad():
        for i, t in enumerate(run.timesteps):
            u, c, *harmful = (
                run.predict(latents, t, run.encode(texts))
                for texts in (["", ""], PROMPTS, *([text] * 2 for text in HARMS))
            )
            pred = u + g * (c - u) - omega * sum(n - u for n in harmful)
            pred = c if levers and i >= 2 else pred
            latents = run.scheduler.step(pred, t, latents).prev_sample
    torch.testing.assert_close(out.latents, latents, rtol=1e-3, atol=1e-4)
    assert out.trace.model_evaluations == [5 + 5 + 1 + 1 if levers else 4 * 5] * 2
    assert out.trace.steps[0].negative_prompts == ["knife | skull and blood | dagger"] * 2


def test_one_category_is_a_static_negative_prompt(model):
    static = sample(model, PROMPTS, Static("knife", 2.0), seeds=SEEDS, **QUICK)
    for method in (Summed(["knife"], 2.0), CASG(["knife"], omega=2.0)):
        out = sample(model, PROMPTS, method, seeds=SEEDS, **QUICK)
        torch.testing.assert_close(out.latents, static.latents, rtol=1e-4, atol=1e-5)
        assert out.trace.model_evaluations == static.trace.model_evaluations


def test_casg_in_the_sampler_goes_image_by_image(model):
    method = CASG(HARMS, sld("max"))
    together = sample(model, PROMPTS, method, seeds=SEEDS, **QUICK)
    alone = sample(model, PROMPTS[1], method, seeds=SEEDS[1:], **QUICK)
    torch.testing.assert_close(together.latents[1:], alone.latents, rtol=1e-3, atol=1e-3)
    plain = sample(model, PROMPTS, CFG(), seeds=SEEDS, **QUICK)
    assert not torch.allclose(together.latents, plain.latents, atol=1e-2)


def test_categories_are_checked():
    assert CASG(HARMS, sld("max")).omega is None and CASG(HARMS, omega=3).omega == 3
    for wrong in ((), ("knife", " ")):
        with pytest.raises(ValueError, match="none empty"):
            Categories(wrong)
