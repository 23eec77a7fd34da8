"""The baselines as methods: SAFREE and Safe Latent Diffusion."""

from collections.abc import Sequence

from vldnp.baselines.safree import Safree
from vldnp.baselines.sld import sld
from vldnp.core import guidance, negatives
from vldnp.core.methods import Method, _omega


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
        options: of `vldnp.baselines.safree.Safree`, such as `re_attention=False`.
    """
    phrases = phrases.split(",") if isinstance(phrases, str) else phrases
    policy = negatives.Static(negative_prompt) if negative_prompt else negatives.NoNegatives()
    strength = _omega(omega, rule) if negative_prompt else None
    return Method("safree", policy, rule, strength, Safree(tuple(phrases), **options))
