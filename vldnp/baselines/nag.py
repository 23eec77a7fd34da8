"""Normalized Attention Guidance (Chen et al. 2025, arXiv 2505.21179) as a guidance rule.

The rule moves image features that attend to the prompt away from those that attend to the negative
prompt. It needs no ε_u, and therefore serves few-step models and models with distilled guidance. ω
is the paper's φ. In the authors' code (github.com/ChenDarYen/Normalized-Attention-Guidance, commit
69159ca) `nag_scale` is φ + 1, `norm` is 2, and `modulation` on FLUX is "negative" except for image
features in blocks of two streams. Its U-Nets repeat only the attention; here a branch is a row."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from vldnp._finite import number
from vldnp.guidance import Rule, Scale, cfg
from vldnp.models.conditioning import AuxiliaryRows


def normalized(positive, negative, omega: Scale, tau: float, alpha: float, p: int = 1) -> Tensor:
    """Z = α min(τ/r, 1) Z̃ + (1 − α) Z⁺ with Z̃ = Z⁺ + φ (Z⁺ − Z⁻), r = ‖Z̃‖ₚ / ‖Z⁺‖ₚ for each token
    (section 3). Z⁺ and Z⁻, `[k, N, D]`, are attention's features before the output projection."""
    extrapolated = positive + omega * (positive - negative)
    limit = tau * positive.norm(p=p, dim=-1, keepdim=True)
    norm = extrapolated.norm(p=p, dim=-1, keepdim=True)
    factor = (limit / norm.clamp(min=torch.finfo(norm.dtype).tiny)).clamp(max=1)
    return alpha * factor * extrapolated + (1 - alpha) * positive


@contextmanager
def attending(network: nn.Module, rows, beside, text_length: int, mix: Callable) -> Iterator[None]:
    """In this context, rows' image features are mixed with those of rows beside (`normalized`), and
    both continue with the result. A joint sequence starts with `text_length` tokens of text."""
    rows, beside = list(rows), list(beside)

    def mixed(features: Tensor, first: int = 0) -> Tensor:
        made, both = features.clone(), (features[rows, first:], features[beside, first:])
        made[rows, first:] = made[beside, first:] = mix(*both)
        return made

    with ExitStack() as hooks:
        for attention in cross_attentions(network):
            if hasattr(attention, "to_out"):  # its input is the image's alone
                hook = attention.to_out[0].register_forward_pre_hook(lambda _, args: mixed(args[0]))
            else:  # FLUX's blocks of one stream
                hook = attention.register_forward_hook(lambda _, args, out: mixed(out, text_length))
            hooks.enter_context(hook)
        yield


def cross_attentions(network: nn.Module) -> list[nn.Module]:
    """The layers in which image features attend to the text: `attn2` of a U-Net, else `attn`."""
    name = "attn" if hasattr(network, "transformer_blocks") else "attn2"
    return [module for path, module in network.named_modules() if path.split(".")[-1] == name]


@dataclass(frozen=True)
class NAG(Rule):
    """ε_u + g (ε_c' − ε_u), where ε_c' is the prompt's prediction with `normalized` attention. τ,
    1 or more, bounds the features' norm, and α in 0 … 1 is their share in the result."""

    tau: float = 2.5
    alpha: float = 0.25
    norm: int = 1  # 2: the length of a feature's vector
    modulation: str = "prompt"  # or "negative": whose pooled embedding the auxiliary row has
    uses_uncond = False

    def __post_init__(self):
        number("NAG's tau", self.tau, 1)
        number("NAG's alpha", self.alpha, 0, 1)
        for name, known in (("norm", (1, 2)), ("modulation", ("prompt", "negative"))):
            if (own := getattr(self, name)) not in known:
                raise ValueError(f"NAG's {name} must be one of {known}, not {own!r}")

    def branch(self, negative, prompted, omega):
        """The prompts, each with its negative prompt in an auxiliary row."""
        cond = prompted()
        mix = partial(normalized, omega=omega, tau=self.tau, alpha=self.alpha, p=self.norm)
        mixing = partial(attending, text_length=negative.embeds.shape[1], mix=mix)
        added = (cond if self.modulation == "prompt" else negative).added
        beside = AuxiliaryRows(tuple(range(len(cond))), replace(negative, added=added), mixing)
        return replace(cond, auxiliary=beside)

    def step(self, pred_uncond, pred_cond, pred_neg, guidance_scale, omega, state, progress):
        """`pred_neg` is ε_c'."""
        return cfg(pred_uncond, pred_neg.squeeze(1), guidance_scale), state

    def describe(self) -> dict:
        later = {"norm": 1, "modulation": "prompt"}  # are named where they are chosen
        return {"kind": "nag", **{k: v for k, v in asdict(self).items() if later.get(k) != v}}
