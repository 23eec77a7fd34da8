import math

import diffusers
import numpy as np
import pytest
import torch
from tiny import noise, sd_pipeline

from vldnp import guidance
from vldnp.baselines.contrastive import Contrastive
from vldnp.baselines.sld import SLD, sld
from vldnp.methods import CFG
from vldnp.sampler import denoise

U = torch.tensor([1.0, 2.0]).view(2, 1, 1, 1)
C = torch.tensor([3.0, -1.0]).view(2, 1, 1, 1)
N = torch.tensor([0.5, 4.0]).view(2, 1, 1, 1)


def values(tensor):
    return tensor.flatten().tolist()


def test_the_equations_by_hand():
    assert values(guidance.cfg(U, C, 3.0)) == [1 + 3 * 2, 2 + 3 * -3]
    g = torch.tensor([0.0, 1.0]).view(2, 1, 1, 1)  # a scale per image
    assert values(guidance.cfg(U, C, g)) == [1.0, -1.0]  # the unconditional, the conditional
    by_hand = {
        "added": [1 + 3 * 2 - 2 * -0.5, 2 + 3 * -3 - 2 * 2],
        "replaced": [0.5 + 3 * 2.5, 4 + 3 * -5],
        "composable-not": [1 + 3 * 2.5, 2 + 3 * -5],
    }
    for name, expected in by_hand.items():
        assert values(guidance.rule(name).equation(U, C, N, 3.0, 2.0)) == expected


@pytest.mark.parametrize("name", guidance.RULES)
def test_equal_predictions_stay_as_they_are(name):
    """The weights of every rule sum to one."""
    assert values(guidance.rule(name).equation(U, U, U, 7.5, 15.0)) == values(U)


def test_an_unknown_rule_is_named():
    with pytest.raises(ValueError, match="'aded'.*added, .*replaced"):
        guidance.rule("aded")


# Rules by hand, and against second implementations
def predictions(shape=(3, 4, 5, 5), seed=0):
    return list(noise(3, *shape, seed=seed))


def test_perp_neg_by_least_squares():
    uncond, cond, neg = predictions()
    got = guidance.rule("perp-neg").equation(uncond, cond, neg, 5.0, 2.0)
    for k in range(len(uncond)):
        u, c, n = (x[k].flatten().numpy() for x in (uncond, cond, neg))
        share, *_ = np.linalg.lstsq((c - u)[:, None], n - u, rcond=None)
        expected = u + 5 * (c - u) - 2 * ((n - u) - share[0] * (c - u))
        assert np.allclose(got[k].flatten().numpy(), expected)
        removed = got[k].flatten().numpy() - (u + 5 * (c - u))
        assert abs(removed @ (c - u)) < 1e-9  # nothing of the prompt is undone


def test_perp_neg_on_axes():
    zero, one = torch.zeros(1, 2, 1, 1), torch.ones(1, 2, 1, 1)
    x, y = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).view(2, 1, 2, 1, 1)
    assert values(guidance.perp_neg(zero, x, one, 3.0, 2.0)) == [3.0, -2.0]
    assert values(guidance.perp_neg(zero, x, 4 * x, 3.0, 2.0)) == [3.0, 0.0]  # all of it along
    assert values(guidance.perp_neg(zero, zero, y, 3.0, 2.0)) == [0.0, -2.0]  # no prompt at all


def test_sld_settings_are_checked():
    assert sld("max", warmup=3).warmup == 3
    with pytest.raises(ValueError, match="SLD strength 'hard'.*max, medium, strong, weak"):
        sld("hard")
    with pytest.raises(ValueError, match="momentum_beta must be a finite number from 0 to 1, not"):
        sld(momentum_beta=1.5)
    with pytest.raises(ValueError, match="scale must be a finite number, 0 or more, not -1"):
        sld(scale=-1)


def test_which_rules_have_an_omega():
    with_omega = {name for name, rule in guidance.RULES.items() if rule.uses_omega}
    assert with_omega == {"added", "perp-neg"} and not sld().uses_omega
    assert guidance.rule(guidance.perp_neg).uses_omega


@pytest.mark.parametrize("name", ["PNDMScheduler", "DDIMScheduler"])
def test_slds_warm_up_counts_steps_and_not_timesteps(name):
    """PNDM has 11 timesteps for 10 steps; the stock pipeline counted from 0 in both."""
    pipe = sd_pipeline()
    kind = getattr(diffusers, name)
    pipe.scheduler = kind.from_config(pipe.scheduler.config, clip_sample=False, skip_prk_steps=True)
    quick = {"num_inference_steps": 10, "guidance_scale": 5.0}
    methods = SLD("a knife", "strong", warmup=15.0), CFG()  # 15 of 50: 3 of 10
    pairs = zip(*(denoise(pipe, "a cat", method, **quick) for method in methods), strict=True)
    moved = [not torch.equal(own.latents, plain.latents) for own, plain in pairs]
    assert moved.index(True) == 3


def test_contrastive_cfg_by_hand():
    rule, omega, state = Contrastive(tau=0.2), 3.0, torch.zeros_like(U)
    found, _ = rule.step(U, C, N[:, None], 2.0, omega, state, 0.0)
    by_hand = []
    for u, c, n in zip(values(U), values(C), values(N), strict=True):
        weight = 2 * math.exp(-0.2 * (n - u) ** 2) / (1 + math.exp(-0.2 * (n - u) ** 2))
        by_hand.append(u + 2 * (c - u) - 3 * weight * (n - u))
    assert values(found) == pytest.approx(by_hand, abs=1e-6)
    added, _ = Contrastive(tau=0).step(U, C, N[:, None], 2.0, omega, state, 0.0)
    torch.testing.assert_close(added, guidance.added(U, C, N, 2.0, omega))
    with pytest.raises(ValueError, match="tau must be a finite number, 0 or more, not -1"):
        Contrastive(tau=-1)
