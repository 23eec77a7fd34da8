"""SAFREE: removes a concept from the text embedding, and attenuates features in the U-Net.

Yoon et al., ICLR 2025, arXiv 2410.12761; its authors' code is github.com/jaehong31/SAFREE, commit
b8b2c3f. A trigger's embedding is the code's (I − P_c) P_m e; the paper prints P_m (I − P_c) e.
Low-frequency features are multiplied by a factor where their magnitudes are larger, as in the
paper; the code assigns it, and compares real parts. `re_attention=False` and `end_mark=False` are
the released script, which also uses the phrases as the prompt of ε_u (`rule="replaced"`)."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import partial

import torch
from torch import Tensor, nn

from vldnp import negatives
from vldnp._finite import number
from vldnp.methods import Method
from vldnp.models.conditioning import AuxiliaryRows, Conditioning
from vldnp.models.families import SD
from vldnp.models.run import Run

# For `attenuated`, in units of the last place; with two threads equal spectra differ by up to 21.
ROUNDING = 100


def projector(vectors: Tensor) -> Tensor:
    """P = E (EᵀE)⁺ Eᵀ (eq. 1), `[D, D]`, in float64, onto the span of E's columns, here rows."""
    E = vectors.double().T
    return E @ torch.linalg.pinv(E.T @ E, hermitian=True) @ E.T


def trigger_tokens(masked: Tensor, concept: Tensor, alpha: float) -> Tensor:
    """Which tokens bring the concept in, `[n]` (eqs. 2 to 4): those without d_i < (1 + α) · mean of
    the other d_j, where d_i = ‖(I − P_c) m_i‖ and m_i is the pooled prompt without token i."""
    distances = (masked.double() - masked.double() @ concept.T).norm(dim=1)
    others = (distances.sum() - distances) / (len(distances) - 1)  # NaN for n = 1
    return ~(distances < (1 + alpha) * others)


def last_step(beta: float, num_inference_steps: int, upper: float, k: float, t0: float) -> int:
    """The last step with the changed embedding, round(U · sigmoid(2k (10β − t₀))) (eq. 6), U for
    N = 50. β is 1 − the mean cosine between the embeddings before and after."""
    share = torch.sigmoid(torch.tensor(2 * k * (10 * beta - t0), dtype=torch.float64))
    return round(upper * num_inference_steps / 50 * share.item())


def attenuated(changed: Tensor, unchanged: Tensor, scale: float) -> Tensor:
    """The changed branch's features (eq. 8): at the frequencies −1 and 0 (FreeU, arXiv 2309.11497),
    coefficients that exceed the unchanged branch's by more than rounding, in proportion to them and
    to the channel's ‖x‖₂, are multiplied by s = `scale`."""
    precise = torch.promote_types(changed.dtype, torch.float32)
    spectrum, other = (torch.fft.fft2(x.to(precise)) for x in (changed, unchanged))
    tolerance = max(ROUNDING * torch.finfo(precise).eps, torch.finfo(changed.dtype).eps)
    norm = torch.linalg.vector_norm(unchanged.to(precise), dim=(-2, -1), keepdim=True)
    exceeds = spectrum.abs() - other.abs() > tolerance * (other.abs() + norm)
    low = torch.zeros_like(exceeds)
    low[..., [[-1], [0]], [-1, 0]] = True
    spectrum = torch.where(low & exceeds, scale * spectrum, spectrum)
    return torch.fft.ifft2(spectrum).real.to(changed.dtype)


@contextmanager
def re_attention(unet: nn.Module, rows, auxiliary, scales: tuple[float, float]) -> Iterator[None]:
    """In this context the rows' skip features are `attenuated` against their auxiliary rows', by
    s₁ where the decoder is as wide as the U-Net's widest level, by s₂ where as the next."""
    rows, auxiliary = list(rows), list(auxiliary)
    levels = sorted(set(unet.config.block_out_channels), reverse=True)
    scale_at = dict(zip(levels, scales, strict=False))

    def attend(block: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        skips = [skip.clone() for skip in kwargs["res_hidden_states_tuple"]]
        widths = [kwargs["hidden_states"].shape[1], *(r.out_channels for r in block.resnets[:-1])]
        for width, skip in zip(widths, skips[::-1], strict=False):  # taken from the end
            if width in scale_at:
                skip[rows] = attenuated(skip[rows], skip[auxiliary], scale_at[width])
        return args, kwargs | {"res_hidden_states_tuple": tuple(skips)}

    with ExitStack() as hooks:
        for block in unet.up_blocks:
            hooks.enter_context(block.register_forward_pre_hook(attend, with_kwargs=True))
        yield


@dataclass(frozen=True)
class Filtered:
    """What SAFREE makes of one prompt."""

    embeds: Tensor  # the changed embedding, [L, D]
    triggers: Tensor  # which of the prompt's tokens are triggers, [n], without begin and end marks
    beta: float  # of the self-validating filter
    last_step: int  # the last one with `embeds`


@dataclass(frozen=True)
class Safree:
    """SAFREE as a conditioning policy."""

    phrases: tuple[str, ...]
    re_attention: bool = True  # while the embedding is changed, for one evaluation a step
    alpha: float = 0.01  # of `trigger_tokens`
    upper: float = 10.0  # U of `last_step`
    k: float = 2.5
    t0: float = 5.333
    scales: tuple[float, float] = (0.9, 0.2)  # s₁, s₂ of `re_attention`
    end_mark: bool = True  # of a cut prompt; without it the pooled embedding is the begin mark's

    def __post_init__(self):
        object.__setattr__(self, "phrases", tuple(phrase.strip() for phrase in self.phrases))
        if not self.phrases or not all(self.phrases):
            raise ValueError(f"SAFREE needs unsafe phrases, none empty, not {list(self.phrases)}")
        for setting in (self.alpha, self.upper, self.k, self.t0, *self.scales):
            number("a setting of SAFREE", setting)

    def begin(self, run: Run, prompts: Sequence[str]) -> Callable[[int], Conditioning]:
        """Step index → the conditioning of the prompts."""
        if run.backbone.family is not SD:
            own = f"{run.backbone.name!r} is {run.backbone.family.name}"
            raise ValueError(f"SAFREE is defined for {SD.name} only, and {own}")
        plain, found = run.encode(prompts), self.filtered(run, prompts)
        safe = torch.stack([f.embeds for f in found])

        def at(i: int) -> Conditioning:
            rows = [row for row, f in enumerate(found) if i <= f.last_step and f.triggers.any()]
            if not rows:
                return plain
            embeds = plain.embeds.clone()
            embeds[rows] = safe[rows]
            attending = partial(re_attention, scales=self.scales)
            beside = AuxiliaryRows(tuple(rows), plain[rows], attending)
            return Conditioning(embeds, beside if self.re_attention else None)

        return at

    @torch.no_grad()
    def filtered(self, run: Run, prompts: Sequence[str]) -> list[Filtered]:
        """What SAFREE makes of each prompt in a run of that many steps."""
        model, texts = run.backbone, list(dict.fromkeys(prompts))
        concept = projector(model.pooled(model.tokenize(self.phrases).input_ids))
        tokens, embeds = model.tokenize(texts), run.encode(texts).embeds
        if not self.end_mark:
            whole = model.pipe.tokenizer(texts, truncation=False, verbose=False).input_ids
            tokens.input_ids[[len(ids) > tokens.input_ids.shape[1] for ids in whole], -1] = 0
        counts = tokens.attention_mask.sum(dim=1) - 2  # without begin and end marks
        masked, lengths = tokens.input_ids.repeat_interleave(counts, dim=0), counts.tolist()
        places = [place for n in lengths for place in range(1, n + 1)]
        masked[range(len(masked)), places] = 0  # each prompt without its i-th token, for each i
        pooled = model.pooled(masked) if len(masked) else concept.new_zeros(0, 0)
        parts, N = zip(embeds, pooled.split(lengths), strict=True), len(run.timesteps)
        found = [self._filtered(own, without, concept, N) for own, without in parts]
        return [found[texts.index(text)] for text in prompts]

    def _filtered(self, embeds: Tensor, masked: Tensor, concept: Tensor, N: int) -> Filtered:
        if not (n := len(masked)):  # an empty prompt has no tokens to change
            return Filtered(embeds, torch.zeros(0, dtype=torch.bool), 0.0, -1)
        before = embeds.double()
        within = before @ projector(masked).T  # P_m e
        after = within - within @ concept.T  # (I − P_c) P_m e
        triggers = trigger_tokens(masked, concept, self.alpha)
        changed, own, attended = before.clone(), slice(1, n + 1), slice(0, n + 2)
        changed[own] = torch.where(triggers[:, None], after[own], changed[own])
        # Begin and end marks count in β, as in the authors' code.
        beta = 1 - torch.cosine_similarity(before[attended], after[attended], dim=-1).mean().item()
        last = last_step(beta, N, self.upper, self.k, self.t0)
        return Filtered(changed.to(embeds.dtype), triggers.cpu(), beta, last)

    def describe(self) -> dict:
        options = {key: list(v) if isinstance(v, tuple) else v for key, v in asdict(self).items()}
        parts = dict.fromkeys(("projection", "selection", "self_validation"), True)
        later = {} if options.pop("end_mark") else {"end_mark": False}
        return {"kind": "safree", **parts, **options, **later}


def SAFREE(
    phrases: str | Sequence[str], negative_prompt="", rule="replaced", omega=7.5, **options
) -> Method:
    """SAFREE (Yoon et al., ICLR 2025, arXiv 2410.12761). `phrases` are unsafe phrases, also as one
    text with commas. A static negative prompt, if there is one, enters by `rule` and `omega`.
    `options` are those of `Safree`, such as `re_attention=False`."""
    phrases = tuple(phrases.split(",") if isinstance(phrases, str) else phrases)
    policy = negatives.Static(negative_prompt) if negative_prompt else negatives.Policy()
    strength = omega if negative_prompt else None
    return Method("safree", policy, rule, strength, Safree(phrases, **options))
