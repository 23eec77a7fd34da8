"""Normalized Attention Guidance against its equations, and against attention written down anew."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers.models.embeddings import apply_rotary_emb
from tiny import counted_rows, generators, sd_pipeline
from tiny_models import PIPELINES, flux_pipeline, sdxl_pipeline

import vldnp
from vldnp.baselines.nag import NAG, attending, cross_attentions, normalized
from vldnp.levers import adaptive
from vldnp.models.backbone import Backbone
from vldnp.models.run import Run

OMEGA, TAU, ALPHA = 4.0, 1.5, 0.4


def saying(answers):
    """VL-DNP that is told the same about these images at every query."""
    return vldnp.VLDNP(lambda images, question: answers, "moji", OMEGA, (0, 2), NAG())


def ours(model, prompts=("a cat at the pirate cove", "a dog"), method=None, seeds=(3, 4), g=5.0):
    asked = {"num_inference_steps": 4, "guidance_scale": g, "output_type": "pt", "progress": False}
    return vldnp.sample(model, list(prompts), method or vldnp.CFG(), seeds=list(seeds), **asked)


@pytest.fixture(scope="module", params=PIPELINES)
def model(request):
    return Backbone(PIPELINES[request.param](), name=request.param)


def test_the_equations_by_hand():
    """Z̃ = (1 + 2·(1−0), −1 + 2·(−1−1)) = (3, −5): r = 8/2 = 4, which τ = 2 halves."""
    positive, negative = torch.tensor([[[1.0, -1.0]]]), torch.tensor([[[0.0, 1.0]]])
    expected = torch.tensor([[[0.25 * 1.5 + 0.75, 0.25 * -2.5 - 0.75]]])
    assert torch.allclose(normalized(positive, negative, 2.0, 2.0, 0.25), expected)
    free = torch.tensor([[[3.0, -5.0]]])  # τ = 5 lets it be
    assert torch.allclose(normalized(positive, negative, 2.0, 5.0, 1.0), free)
    assert torch.equal(normalized(positive, negative, 0.0, 1.0, 1.0), positive)
    zero = torch.zeros(1, 1, 2)
    assert torch.equal(normalized(zero, zero, 2.0, 2.0, 0.25), zero)
    z, n = torch.randn(2, 2, 3, 4, generator=torch.Generator().manual_seed(0))
    for p in (1, 2):  # the paper's, its authors' code's
        assert torch.allclose(normalized(z, n, OMEGA, TAU, ALPHA, p), blended(z, n, p))


def blended(positive, negative, p=1):
    """The three equations in numpy's manner, token by token."""
    out = torch.empty_like(positive)
    for k, n in np.ndindex(positive.shape[:2]):
        z, away = positive[k, n], positive[k, n] - negative[k, n]
        far = z + OMEGA * away
        ratio = (far.abs() ** p).sum() ** (1 / p) / (z.abs() ** p).sum() ** (1 / p)
        out[k, n] = ALPHA * far * min(float(ratio), TAU) / float(ratio) + (1 - ALPHA) * z
    return out


def heads(x, attn):
    return x.unflatten(-1, (attn.heads, -1)).transpose(1, 2)


class TwiceCross:
    """A U-Net's cross-attention, for the prompt and for the negative prompt, of one image each."""

    def __init__(self, negative):
        self.negative = negative

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, **_):
        def attended(text):
            q = heads(attn.to_q(hidden_states), attn)
            k, v = heads(attn.to_k(text), attn), heads(attn.to_v(text), attn)
            weights = (q @ k.transpose(-1, -2) * attn.scale).softmax(dim=-1)
            return (weights @ v).transpose(1, 2).flatten(2)

        mixed = blended(attended(encoder_hidden_states), attended(self.negative))
        return attn.to_out[0](mixed)


def twice_cross(network, negative):
    """The network's attention processors, with that in place of each cross-attention's."""
    crossing = {name for name in network.attn_processors if ".attn2." in name}
    return network.attn_processors | dict.fromkeys(crossing, TwiceCross(negative.embeds))


@pytest.mark.parametrize("make", [sd_pipeline, PIPELINES["sd-2"], sdxl_pipeline])
def test_a_unet_is_that_whose_cross_attention_is_computed_twice(make):
    model = Backbone(make())
    run = Run(model, 4)
    latents, t = run.initial_latents([0]), run.timesteps[1]
    cond, negative = run.encode(["a cat"]), run.encode(["a knife"])
    rule = NAG(tau=TAU, alpha=ALPHA)
    pred = run.predict(latents, t, rule.branch(negative, lambda: cond, OMEGA))
    plain = run.predict(latents, t, cond)
    model.network.set_attn_processor(twice_cross(model.network, negative))
    expected = run.predict(latents, t, cond)
    assert torch.allclose(pred, expected, atol=1e-5)
    assert not torch.allclose(plain, expected, atol=1e-4)


class TwiceJoint:
    """FLUX's attention of two rows, a prompt's and a negative prompt's, with the same image."""

    def __init__(self, text_length):
        self.text_length = text_length

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, mask=None, rotary=None):
        def split(x):
            return x.unflatten(-1, (attn.heads, -1))

        q, k, v = (split(to(hidden_states)) for to in (attn.to_q, attn.to_k, attn.to_v))
        q, k = attn.norm_q(q), attn.norm_k(k)
        if encoder_hidden_states is not None:
            projections = attn.add_q_proj, attn.add_k_proj, attn.add_v_proj
            text = [split(to(encoder_hidden_states)) for to in projections]
            q = torch.cat([attn.norm_added_q(text[0]), q], dim=1)
            k = torch.cat([attn.norm_added_k(text[1]), k], dim=1)
            v = torch.cat([text[2], v], dim=1)
        q, k = (apply_rotary_emb(x, rotary, sequence_dim=1) for x in (q, k))
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        features = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        words, image = features[:, : self.text_length], features[:, self.text_length :]
        image = blended(image[:1], image[1:]).expand(2, -1, -1)
        if encoder_hidden_states is None:
            return torch.cat([words, image], dim=1)
        return attn.to_out[0](image), attn.to_add_out(words)


@pytest.mark.parametrize("modulation", ["prompt", "negative"])
@pytest.mark.parametrize("guidance_embeds", [True, False])
def test_flux_is_that_whose_joint_attention_shares_its_image(guidance_embeds, modulation):
    model = Backbone(flux_pipeline(guidance_embeds=guidance_embeds))
    run = Run(model, 4)
    latents, t = run.initial_latents([0]), run.timesteps[1]
    cond, negative = run.encode(["a cat"]), run.encode(["a knife"])
    rule = NAG(TAU, ALPHA, modulation=modulation)
    pred = run.predict(latents, t, rule.branch(negative, lambda: cond, OMEGA))
    plain = run.predict(latents, t, cond)
    both = cond + (negative if modulation == "negative" else cond)
    both.embeds[1] = negative.embeds[0]
    model.network.set_attn_processor(TwiceJoint(cond.embeds.shape[1]))
    expected = run.predict(latents.repeat(2, 1, 1, 1), t, both)[:1]
    assert torch.allclose(pred, expected, atol=1e-5)
    assert not torch.allclose(plain, expected, atol=1e-4)


def test_a_batch_is_its_images_alone_static_and_dynamic(model):
    seeds, answers = [0, 1, 2, 3], ["none", "knife", "skull, dagger", "none"]
    for g in (1.0, 5.0):
        for make in (lambda _: vldnp.Static("a knife", OMEGA, NAG()), saying):
            batch = ours(model, ["a cat"] * 4, make(answers), seeds, g=g)
            for k, seed in enumerate(seeds):
                alone = ours(model, ["a cat"], make(answers[k : k + 1]), [seed], g=g)
                assert torch.allclose(batch.images[k], alone.images[0], atol=1e-4)
            plain = ours(model, ["a cat"] * 4, None, seeds, g=g)
            assert not torch.allclose(batch.images, plain.images, atol=1e-4)


def test_what_does_nothing_is_plain(model):
    plain = ours(model, g=1.0)
    for rule, omega in ((NAG(), 0.0), (NAG(alpha=0), 4.0)):
        out = ours(model, method=vldnp.Static("a knife", omega, rule), g=1.0)
        assert torch.allclose(out.images, plain.images, atol=1e-5)


def test_one_evaluation_a_step_without_guidance(model):
    """As in few-step models: there ε_cfg is ε_c; a negative prompt takes the prompt's row again,
    and one beside it."""
    with counted_rows(model.network) as rows:
        plain = ours(model, g=1.0)
        steered = ours(model, method=vldnp.Static("a knife", 4.0, NAG()), g=1.0)
        added = ours(model, method=vldnp.Static("a knife", 4.0), g=1.0)
    assert rows == [2] * 4 + [6] * 4 + [6] * 4
    assert plain.trace.model_evaluations == [4, 4]
    assert steered.trace.model_evaluations == added.trace.model_evaluations == [12, 12]
    unguided = {"true_cfg_scale": 1.0} if model.name == "flux" else {"guidance_scale": 1.0}
    asked = {"num_inference_steps": 4, "output_type": "pt", **unguided}
    asked["generator"] = generators(3, 4)
    expected = model.pipe(["a cat at the pirate cove", "a dog"], **asked)
    assert torch.allclose(plain.images, expected.images, atol=1e-4)


def test_guidance_and_attention_together():
    """ε_u + g (ε_c' − ε_u): at g = 5 the same as in a loop of stock calls."""
    model = Backbone(sd_pipeline())
    run = Run(model, 3)
    latents, g = run.initial_latents([3]), 5.0
    cond, nothing, negative = (run.encode([text]) for text in ("a cat", "", "a knife"))
    own, twice = model.network.attn_processors, twice_cross(model.network, negative)
    for t in run.timesteps:
        uncond = run.predict(latents, t, nothing)
        model.network.set_attn_processor(dict(twice))
        steered = run.predict(latents, t, cond)
        model.network.set_attn_processor(dict(own))
        latents = run.step(uncond + g * (steered - uncond), t, latents)
    method = vldnp.Static("a knife", OMEGA, NAG(TAU, ALPHA))
    asked = {"guidance_scale": g, "num_inference_steps": 3, "progress": False}
    out = vldnp.sample(model, "a cat", method, seeds=[3], **asked)
    assert torch.allclose(out.latents, latents, atol=1e-4)


def test_nothing_is_left_on_the_network(model):
    attentions = cross_attentions(model.network)
    assert attentions
    with pytest.raises(RuntimeError, match="stopped"):
        with attending(model.network, [0], [1], 4, normalized):
            raise RuntimeError("stopped")
    for module in model.network.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks


def test_what_it_does_not_fit_and_options_described_where_they_are_chosen():
    for make, message in (
        (lambda: NAG(tau=0.5), "tau must be a finite number, 1 or more, not 0.5"),
        (lambda: NAG(alpha=2), "alpha must be a finite number from 0 to 1, not 2"),
        (lambda: NAG(norm=3), "norm must be one of \\(1, 2\\), not 3"),
        (lambda: NAG(modulation="none"), "modulation must be one of .* not 'none'"),
        (vldnp.guiding(flux_pipeline(), vldnp.Static("x")).__enter__, "FLUX evaluates ε_u in a"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            make()
        assert "\n" not in str(error.value)
    assert NAG().describe() == {"kind": "nag", "tau": 2.5, "alpha": 0.25}
    chosen = {"norm": 2, "modulation": "negative"}
    assert NAG(**chosen).describe() == NAG().describe() | chosen


def test_adaptive_guidance_keeps_it(model):
    """Where ε_u is dropped for the others, a steered image keeps it, as g > 1 needs it."""
    same = vldnp.Static("a knife", OMEGA, NAG())
    dropping = ours(model, method=adaptive(same, 0.0))
    assert torch.allclose(dropping.images, ours(model, method=same).images)
