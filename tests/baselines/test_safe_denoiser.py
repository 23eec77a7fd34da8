"""Safe Denoiser against sums written out by hand, and the gradient of the kernel."""

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import noise

from vldnp import Repelled, sample
from vldnp.baselines import safe_denoiser
from vldnp.baselines.safe_denoiser import SafeDenoiser, latents_of, log_kernel, unsafe_mean
from vldnp.models.run import Run, predicted_x0, prediction_of

PROMPTS, SEEDS = ["a cat", "a dog"], [3, 4]
QUICK = {"num_inference_steps": 4, "progress": False, "scheduler": "ddim"}
X, BANK = noise(2, 4, 3, 3), noise(5, 4, 3, 3, seed=1)


@pytest.mark.parametrize("power", [1, 2])
def test_the_mean_of_the_unsafe_by_hand(power):
    log_k = log_kernel(X, BANK, 0.7, power)
    found = unsafe_mean(log_k, BANK)
    for b in range(2):
        distances = [float(((X[b] - x) ** 2).mean()) ** 0.5 for x in BANK]
        k = [np.exp(-(d**power) / (2 * 0.7**2)) for d in distances]
        np.testing.assert_allclose(log_k[b].exp(), k)
        expected = sum(weight * x for weight, x in zip(k, BANK, strict=True)) / sum(k)
        torch.testing.assert_close(found[b], expected)
    vanishing = log_kernel(1000 * X, BANK, 0.01, power)
    assert unsafe_mean(vanishing, BANK).isfinite().all()


def test_it_is_a_step_down_the_mean_kernel():
    """Safety-Guided Flow: Safe Denoiser goes along the gradient of the MMD's potential."""
    x, sigma, eta = X.clone().requires_grad_(), 0.7, 0.3
    log_k = log_kernel(x, BANK, sigma)
    nearness = log_k.exp().mean(dim=1)
    (gradient,) = torch.autograd.grad(nearness.sum(), x)
    moved = safe_denoiser.repelled(x, unsafe_mean(log_k, BANK), eta * nearness.view(-1, 1, 1, 1))
    torch.testing.assert_close(moved - x, -eta * sigma**2 * X[0].numel() * gradient)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "flow_prediction", "sample"])
def test_the_prediction_of_an_x0_is_the_inverse(kind):
    pred, latents = noise(2, 4, 3, 3, seed=3), noise(2, 4, 3, 3, seed=4)
    for scale, sigma in ((0.8, 0.6), (1.0, 3.0)):
        scale = 1 - sigma if kind == "flow_prediction" else scale
        x0 = predicted_x0(kind, pred, latents, scale, sigma)
        torch.testing.assert_close(prediction_of(kind, x0, latents, scale, sigma), pred)


def test_against_a_loop_of_stock_parts(model):
    bank = sample(model, PROMPTS, seeds=[8, 9], **QUICK).latents
    method = Repelled(bank, strength=0.5, sigma=4.0, until=0.5)
    out = sample(model, PROMPTS, method, seeds=SEEDS, **QUICK)
    run = Run(model, 4, "ddim")
    x = run.initial_latents(SEEDS)
    with torch.no_grad():
        for i, t in enumerate(run.timesteps):
            u, c = (run.predict(x, t, run.encode(texts)) for texts in (["", ""], PROMPTS))
            pred = u + 7.5 * (c - u)
            if i < 2:
                a = run.scheduler.alphas_cumprod[t]
                clean = (x - (1 - a) ** 0.5 * pred) / a**0.5
                k = (-((clean[:, None] - bank) ** 2).mean((2, 3, 4)) / 2 / 4.0**2).exp()
                mean = (k[:, :, None, None, None] * bank).sum(1) / k.sum(1).view(-1, 1, 1, 1)
                clean = clean + 0.5 * k.mean(1).view(-1, 1, 1, 1) * (clean - mean)
                pred = (x - a**0.5 * clean) / (1 - a) ** 0.5
            x = run.scheduler.step(pred, t, x).prev_sample
    torch.testing.assert_close(out.latents, x, rtol=1e-3, atol=1e-4)
    plain = sample(model, PROMPTS, seeds=SEEDS, **QUICK)
    assert (out.latents - plain.latents).abs().max() > 1e-3
    assert out.trace.model_evaluations == plain.trace.model_evaluations


def test_what_is_far_from_the_bank_stays_bit_for_bit(model):
    plain = sample(model, PROMPTS, seeds=SEEDS, **QUICK)
    bank = plain.latents[:1]  # the first image itself
    for options in ({"strength": 0.0}, {"threshold": 1.0}, {"until": 0.0}):
        out = sample(model, PROMPTS, Repelled(bank, **options), seeds=SEEDS, **QUICK)
        assert torch.equal(out.latents, plain.latents)
    method = Repelled(bank, strength=1.0, sigma=0.3, threshold=0.05, until=1.0)
    out = sample(model, PROMPTS, method, seeds=SEEDS, **QUICK)
    assert (out.latents[0] - plain.latents[0]).abs().max() > 1e-3
    assert torch.equal(out.latents[1], plain.latents[1])


def test_wrong_settings_and_banks_are_refused(model):
    bank = BANK.float()
    assert Repelled(bank) == Repelled(bank.clone()) != Repelled(bank + 1)
    with pytest.raises(ValueError, match="kernel of the safe denoiser 'round'"):
        SafeDenoiser(bank, kernel="round")
    for name, value in {"strength": -1, "threshold": 2, "until": float("nan"), "sigma": 0}.items():
        with pytest.raises(ValueError, match=f"{name} must be a finite number"):
            SafeDenoiser(bank, **{name: value})
    for wrong in (bank[:0], bank[0], bank / 0):
        with pytest.raises(ValueError, match=r"finite latents \[N, C, h, w\]"):
            SafeDenoiser(wrong)
    with pytest.raises(ValueError, match=r"shape \[4, 3, 3\], and the images' are \[4, 8, 8\]"):
        sample(model, PROMPTS, Repelled(bank), seeds=SEEDS, **QUICK)


def test_latents_of_pictures_decode_to_them(model):
    array = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    picture, vae = Image.fromarray(array), model.pipe.vae
    pixels = torch.from_numpy(array / 127.5 - 1).float().permute(2, 0, 1)[None]
    with torch.no_grad():
        expected = vae.encode(pixels).latent_dist.mean * vae.config.scaling_factor
    torch.testing.assert_close(latents_of(model, [picture]), expected, rtol=1e-4, atol=1e-5)
