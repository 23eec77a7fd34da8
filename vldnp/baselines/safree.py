"""SAFREE: prompts freed of a concept in the text embedding, and features in the U-Net.

Yoon et al., "SAFREE: Training-Free and Adaptive Guard for Safe Text-to-Image and Video
Generation", ICLR 2025, arXiv 2410.12761. Where the paper and its authors' code differ:

- The paper prints P_m (I − P_c) e for a trigger's embedding, the code has (I − P_c) P_m e, which
  is free of the concept for certain; so has this.
- The paper *attenuates* low-frequency features by a factor, the code *assigns* the factor in
  their place and compares real parts; here they are multiplied, and magnitudes are compared.
- The code also scales the backbone's features, by b₁ = b₂ = 1: not at all. This does not.

Where the authors' released code (github.com/jaehong31/SAFREE, commit b8b2c3f) differs besides:

- Its script never switches re-attention on: `-lra` installs the decoder's blocks with
  `safree=None`, for which they filter nothing. Only the third branch is evaluated, and dropped.
- That branch is evaluated at every step, also where the embedding is no longer changed; here
  only as long as it is. (Installed with `safree="low"`, the code would go on filtering there: it
  keeps a coefficient only where Re(unchanged) > Re(changed), which equal ones never are.)
- A prompt longer than the text encoder's limit loses its end mark where its tokens are masked
  (the ids are cut at 77), so that the masked prompts' pooled states are not the end mark's. Here
  the tokenizer cuts, and the end mark stays.
- The phrases, joined by commas, take the place of ε_u's empty prompt: `SAFREE(phrases,
  negative_prompt=", ".join(phrases))`.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from vldnp import negatives
from vldnp._finite import is_finite
from vldnp.guidance import Rule
from vldnp.methods import Method
from vldnp.models.conditioning import AuxiliaryRows, Conditioning
from vldnp.models.families import SD
from vldnp.models.run import Run

STEPS = 50
"""The step count to which the paper's U refers."""

ROUNDING = 100
"""In units of the last place, for `attenuated`: 1.2e-5 in float32, relative. With two threads the
spectra of equal features differ by up to 2.5e-6 (moji-sd); where features do differ, 99.9 % of the
coefficients differ by more than 2e-4."""


MASKS = "'zero', 'drop', a token id, or a word that is one token"


def projector(vectors: Tensor) -> Tensor:
    """P = E (EᵀE)⁺ Eᵀ, onto the span of the columns of E (arXiv 2410.12761, eq. 1).

    Args:
        vectors: the columns, as rows, `[n, D]`; n = 0 spans nothing.

    Returns:
        `[D, D]`, float64: the inverse of nearly parallel vectors needs it.
    """
    E = vectors.double().T
    return E @ torch.linalg.pinv(E.T @ E, hermitian=True) @ E.T


def trigger_tokens(masked: Tensor, concept: Tensor, alpha: float) -> Tensor:
    """Which tokens bring the concept in: without them the prompt is farther from it than others.

    d_i = ‖(I − P_c) m_i‖; token i is a trigger unless d_i < (1 + α) · mean of the other d_j
    (arXiv 2410.12761, eqs. 2 to 4). The only token of a prompt has no others and is a trigger.

    Args:
        masked: m_i, the pooled embeddings of the prompt without its i-th token, `[n, D]`.
        concept: P_c, `[D, D]`.
        alpha: α.

    Returns:
        `[n]`, boolean.
    """
    distances = (masked.double() - masked.double() @ concept.T).norm(dim=1)
    others = (distances.sum() - distances) / (len(distances) - 1)  # NaN for n = 1
    return ~(distances < (1 + alpha) * others)


def nearest_category(masked: Tensor, categories: Sequence[Tensor]) -> Tensor:
    """Which category each token is nearest to: argmin_k ‖(I − P_k) m_i‖, `[n]`.

    CASG for SAFREE (Xiang et al., CVPR 2026, arXiv 2602.20880; `casg_safree_projection` in its
    code, github.com/tmllab/2026_CVPR_CASG).

    Args:
        masked: m_i, as in `trigger_tokens`.
        categories: P_k, `[D, D]` each.
    """
    m = masked.double()
    return torch.stack([(m - m @ P.T).norm(dim=1) for P in categories]).argmin(dim=0)


def last_step(beta: float, num_inference_steps: int, upper: float, k: float, t0: float) -> int:
    """The last step that the changed embedding serves, round(U · sigmoid(2k (10β − t₀))) (eq. 6).

    Args:
        beta: 1 − the mean cosine between the embeddings before and after; 0 … 2.
        num_inference_steps: N; `upper` is U for N = 50 and scaled to it.
        upper, k, t0: U, k, t₀.
    """
    share = torch.sigmoid(torch.tensor(2 * k * (10 * beta - t0), dtype=torch.float64))
    return round(upper * num_inference_steps / STEPS * share.item())


def attenuated(changed: Tensor, unchanged: Tensor, scale: float, window: int = 1) -> Tensor:
    """The changed branch's features, weaker where its low frequencies exceed the other's (eq. 8).

    In the centred window (FreeU, arXiv 2309.11497: from −`window` to `window` − 1 around zero
    frequency), coefficients of larger magnitude than the unchanged branch's are multiplied by s.
    Larger is what exceeds it by more than rounding (`ROUNDING`), in proportion to the coefficient
    and to the channel's root mean square one, which is ‖x‖₂ (Parseval): skip features from before
    the first cross-attention are the same in both branches, and nothing of them is attenuated.

    Args:
        changed, unchanged: `[k, C, h, w]`.
        scale: s.
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

    s₁ acts where the decoder is as wide as the U-Net's widest level, s₂ where it is as wide as
    the next (FreeU's two stages: 1280 and 640 channels in Stable Diffusion 1).
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
    """What SAFREE makes of one prompt.

    Attributes:
        embeds: the changed embedding, `[L, D]`.
        triggers: which of the prompt's tokens are triggers, `[n]`, begin and end marks aside.
        beta: β of the self-validating filter.
        last_step: the last step that `embeds` serves.
    """

    embeds: Tensor
    triggers: Tensor
    beta: float
    last_step: int


@dataclass(frozen=True)
class Safree:
    """SAFREE as a conditioning policy. Each of its parts can be switched off on its own.

    Attributes:
        phrases: the unsafe phrases.
        projection: change the triggers' embeddings at all (b); off, the prompts are as written.
        selection: find triggers (b); off, every token of the prompt is taken for one.
        self_validation: serve the changed embedding in as many early steps as the filter finds
            right (c); off, in all.
        re_attention: attenuate features against an unchanged branch (d), while the embedding is
            changed; it costs the image one evaluation a step.
        alpha: α of `trigger_tokens`.
        upper, k, t0: of `last_step`.
        scales: s₁, s₂ of `re_attention`.
        mask: what a token gives way to when triggers are looked for: `zero`, token id 0 ("!" in
            Stable Diffusion 1), as in the authors' code; `drop`, nothing, and the rest moves up;
            or a token by its id or by its word, such as `a`. A model to which token 0 is foreign
            tells the tokens apart better with another.
        categories: phrases by category of harm, for SAFREE with CASG: triggers are found by all
            `phrases`, and each is freed of the category that is nearest to it, not of all.

    Raises:
        ValueError: a setting that does not do; a mask that is no token of the model's, when a run
            begins.
    """

    phrases: tuple[str, ...]
    projection: bool = True
    selection: bool = True
    self_validation: bool = True
    re_attention: bool = True
    alpha: float = 0.01
    upper: float = 10.0
    k: float = 2.5
    t0: float = 5.333
    scales: tuple[float, float] = (0.9, 0.2)
    mask: str | int = "zero"
    categories: tuple[tuple[str, ...], ...] = ()

    def __post_init__(self):
        is_id = isinstance(self.mask, int) and not isinstance(self.mask, bool) and self.mask >= 0
        if not is_id and not (isinstance(self.mask, str) and self.mask.strip()):
            raise ValueError(f"SAFREE's mask must be {MASKS}, not {self.mask!r}")
        if is_id and self.mask == 0:
            object.__setattr__(self, "mask", "zero")
        object.__setattr__(self, "phrases", tuple(phrase.strip() for phrase in self.phrases))
        own = tuple(tuple(phrase.strip() for phrase in phrases) for phrases in self.categories)
        object.__setattr__(self, "categories", own)
        if not self.phrases or not all(self.phrases) or not all(p and all(p) for p in own):
            raise ValueError(
                f"SAFREE needs unsafe phrases, none of them empty, not {list(self.phrases)}"
                + f" by category {list(own)}" * bool(own)
            )
        numbers = {"alpha": self.alpha, "upper": self.upper, "k": self.k, "t0": self.t0}
        numbers |= {f"scales[{i}]": scale for i, scale in enumerate(self.scales)}
        for name, value in numbers.items():
            if not is_finite(value):
                raise ValueError(f"SAFREE's {name} must be a finite number, not {value!r}")

    def begin(self, run: Run, prompts: Sequence[str]) -> Callable[[int], Conditioning]:
        """See `vldnp.models.conditioning.Prompting`."""
        if run.backbone.family is not SD:
            raise ValueError(
                f"SAFREE is defined for one text encoder and a U-Net, which {SD.name} has; "
                f"{run.backbone.name!r} is {run.backbone.family.name}: use another method with it"
            )
        plain = run.encode(prompts)
        if not self.projection:
            return lambda i: plain
        found = self.filtered(run, prompts)
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
        """What becomes of each prompt in this run (its step count counts)."""
        model = run.backbone
        concept, *categories = (
            projector(model.pooled(model.tokenize(phrases).input_ids))
            for phrases in (self.phrases, *self.categories)
        )
        texts = list(dict.fromkeys(prompts))
        tokens, embeds = model.tokenize(texts), run.encode(texts).embeds
        lengths = (tokens.attention_mask.sum(dim=1) - 2).tolist()  # without begin and end marks
        tokenizer = model.pipe.tokenizer
        mask, pad = self._mask_token(tokenizer), tokenizer.pad_token_id
        masked = [
            masked_prompts(ids, n, mask, pad)
            for ids, n in zip(tokens.input_ids, lengths, strict=True)
        ]
        pooled = model.pooled(torch.cat(masked)) if sum(lengths) else concept.new_zeros(0, 0)
        found = {
            text: self._filtered(e, m, concept, categories, len(run.timesteps))
            for text, e, m in zip(texts, embeds, pooled.split(lengths), strict=True)
        }
        return [found[text] for text in prompts]

    def _filtered(
        self,
        embeds: Tensor,
        masked: Tensor,
        concept: Tensor,
        categories: Sequence[Tensor],
        num_steps: int,
    ) -> Filtered:
        n = len(masked)
        if n == 0:  # an empty prompt has no tokens to change
            return Filtered(embeds, torch.zeros(0, dtype=torch.bool), 0.0, -1)
        before = embeds.double()
        within = before @ projector(masked).T  # P_m e
        after = within - within @ concept.T  # (I − P_c) P_m e
        triggers = trigger_tokens(masked, concept, self.alpha)
        if not self.selection:
            triggers = torch.ones_like(triggers)
        freed = after[1 : n + 1]
        if categories:
            own = within[1 : n + 1]
            each = torch.stack([own - own @ P.T for P in categories], dim=1)
            freed = each[range(n), nearest_category(masked, categories)]
        changed = before.clone()
        changed[1 : n + 1] = torch.where(triggers[:, None], freed, changed[1 : n + 1])
        attended = slice(0, n + 2)  # begin and end marks too, as in the authors' code
        beta = 1 - F.cosine_similarity(before[attended], after[attended], dim=-1).mean().item()
        last = num_steps - 1
        if self.self_validation:
            last = last_step(beta, num_steps, self.upper, self.k, self.t0)
        return Filtered(changed.to(embeds.dtype), triggers.cpu(), beta, last)

    def _mask_token(self, tokenizer: PreTrainedTokenizerBase) -> int | None:
        """The id that stands for a masked token; None where it is left out."""
        if self.mask in ("zero", "drop"):
            return 0 if self.mask == "zero" else None
        ids = [self.mask]
        if isinstance(self.mask, str):
            ids = tokenizer(self.mask, add_special_tokens=False).input_ids
        marks = (tokenizer.bos_token_id, tokenizer.eos_token_id)
        if len(ids) != 1 or ids[0] in marks or ids[0] >= len(tokenizer):
            raise ValueError(
                f"SAFREE's mask must be {MASKS} of this model, not {self.mask!r} (token ids {ids})"
            )
        return ids[0]

    def describe(self) -> dict:
        options = {key: list(v) if isinstance(v, tuple) else v for key, v in asdict(self).items()}
        if self.mask == "zero":  # as before there was a choice, so that records stay the same
            del options["mask"]
        if not self.categories:
            del options["categories"]
        return {"kind": "safree", **options}


def masked_prompts(ids: Tensor, n: int, mask: int | None, pad: int) -> Tensor:
    """A prompt with its i-th token masked, for each i.

    Args:
        ids: `[L]`: begin mark, n tokens, end mark, padding.
        n: the number of tokens.
        mask: the token id in its place; None leaves it out, and the rest moves up.
        pad: the id of the padding that then fills the end.

    Returns:
        `[n, L]`.
    """
    prompts, places = ids.repeat(n, 1), (range(n), range(1, n + 1))
    if mask is not None:
        prompts[places] = mask
        return prompts
    kept = torch.ones_like(prompts, dtype=torch.bool)
    kept[places] = False
    return F.pad(prompts[kept].view(n, len(ids) - 1), (0, 1), value=pad)


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
        options: of `Safree`, such as `re_attention=False`, or `categories`, with which it is
            CASG's SAFREE.
    """
    phrases = tuple(phrases.split(",") if isinstance(phrases, str) else phrases)
    policy = negatives.Static(negative_prompt) if negative_prompt else negatives.Policy()
    strength = omega if negative_prompt else None
    return Method("safree", policy, rule, strength, Safree(phrases, **options))
