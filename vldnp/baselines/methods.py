"""The baselines as methods, a constructor for each."""

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from vldnp import guidance, negatives
from vldnp.baselines import categories
from vldnp.baselines.safe_denoiser import SafeDenoiser
from vldnp.baselines.safree import Safree
from vldnp.baselines.sld import sld
from vldnp.methods import CFG, Method, _omega


def SLD(negative_prompt: str, strength: str = "medium", **changes: float) -> Method:
    """Safe Latent Diffusion (Schramowski et al., CVPR 2023, arXiv 2211.05105).

    Args:
        negative_prompt: the safety concept S, always on.
        strength: `weak`, `medium`, `strong` or `max`, the paper's settings.
        changes: hyper-parameters of `vldnp.baselines.sld.SLD` instead of the setting's; with
            `scale=0` this is plain CFG, on which no third evaluation is spent.
    """
    rule = sld(strength, **changes)
    policy = negatives.Static(negative_prompt) if rule.scale else negatives.NoNegatives()
    return Method(f"sld-{strength}", policy, rule)


def SAFREE(
    phrases: str | Sequence[str],
    negative_prompt: str = "",
    rule: str | guidance.Rule = "replaced",
    omega: float = 7.5,
    **options,
) -> Method:
    """SAFREE (Yoon et al., ICLR 2025, arXiv 2410.12761).

    Args:
        phrases: the unsafe phrases; one text is taken apart at its commas.
        negative_prompt: a fixed negative prompt besides. The authors' script gives the phrases,
            joined by commas, in place of ε_u; empty means none.
        rule, omega: how it enters; see `Method`.
        options: of `vldnp.baselines.safree.Safree`, such as `re_attention=False`, or
            `categories`, with which it is CASG's SAFREE.
    """
    phrases = phrases.split(",") if isinstance(phrases, str) else phrases
    policy = negatives.Static(negative_prompt) if negative_prompt else negatives.NoNegatives()
    strength = _omega(omega, rule) if negative_prompt else None
    return Method("safree", policy, rule, strength, Safree(tuple(phrases), **options))


def Summed(negative_prompts: Sequence[str], omega: float = 7.5) -> Method:
    """One negative prompt per category, always on, their differences summed.

    Args:
        negative_prompts: the categories', each an evaluation a step.
        omega: strength of each (`vldnp.baselines.categories.summed`).
    """
    policy = categories.Categories(tuple(negative_prompts))
    return Method("summed", policy, categories.SUMMED, omega)


def CASG(
    negative_prompts: Sequence[str], rule: str | guidance.Rule = "added", omega: float = 7.5
) -> Method:
    """CASG (Xiang et al., CVPR 2026, arXiv 2602.20880): the nearest category at each step.

    Args:
        negative_prompts: the categories', each an evaluation a step.
        rule: how the chosen one enters; the paper's is `vldnp.baselines.sld.sld("max")`.
        omega: strength; rules without ω ignore it.
    """
    policy = categories.Categories(tuple(negative_prompts))
    return Method("casg", policy, categories.CASG(rule), _omega(omega, rule))


def Repelled(bank: Tensor, method: Method | None = None, **options) -> Method:
    """Safe Denoiser (Kim et al., NeurIPS 2025, arXiv 2502.08011), alone or upon another method.

    Args:
        bank: unsafe latents, `[N, C, h, w]`; see `vldnp.baselines.safe_denoiser`.
        method: what makes the prediction that is corrected; default is plain CFG.
        options: of `vldnp.baselines.safe_denoiser.SafeDenoiser`, such as `strength`.
    """
    method = CFG() if method is None else method
    name = "safe-denoiser" if method.name == "cfg" else f"{method.name} + safe-denoiser"
    return replace(method, name=name, correction=SafeDenoiser(bank, **options))
