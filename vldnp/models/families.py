"""Model families: the text conditioning of each, and how its network is called."""

import inspect
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import diffusers
import torch
from diffusers import DiffusionPipeline, SchedulerMixin
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from vldnp.models.conditioning import Conditioning

T5_TOKENS, FLUX_TOKENS = 256, 512  # limit of T5, as in the stock pipelines
WEIGHTED = re.compile(r"\([^()]*[^()\d\s]\s*:\s*-?[\d.]+\)|<lora:[^<>]+>")
FLUX_GUIDANCE = 3.5  # the stock input of FLUX.1-dev, which has guidance distilled in; this is not g
DPM = {"algorithm_type": "dpmsolver++", "thresholding": False}
FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
# name → scheduler class and settings; the rest comes from the pipeline's own scheduler config
SCHEDULERS = {
    "dpm++": (diffusers.DPMSolverMultistepScheduler, DPM),
    "dpm++-karras": (diffusers.DPMSolverMultistepScheduler, {**DPM, "use_karras_sigmas": True}),
    "ddim": (diffusers.DDIMScheduler, {"clip_sample": False, "thresholding": False}),
    "euler": (diffusers.EulerDiscreteScheduler, {}),
}
FLOW_SCHEDULERS = {
    "dpm++": (diffusers.DPMSolverMultistepScheduler, {**DPM, **FLOW}),
    "euler": (diffusers.FlowMatchEulerDiscreteScheduler, {}),
}
# Scheduler classes with one evaluation a step and x̂₀ in closed form, for ε, v or x₀.
SOLVERS = "DEISMultistep DPMSolverMultistep DPMSolverSinglestep UniPCMultistep "
STEPPERS = SOLVERS + "DDIMParallel DDIM DDPMParallel DDPM EulerAncestralDiscrete EulerDiscrete "
STEPPERS += "LCM LMSDiscrete PNDM SASolver TCD"
FLOW_STEPPERS = SOLVERS + "FlowMatchEulerDiscrete"


@dataclass(frozen=True)
class Family:
    """How models of one family are opened, conditioned and called."""

    name: str
    pipeline: type[DiffusionPipeline]  # that opens it
    network: str  # the component that predicts: `unet` or `transformer`
    embed: Callable[..., Conditioning]  # (pipe, texts, (height, width)) → a row for each text
    predict: Callable[..., Tensor]  # (pipe, latents, t, conditioning) → one call of the network
    flow: bool = False  # trained by flow matching
    packing: int = 1  # the side of the squares of latents that are packed into one token
    sigmas: Callable[[int], list[float]] | None = None  # N → noise levels, if not the scheduler's
    opening: dict = field(default_factory=dict)  # options of the pipeline's `from_pretrained`

    @property
    def schedulers(self) -> dict:
        return FLOW_SCHEDULERS if self.flow else SCHEDULERS

    def patch_size(self, network) -> int:
        """The side of the squares of latents that the network takes for one."""
        return network.config.get("patch_size", 1) * self.packing


def embed_sd(pipe: DiffusionPipeline, texts: list[str], size: tuple[int, int]) -> Conditioning:
    encoder, tokens = pipe.text_encoder, clip_tokens(pipe, texts)
    mask = tokens.attention_mask if getattr(encoder.config, "use_attention_mask", False) else None
    return Conditioning(encoder(tokens.input_ids, attention_mask=mask)[0].to(pipe.unet.dtype))


def predict_unet(pipe: DiffusionPipeline, latents: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
    added = {"added_cond_kwargs": cond.added} if cond.added else {}
    return pipe.unet(latents, t, encoder_hidden_states=cond.embeds, **added, return_dict=False)[0]


def embed_sdxl(pipe: DiffusionPipeline, texts: list[str], size: tuple[int, int]) -> Conditioning:
    """Time ids: original size, crop's corner, target size (Podell et al. 2023, section 2.2)."""
    encoded = pipe.encode_prompt(texts, do_classifier_free_guidance=False)
    embeds, pooled = (encoded[i].to(pipe.unet.dtype) for i in (0, 2))
    time_ids = embeds.new_tensor([[*size, 0, 0, *size]] * len(texts))
    return Conditioning(embeds, added={"text_embeds": pooled, "time_ids": time_ids})


def embed_sd3(pipe: DiffusionPipeline, texts: list[str], size: tuple[int, int]) -> Conditioning:
    how, dtype = {"max_sequence_length": T5_TOKENS}, pipe.transformer.dtype
    encoded = pipe.encode_prompt(texts, None, None, do_classifier_free_guidance=False, **how)
    return Conditioning(encoded[0].to(dtype), added={"pooled_projections": encoded[2].to(dtype)})


def predict_sd3(pipe: DiffusionPipeline, latents: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
    states, times = {"encoder_hidden_states": cond.embeds}, t.expand(len(latents))
    return pipe.transformer(latents, timestep=times, **states, **cond.added, return_dict=False)[0]


def embed_flux(pipe: DiffusionPipeline, texts: list[str], size: tuple[int, int]) -> Conditioning:
    embeds, pooled, _ = pipe.encode_prompt(texts, max_sequence_length=FLUX_TOKENS)
    dtype, added = pipe.transformer.dtype, {"pooled_projections": pooled.to(pipe.transformer.dtype)}
    if pipe.transformer.config.guidance_embeds:
        added["guidance"] = torch.full([len(texts)], FLUX_GUIDANCE, device=embeds.device)
    return Conditioning(embeds.to(dtype), added=added)


def predict_flux(pipe: DiffusionPipeline, latents: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
    """Squares of 2 × 2 latents are one token each, whose place is its row and column."""
    tokens = torch.pixel_unshuffle(latents, FLUX.packing)
    rows, columns = tokens.shape[-2:]
    places = torch.cartesian_prod(torch.arange(rows), torch.arange(columns))
    ids = {"img_ids": torch.nn.functional.pad(places, (1, 0)).to(latents)}
    ids["txt_ids"] = latents.new_zeros(cond.embeds.shape[1], 3)
    how = {"timestep": t.expand(len(latents)) / 1000, "encoder_hidden_states": cond.embeds, **ids}
    tokens = tokens.flatten(2).transpose(1, 2)
    pred = pipe.transformer(tokens, **how, **cond.added, return_dict=False)[0]
    return torch.pixel_shuffle(pred.transpose(1, 2).unflatten(2, (rows, columns)), FLUX.packing)


# The safety checker would replace finished images by black ones; here a judge rates them.
UNCHECKED = {"safety_checker": None, "requires_safety_checker": False}
SD1, XL = diffusers.StableDiffusionPipeline, diffusers.StableDiffusionXLPipeline
SD = Family("Stable Diffusion 1/2", SD1, "unet", embed_sd, predict_unet, opening=UNCHECKED)
SDXL = Family("Stable Diffusion XL", XL, "unet", embed_sdxl, predict_unet)
PIPE3, TRANSFORMER = diffusers.StableDiffusion3Pipeline, "transformer"
SD3 = Family("Stable Diffusion 3", PIPE3, TRANSFORMER, embed_sd3, predict_sd3, flow=True)
DOWN = {"flow": True, "packing": 2, "sigmas": lambda N: [1 - i / N for i in range(N)]}
FLUX = Family("FLUX.1", diffusers.FluxPipeline, TRANSFORMER, embed_flux, predict_flux, **DOWN)
FAMILIES = SD, SDXL, SD3, FLUX


def family_of(pipe: DiffusionPipeline) -> Family:
    """The family of a pipeline; `ValueError` for an unknown one, or if it needs more than text."""
    kind, *bases = (base.__name__ for base in type(pipe).__mro__)
    family = family_named(kind, *bases)
    config, latents = getattr(pipe, family.network).config, pipe.vae.config.latent_channels
    if (channels := config.in_channels // family.packing**2) != latents:
        said = f"takes {channels} channels and the VAE has {latents}, as for inpainting"
        raise ValueError(f"this {kind} {said}; open a model that needs text alone")
    if config.get("time_cond_proj_dim") is not None:
        raise ValueError(f"this {kind} has the guidance scale distilled in; open the original")
    return family


def family_named(kind: str, *bases: str) -> Family:
    """The family that has a pipeline class of this name, or of one of its bases."""
    known = {family.pipeline.__name__: family for family in FAMILIES}
    if found := [known[name] for name in (kind, *bases) if name in known]:
        return found[0]
    raise ValueError(f"{kind} is not a pipeline that can be guided; use one of {', '.join(known)}")


def check_scheduler(scheduler: SchedulerMixin, family: Family) -> None:
    """A `ValueError` if images cannot be generated with this scheduler."""
    kind, config = type(scheduler).__name__, getattr(scheduler, "config", {})
    known = FLOW_STEPPERS if family.flow else STEPPERS
    does_not = f"{kind} does not fit {family.name}; use one of {', '.join(family.schedulers)}"
    if kind.removesuffix("Scheduler") not in known.split():
        raise ValueError(f"{does_not}, or a scheduler of one of the classes {known}")
    predicts = config.get("prediction_type", "flow_prediction")
    if (predicts == "flow_prediction") != family.flow:
        raise ValueError(f"{does_not}, or set its prediction_type, {predicts!r}, to the model's")
    accepted = inspect.signature(type(scheduler)).parameters  # the config keeps others' options too
    clips = [o for o in ("clip_sample", "thresholding") if o in accepted and config.get(o)]
    mended, why = ", ".join(f"{option}=False" for option in clips), "clips x̂₀ as if it were pixels"
    if kind == "PNDMScheduler" and not config.skip_prk_steps:
        mended, why = "skip_prk_steps=True", "takes several evaluations in its first steps"
    if mended:
        raise ValueError(f"{kind} {why}; use {kind}.from_config(scheduler.config, {mended})")


def clip_tokens(pipe: DiffusionPipeline, texts: Sequence[str]):
    """`input_ids` and `attention_mask`, `[B, L]`, padded or cut to the first encoder's limit L."""
    texts = [_converted(pipe, text, pipe.tokenizer) for text in texts]
    how = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
    return pipe.tokenizer(texts, **how).to(pipe._execution_device)


def _converted(pipe: DiffusionPipeline, text: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """With all the tokens of a textual inversion in place of its first one."""
    several = any(token.endswith("_1") for token in tokenizer.added_tokens_encoder)
    convert = several and getattr(pipe, "maybe_convert_prompt", None)
    return convert(text, tokenizer) if convert else text


def warn_of_truncation(pipe: DiffusionPipeline, texts: Sequence[str]) -> None:
    """Warns of the cut end of a prompt, and of weights in a prompt, which are plain letters."""
    if any(map(WEIGHTED.search, texts)):
        said = 'weights as in "(word:1.4)" or "<lora:name:1>" in a prompt are read as letters'
        warnings.warn(said, UserWarning, stacklevel=4)
    tokenizer, limit = pipe.tokenizer, pipe.tokenizer.model_max_length
    if getattr(pipe, "text_encoder_3", None) is not None:
        tokenizer, limit = pipe.tokenizer_3, T5_TOKENS
    elif isinstance(pipe, diffusers.FluxPipeline):
        tokenizer, limit = pipe.tokenizer_2, FLUX_TOKENS
    for text in texts:
        text = _converted(pipe, text, tokenizer)
        ids = tokenizer(text, truncation=False, verbose=False).input_ids
        if len(ids) > limit and (end := tokenizer.decode(ids[limit - 1 : -1]).strip()):
            said = f"a prompt is longer than the text encoder's {limit} tokens; truncated text:"
            warnings.warn(f"{said} {end!r}", UserWarning, stacklevel=4)
