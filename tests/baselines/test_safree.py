import math
from contextlib import contextmanager
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import counted_rows, noise

from vldnp import SAFREE, denoise, load, load_profile, sample
from vldnp.baselines import safree
from vldnp.baselines.safree import Safree, attenuated, last_step, projector, trigger_tokens
from vldnp.models.run import Run

PHRASES = ["knife", "skull", "blood"]
PROMPTS = ["a cat on a skull", "pizza", "a dog and a pizza at the pirate cove", "cat"]
# The tiny text encoder's β is small; with these its embeddings serve some of the steps.
LONG = {"upper": 34.0, "t0": 1.0}


# The parts, against second implementations
@settings(max_examples=20, deadline=None)
@given(st.integers(0, 6), st.integers(0, 3), st.integers(0, 99))
def test_the_projector_is_least_squares(independent, copies, seed):
    vectors = noise(independent, 8, seed=seed)
    vectors = torch.cat([vectors, 2 * vectors[:copies]])  # dependent ones span nothing new
    P, v = projector(vectors), noise(8, seed=seed + 1)
    share, *_ = np.linalg.lstsq(vectors.T.numpy(), v.numpy(), rcond=None)
    assert np.allclose(P @ v, vectors.T.numpy() @ share, atol=1e-8)
    assert torch.allclose(P @ P, P, atol=1e-8) and torch.allclose(P, P.T, atol=1e-8)
    assert P.trace().item() == pytest.approx(independent, abs=1e-6)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("alpha", [0.0, 0.01, 0.3])
def test_triggers_one_by_one(seed, alpha):
    masked, concept = noise(7, 8, seed=seed), projector(noise(2, 8, seed=seed + 50))
    distances = [float(np.linalg.norm((np.eye(8) - concept.numpy()) @ m.numpy())) for m in masked]
    expected = []
    for i, distance in enumerate(distances):
        others = distances[:i] + distances[i + 1 :]
        expected.append(not distance < (1 + alpha) * sum(others) / len(others))
    assert trigger_tokens(masked, concept, alpha).tolist() == expected
    assert trigger_tokens(masked[:1], concept, alpha).tolist() == [True]  # there are no others


@pytest.mark.parametrize(
    ("beta", "num_steps", "expected"),
    [(0.0, 50, 0), (0.5, 50, 2), (0.5333, 50, 5), (0.6, 50, 10), (1.0, 50, 10)]
    + [(0.0, 25, 0), (0.5, 25, 1), (0.6, 25, 5), (0.6, 100, 19)],
)
def test_the_self_validating_filter_by_hand(beta, num_steps, expected):
    """For β = 0.6: 10 / (1 + exp(−5 · 0.667)) = 9.66 of 50 steps."""
    assert last_step(beta, num_steps, 10, 2.5, 5.333) == expected
    sigmoid = 1 / (1 + math.exp(-2 * 2.5 * (10 * beta - 5.333)))
    assert abs(expected - 10 * num_steps / 50 * sigmoid) <= 0.5


def attenuated_by_numbers(changed, unchanged, scale):
    """One channel `[h, w]`, with the frequencies of the discrete Fourier transform by name."""
    ours, other = np.fft.fft2(changed), np.fft.fft2(unchanged)
    h, w = changed.shape
    for y, x in np.ndindex(h, w):
        fy, fx = (y + h // 2) % h - h // 2, (x + w // 2) % w - w // 2
        if {fy, fx} <= {-1, 0} and abs(ours[y, x]) > (1 + 1e-9) * abs(other[y, x]):
            ours[y, x] *= scale
    return np.fft.ifft2(ours).real


@pytest.mark.parametrize("size", [(8, 8), (4, 6), (5, 7), (1, 1), (2, 3)])
def test_attenuation_frequency_by_frequency(size):
    changed, unchanged = noise(2, 3, *size), noise(2, 3, *size, seed=1)
    got = attenuated(changed, unchanged, 0.2)
    assert got.dtype == torch.float64  # as precise as the features
    for k, c in np.ndindex(2, 3):
        expected = attenuated_by_numbers(changed[k, c].numpy(), unchanged[k, c].numpy(), 0.2)
        assert np.allclose(got[k, c], expected, atol=1e-12)


def test_attenuation_leaves_what_does_not_exceed():
    x = noise(2, 3, 8, 8).float()
    assert torch.allclose(attenuated(x, x, 0.2), x, atol=1e-6)
    assert torch.allclose(attenuated(x, 100 * x, 0.2), x, atol=1e-6)
    constant = torch.full((1, 1, 8, 8), 3.0)  # all of it at zero frequency
    assert torch.allclose(attenuated(constant, 0 * constant, 0.2), 0.2 * constant, atol=1e-6)
    assert attenuated(x.bfloat16(), x.bfloat16(), 0.9).dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_attenuation_does_not_hang_on_rounding(dtype):
    """Equal features stay as they are where they differ by what rounding leaves."""
    x = (noise(2, 16, 8, 8) + 2).to(dtype)  # with a mean, as features have
    eps = max(torch.finfo(dtype).eps, 1e-6)
    noisy = (x.double() * (1 + eps * (noise(2, 16, 8, 8, seed=1).sigmoid() - 0.5))).to(dtype)
    assert not torch.equal(noisy, x)
    assert torch.allclose(attenuated(x, noisy, 0.2), x, atol=4 * eps, rtol=4 * eps)
    assert torch.allclose(attenuated(noisy, x, 0.2), noisy, atol=4 * eps, rtol=4 * eps)
    exceeding = attenuated(1.1 * x, x, 0.2)  # by a tenth, and that is no rounding
    assert exceeding.float().mean() < 0.5 * x.float().mean()


def test_one_thread_or_two_attenuate_the_same(request, monkeypatch):
    """On moji-sd, whose first skip features are the same in both branches."""
    moji, method, equal = load("moji-sd"), SAFREE(PHRASES, upper=35.0, alpha=0.0), []
    request.addfinalizer(partial(torch.set_num_threads, torch.get_num_threads()))

    def counted(changed, unchanged, scale):
        made = attenuated(changed, unchanged, scale)
        if (changed - unchanged).norm() < 1e-4 * unchanged.norm():
            equal.append((made - changed).norm() / changed.norm())
        return made

    monkeypatch.setattr(safree, "attenuated", counted)
    latents = []
    for count in (1, 2):
        torch.set_num_threads(count)
        prompts = ["a cat and a knife in the park", "a skull in the kitchen"]
        asked = {"num_inference_steps": 4, "guidance_scale": 3.0, "seeds": [5, 6]}
        latents.append(sample(moji, prompts, method, progress=False, **asked).latents)
    assert len(equal) >= 4 and max(equal) < 1e-5
    assert torch.allclose(*latents, atol=1e-3)


def filtered_by_hand(pipe, prompt, alpha=0.01):
    """The changed embedding and β of one prompt, with numpy, from issue to formula."""
    tokenizer, encoder = pipe.tokenizer, pipe.text_encoder

    def pooled(ids):
        return encoder(torch.tensor([ids])).pooler_output[0].double().detach().numpy()

    def onto(vectors):
        E = np.stack(vectors).T
        return E @ np.linalg.pinv(E)  # the same projector: E (EᵀE)⁺ Eᵀ = E E⁺

    ids = tokenizer(prompt).input_ids
    padded = tokenizer(prompt, padding="max_length", return_tensors="pt").input_ids
    embeds = encoder(padded)[0][0].double().detach().numpy()
    outside = np.eye(16) - onto([pooled(tokenizer(phrase).input_ids) for phrase in PHRASES])
    masked = [pooled([*ids[:i], 0, *ids[i + 1 :]]) for i in range(1, len(ids) - 1)]
    distances = [np.linalg.norm(outside @ m) for m in masked]
    changed = embeds.copy()
    for i, d in enumerate(distances):
        others = (sum(distances) - d) / max(len(distances) - 1, 1)
        if not d < (1 + alpha) * others:
            changed[i + 1] = outside @ onto(masked) @ embeds[i + 1]
    cosines = []
    for e in embeds[: len(ids)]:
        p = outside @ onto(masked) @ e
        cosines.append(e @ p / np.linalg.norm(e) / np.linalg.norm(p))
    return changed, 1 - np.mean(cosines)


def test_a_batch_of_prompts_each_by_hand(model):
    prompts = [PROMPTS[0], "", PROMPTS[2], "a dog on the cove", PROMPTS[0], "cat"]
    run = Run(model, 40)
    found = Safree(PHRASES).filtered(run, prompts)
    plain = run.encode(prompts).embeds
    for prompt, ours, unchanged in zip(prompts, found, plain, strict=True):
        if not prompt:
            assert torch.equal(ours.embeds, unchanged) and not ours.triggers.any()
            continue
        embeds, beta = filtered_by_hand(model.pipe, prompt)
        assert np.allclose(ours.embeds, embeds, atol=1e-4)
        assert ours.beta == pytest.approx(beta, abs=1e-4)
        assert ours.last_step == last_step(beta, 40, 10, 2.5, 5.333)
        changed = (ours.embeds != unchanged).any(dim=1)
        assert changed[1 : len(ours.triggers) + 1].tolist() == ours.triggers.tolist()
        assert not changed[0] and not changed[len(ours.triggers) + 1 :].any()
    some = torch.cat([f.triggers for f in found])
    assert some.any() and not some.all()


@pytest.mark.filterwarnings("ignore:a prompt is longer")
def test_the_released_script_finds_no_trigger_in_a_prompt_that_is_too_long(model):
    """It cuts before it adds the end mark, so that CLIP pools the begin mark of every prompt."""
    long, short, run = "a skull and a knife on a cat " * 3, PROMPTS[0], Run(model, 40)
    kept = Safree(PHRASES, alpha=-0.05).filtered(run, [long, short])
    lost = Safree(PHRASES, alpha=-0.05, end_mark=False).filtered(run, [long, short])
    alike = Safree(PHRASES, end_mark=False).filtered(run, [long])
    assert kept[0].triggers.any() and not alike[0].triggers.any()
    assert torch.equal(kept[1].embeds, lost[1].embeds) and kept[1].triggers.any()
    exact = " ".join(["cat"] * 14)  # as long as may be, with its end mark
    pair = [Safree(PHRASES, end_mark=mark).filtered(run, [exact])[0] for mark in (True, False)]
    assert torch.equal(*(found.embeds for found in pair))
    assert load_profile("paper").methods[5]["given"]["end_mark"] is False
    assert not SAFREE(PHRASES, end_mark=False).describe()["conditioning"]["end_mark"]


def test_the_description_is_that_of_published_rows():
    on = dict.fromkeys(["projection", "selection", "self_validation", "re_attention"], True)
    options = {"alpha": 0.01, "upper": 10.0, "k": 2.5, "t0": 5.333, "scales": [0.9, 0.2]}
    expected = {"kind": "safree", "phrases": PHRASES, **on, **options}
    assert SAFREE(PHRASES).describe()["conditioning"] == expected


# The whole, written out
@contextmanager
def features_written_out(unet, scales):
    """Re-attention for a batch [u, changed, unchanged], at the doors of the single resnets."""
    hooks = []
    before = [[16, 16], [16, 8]]  # the decoder's width where each resnet's skip joins it
    for block, widths in zip(unet.up_blocks, before, strict=True):
        for resnet, width in zip(block.resnets, widths, strict=True):

            def filtered(resnet, args, width=width):
                joined = args[0].clone()
                for c in range(width, joined.shape[1]):
                    pair = joined[1, c].double().numpy(), joined[2, c].double().numpy()
                    scale = scales[0] if width == 16 else scales[1]
                    joined[1, c] = torch.tensor(attenuated_by_numbers(*pair, scale))
                return (joined, *args[1:])

            hooks.append(resnet.register_forward_pre_hook(filtered))
    yield
    for hook in hooks:
        hook.remove()


@torch.no_grad()
def written_out(model, prompt, seed, g, num_steps, scales=(0.9, 0.2), re_attention=True):
    pipe, run = model.pipe, Run(model, num_steps, "ddim")
    x = noise(1, 4, 8, 8, seed=seed)
    plain = pipe.encode_prompt(prompt, "cpu", 1, False)[0]
    empty = pipe.encode_prompt("", "cpu", 1, False)[0]
    changed, beta = filtered_by_hand(pipe, prompt)
    changed = torch.tensor(changed)[None]
    U, t0 = LONG["upper"] * num_steps / 50, LONG["t0"]
    last = round(U / (1 + math.exp(-5 * (10 * beta - t0))))
    for i, t in enumerate(run.timesteps):
        if i <= last and re_attention:
            with features_written_out(pipe.unet, scales):
                cond = torch.cat([empty, changed, plain])
                u, c, _ = pipe.unet(x.repeat(3, 1, 1, 1), t, encoder_hidden_states=cond).sample
        else:
            cond = torch.cat([empty, changed if i <= last else plain])
            u, c = pipe.unet(x.repeat(2, 1, 1, 1), t, encoder_hidden_states=cond).sample
        x = run.scheduler.step((u + g * (c - u))[None], t, x).prev_sample
    return x, last


@pytest.mark.parametrize("re_attention", [True, False])
def test_safree_is_the_papers_steps(exact, re_attention):
    """In float64, where neither side's rounding decides which features exceed the others."""
    prompts, seeds = [PROMPTS[0], PROMPTS[2]], [3, 5]
    method = SAFREE(PHRASES, re_attention=re_attention, **LONG)
    asked = {"num_inference_steps": 9, "guidance_scale": 3.0, "scheduler": "ddim"}
    out = sample(exact, prompts, method, seeds=seeds, progress=False, **asked)
    plain = sample(exact, prompts, seeds=seeds, progress=False, **asked)
    for k, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True)):
        x, last = written_out(exact, prompt, seed, 3.0, 9, re_attention=re_attention)
        assert 0 <= last < 8  # the filter switches in the middle
        assert torch.allclose(out.latents[k], x[0], atol=1e-6)
        assert not torch.allclose(out.latents[k], plain.latents[k], atol=1e-2)
        assert out.trace.model_evaluations[k] == 18 + re_attention * (last + 1)


def test_counts_are_the_rows_that_go_through_the_unet(model):
    method = SAFREE(PHRASES, negative_prompt="a knife", **LONG)
    with counted_rows(model.network) as rows:
        steps = list(denoise(model, PROMPTS, method, num_inference_steps=6))
    assert rows == [sum(step.model_evaluations) for step in steps]
    assert max(rows) > 12 and rows[-1] == 12  # 4 images: u, c, n, and at first unchanged ones


def test_hooks_are_gone_after_the_call_also_after_an_error(model):
    unet = model.pipe.unet
    list(denoise(model, PROMPTS[0], SAFREE(PHRASES, **LONG), num_inference_steps=3))
    with pytest.raises(RuntimeError, match="halt"), safree.re_attention(unet, [0], [1], (0.9, 0.2)):
        assert all(block._forward_pre_hooks for block in unet.up_blocks)
        raise RuntimeError("halt")
    assert not any(block._forward_pre_hooks for block in unet.up_blocks)


def test_phrases_are_needed():
    for wrong in ([], "", "knife,,skull"):
        with pytest.raises(ValueError, match="SAFREE needs unsafe phrases"):
            SAFREE(wrong)
