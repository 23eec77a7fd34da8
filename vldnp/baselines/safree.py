"""SAFREE: prompts freed of a concept in the text embedding, and features in the U-Net.

Yoon et al., ICLR 2025, arXiv 2410.12761. Where the paper and its authors' code
(github.com/jaehong31/SAFREE, commit b8b2c3f) differ, or this from both:

- The paper prints P_m (I − P_c) e for a trigger's embedding, the code has (I − P_c) P_m e, which
  is free of the concept for certain; so has this.
- The paper *attenuates* low-frequency features by a factor, the code *assigns* the factor and
  compares real parts; here they are multiplied, and magnitudes are compared.
- The released script never switches re-attention on (`-lra` installs `safree=None`). Its third
  branch is evaluated at every step and dropped; here only while the embedding is changed.
- A prompt longer than the text encoder's limit loses its end mark in the code, so that the masked
  prompts' pooled states are not the end mark's. Here the end mark stays.
- The script gives the phrases in place of ε_u's empty prompt: `SAFREE(phrases,
  negative_prompt=", ".join(phrases))`.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vldnp import negatives
from vldnp._finite import is_finite
from vldnp.guidance import Rule
from vldnp.methods import Method
from vldnp.models.conditioning import AuxiliaryRows, Conditioning
from vldnp.models.families import SD
from vldnp.models.run import Run

STEPS = 50  # to which the paper's U refers

ROUNDING = 100
"""In units of the last place, for `attenuated`: 1.2e-5 in float32. With two threads the spectra of
equal features differ by up to 2.5e-6 (moji-sd), of different ones mostly by more than 2e-4."""


def projector(vectors: Tensor) -> Tensor:
    """P = E (EᵀE)⁺ Eᵀ (eq. 1), `[D, D]`, onto the span of E's columns, given as rows `[n, D]`.

    It is in float64, which the inverse of nearly parallel vectors needs.
    """
    E = vectors.double().T
    return E @ torch.linalg.pinv(E.T @ E, hermitian=True) @ E.T


def trigger_tokens(masked: Tensor, concept: Tensor, alpha: float) -> Tensor:
    """Which tokens bring the concept in, `[n]` (eqs. 2 to 4).

    d_i = ‖(I − P_c) m_i‖, with m_i the pooled embedding of the prompt without its i-th token; token
    i is a trigger unless d_i < (1 + α) · mean of the other d_j. The only token of a prompt is one.
    """
    distances = (masked.double() - masked.double() @ concept.T).norm(dim=1)
    others = (distances.sum() - distances) / (len(distances) - 1)  # NaN for n = 1
    return ~(distances < (1 + alpha) * others)


def last_step(beta: float, num_inference_steps: int, upper: float, k: float, t0: float) -> int:
    """The last step with the changed embedding, round(U · sigmoid(2k (10β − t₀))) (eq. 6).

    β is 1 − the mean cosine between the embeddings before and after; U is for N = 50.
    """
    share = torch.sigmoid(torch.tensor(2 * k * (10 * beta - t0), dtype=torch.float64))
    return round(upper * num_inference_steps / STEPS * share.item())


def attenuated(changed: Tensor, unchanged: Tensor, scale: float, window: int = 1) -> Tensor:
    """The changed branch's features, weaker where its low frequencies exceed the other's (eq. 8).

    In the centred window (FreeU, arXiv 2309.11497), coefficients of larger magnitude than the
    unchanged branch's are multiplied by s = `scale`. Larger is what exceeds it by more than
    rounding, in proportion to the coefficient and to the channel's root mean square, ‖x‖₂.
    """
    precise = torch.promote_types(changed.dtype, torch.float32)
    spectrum, other = (
        torch.fft.fftshift(torch.fft.fft2(x.to(precise)), dim=(-2, -1))
        for x in (changed, unchanged)
    )
    tolerance = max(ROUNDING * torch.finfo(precise).eps, torch.finfo(changed.dtype).eps)
    norm = torch.linalg.vector_norm(unchanged.to(precise), dim=(-2, -1), keepdim=True)
    exceeds = spectrum.abs() - other.abs() > tolerance * (other.abs() + norm)
    middle_y, middle_x = changed.shape[-2] // 2, changed.shape[-1] // 2
    low = torch.zeros(changed.shape[-2:], dtype=torch.bool, device=changed.device)
    low[
        max(middle_y - window, 0) : middle_y + window, max(middle_x - window, 0) : middle_x + window
    ] = True
    spectrum = torch.where(low & exceeds, scale * spectrum, spectrum)
    filtered = torch.fft.ifft2(torch.fft.ifftshift(spectrum, dim=(-2, -1))).real
    return filtered.to(changed.dtype)


@contextmanager
def re_attention(
    unet: nn.Module, rows: Sequence[int], auxiliary: Sequence[int], scales: tuple[float, float]
) -> Iterator[None]:
    """While this lasts, the rows' skip features are `attenuated` against their auxiliary rows'.

    s₁ acts where the decoder is as wide as the U-Net's widest level, s₂ where as the next.
    """
    rows, auxiliary = list(rows), list(auxiliary)
    levels = sorted(set(unet.config.block_out_channels), reverse=True)
    scale_at = dict(zip(levels, scales, strict=False))

    def attend(block: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        skips = list(kwargs["res_hidden_states_tuple"])
        widths = [kwargs["hidden_states"].shape[1], *(r.out_channels for r in block.resnets[:-1])]
        for place, width in enumerate(widths):  # the block takes its skips from the end
            if width in scale_at:
                skip = skips[-1 - place].clone()
                skip[rows] = attenuated(skip[rows], skip[auxiliary], scale_at[width])
                skips[-1 - place] = skip
        return args, kwargs | {"res_hidden_states_tuple": tuple(skips)}

    hooks = [b.register_forward_pre_hook(attend, with_kwargs=True) for b in unet.up_blocks]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@dataclass(frozen=True)
class Filtered:
    """What SAFREE makes of one prompt."""

    embeds: Tensor  # the changed embedding, [L, D]
    triggers: Tensor  # which of the prompt's tokens are triggers, [n], without begin and end marks
    beta: float  # of the self-validating filter
    last_step: int  # the last one with `embeds`


@dataclass(frozen=True)
class Safree:
    """SAFREE as a conditioning policy.

    Attributes:
        phrases: the unsafe phrases.
        re_attention: attenuate features against an unchanged branch while the embedding is
            changed; it costs the image one evaluation a step.
        alpha: α of `trigger_tokens`.
        upper, k, t0: of `last_step`.
        scales: s₁, s₂ of `re_attention`.

    Raises:
        ValueError: a wrong setting; one line.
    """

    phrases: tuple[str, ...]
    re_attention: bool = True
    alpha: float = 0.01
    upper: float = 10.0
    k: float = 2.5
    t0: float = 5.333
    scales: tuple[float, float] = (0.9, 0.2)

    def __post_init__(self):
        object.__setattr__(self, "phrases", tuple(phrase.strip() for phrase in self.phrases))
        if not self.phrases or not all(self.phrases):
            raise ValueError(
                f"SAFREE needs unsafe phrases, none of them empty, not {list(self.phrases)}"
            )
        numbers = {"alpha": self.alpha, "upper": self.upper, "k": self.k, "t0": self.t0}
        numbers |= {f"scales[{i}]": scale for i, scale in enumerate(self.scales)}
        for name, value in numbers.items():
            if not is_finite(value):
                raise ValueError(f"SAFREE's {name} must be a finite number, not {value!r}")

    def begin(self, run: Run, prompts: Sequence[str]) -> Callable[[int], Conditioning]:
        """Step index → the conditioning of the prompts."""
        if run.backbone.family is not SD:
            raise ValueError(
                f"SAFREE is defined for one text encoder and a U-Net, which {SD.name} has; "
                f"{run.backbone.name!r} is {run.backbone.family.name}: use another method with it"
            )
        plain, found = run.encode(prompts), self.filtered(run, prompts)
        safe = torch.stack([f.embeds for f in found])

        def at(i: int) -> Conditioning:
            rows = [row for row, f in enumerate(found) if i <= f.last_step and f.triggers.any()]
            if not rows:
                return plain
            embeds = plain.embeds.clone()
            embeds[rows] = safe[rows]
            if not self.re_attention:
                return Conditioning(embeds)
            attending = partial(re_attention, scales=self.scales)
            return Conditioning(embeds, AuxiliaryRows(tuple(rows), plain.embeds[rows], attending))

        return at

    @torch.no_grad()
    def filtered(self, run: Run, prompts: Sequence[str]) -> list[Filtered]:
        """What SAFREE makes of each prompt in a run of that many steps."""
        model, texts = run.backbone, list(dict.fromkeys(prompts))
        concept = projector(model.pooled(model.tokenize(self.phrases).input_ids))
        tokens, embeds = model.tokenize(texts), run.encode(texts).embeds
        lengths = (tokens.attention_mask.sum(dim=1) - 2).tolist()  # without begin and end marks
        masked = [masked_prompts(*one) for one in zip(tokens.input_ids, lengths, strict=True)]
        pooled = model.pooled(torch.cat(masked)) if sum(lengths) else concept.new_zeros(0, 0)
        found = {
            text: self._filtered(e, m, concept, len(run.timesteps))
            for text, e, m in zip(texts, embeds, pooled.split(lengths), strict=True)
        }
        return [found[text] for text in prompts]

    def _filtered(self, embeds: Tensor, masked: Tensor, concept: Tensor, N: int) -> Filtered:
        n = len(masked)
        if n == 0:  # an empty prompt has no tokens to change
            return Filtered(embeds, torch.zeros(0, dtype=torch.bool), 0.0, -1)
        before = embeds.double()
        within = before @ projector(masked).T  # P_m e
        after = within - within @ concept.T  # (I − P_c) P_m e
        triggers = trigger_tokens(masked, concept, self.alpha)
        changed, own, attended = before.clone(), slice(1, n + 1), slice(0, n + 2)
        changed[own] = torch.where(triggers[:, None], after[own], changed[own])
        # Begin and end marks count in β, as in the authors' code.
        beta = 1 - F.cosine_similarity(before[attended], after[attended], dim=-1).mean().item()
        last = last_step(beta, N, self.upper, self.k, self.t0)
        return Filtered(changed.to(embeds.dtype), triggers.cpu(), beta, last)

    def describe(self) -> dict:
        options = {key: list(v) if isinstance(v, tuple) else v for key, v in asdict(self).items()}
        parts = dict.fromkeys(("projection", "selection", "self_validation"), True)
        return {"kind": "safree", **parts, **options}


def masked_prompts(ids: Tensor, n: int) -> Tensor:
    """A prompt `[L]` of n tokens with its i-th replaced by token 0, for each i, `[n, L]`."""
    prompts = ids.repeat(n, 1)
    prompts[range(n), range(1, n + 1)] = 0
    return prompts


def SAFREE(
    phrases: str | Sequence[str],
    negative_prompt: str = "",
    rule: str | Rule = "replaced",
    omega: float = 7.5,
    **options,
) -> Method:
    """SAFREE (Yoon et al., ICLR 2025, arXiv 2410.12761).

    Args:
        phrases: the unsafe phrases; one text is split at its commas.
        negative_prompt: a static negative prompt besides. The authors' script gives the phrases,
            joined by commas, in place of ε_u; empty means none.
        rule, omega: how it enters; see `Method`.
        options: of `Safree`, such as `re_attention=False`.
    """
    phrases = tuple(phrases.split(",") if isinstance(phrases, str) else phrases)
    policy = negatives.Static(negative_prompt) if negative_prompt else negatives.Policy()
    strength = omega if negative_prompt else None
    return Method("safree", policy, rule, strength, Safree(phrases, **options))
