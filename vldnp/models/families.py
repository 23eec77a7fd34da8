"""Model families: the text conditioning of each, and how its network is called.

Everything else about a diffusers pipeline is the same for all of them; see `vldnp.models.backbone`
and `vldnp.models.run`.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from diffusers import (
    DDIMParallelScheduler,
    DDIMScheduler,
    DDPMParallelScheduler,
    DDPMScheduler,
    DEISMultistepScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    LCMScheduler,
    LMSDiscreteScheduler,
    PNDMScheduler,
    SASolverScheduler,
    SchedulerMixin,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    TCDScheduler,
    UniPCMultistepScheduler,
)
from diffusers.loaders import TextualInversionLoaderMixin
from torch import Tensor
from torch.nn.functional import pad, pixel_shuffle, pixel_unshuffle
from transformers import PreTrainedTokenizerBase

from vldnp.models.conditioning import Conditioning

T5_TOKENS = 256
"""So many tokens Stable Diffusion 3's T5 reads, as in the stock pipeline."""

FLUX_TOKENS = 512
"""The same for FLUX."""

FLUX_GUIDANCE = 3.5
"""The guidance scale that FLUX.1-dev, into which guidance is distilled, is told by the stock
pipeline; FLUX.1-schnell is told none. It is no g: ε_cfg is made of such predictions."""

DPM = {"algorithm_type": "dpmsolver++", "thresholding": False}

SCHEDULERS = {
    "dpm++": (DPMSolverMultistepScheduler, DPM),
    "dpm++-karras": (DPMSolverMultistepScheduler, {**DPM, "use_karras_sigmas": True}),
    "ddim": (DDIMScheduler, {"clip_sample": False, "thresholding": False}),
    "euler": (EulerDiscreteScheduler, {}),
}
"""name → scheduler class and settings; the rest comes from the pipeline's own scheduler config."""

FLOW_SCHEDULERS = {
    "dpm++": (
        DPMSolverMultistepScheduler,
        {**DPM, "prediction_type": "flow_prediction", "use_flow_sigmas": True},
    ),
    "euler": (FlowMatchEulerDiscreteScheduler, {}),
}
"""The same for flow matching."""

SOLVERS = (
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    UniPCMultistepScheduler,
)
"""Classes that serve both, by their `prediction_type`."""

STEPPERS = (
    DDIMParallelScheduler,
    DDIMScheduler,
    DDPMParallelScheduler,
    DDPMScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    LMSDiscreteScheduler,
    PNDMScheduler,
    SASolverScheduler,
    TCDScheduler,
    *SOLVERS,
)
"""Scheduler classes for predictions of ε, v or x₀: one evaluation a step, x̂₀ in closed form."""

FLOW_STEPPERS = (FlowMatchEulerDiscreteScheduler, *SOLVERS)
"""The same for flow matching."""


@dataclass(frozen=True)
class Family:
    """How models of one family are opened, told and called.

    Attributes:
        name: as people say it.
        pipeline: the diffusers class that opens it.
        network: the component that predicts: `unet` or `transformer`.
        needed: the components that it cannot do without.
        embed: `(pipe, texts, size) -> Conditioning`, a row for each text; size is height, width
            in pixels.
        predict: `(pipe, latents, t, conditioning) -> prediction`, one call of the network.
        schedulers: those that go by a name.
        steppers: the classes of which a scheduler object may be.
        flow: whether it was trained by flow matching.
        packing: the side of the squares of latents that are packed into one token's channels.
        sigmas: N → the noise levels before the shift by size, where they are not the scheduler's.
        opening: options of the pipeline's `from_pretrained`.
    """

    name: str
    pipeline: type[DiffusionPipeline]
    network: str
    needed: tuple[str, ...]
    embed: Callable[[DiffusionPipeline, list[str], tuple[int, int]], Conditioning]
    predict: Callable[[DiffusionPipeline, Tensor, Tensor, Conditioning], Tensor]
    schedulers: dict = field(default_factory=lambda: SCHEDULERS)
    steppers: tuple[type[SchedulerMixin], ...] = STEPPERS
    flow: bool = False
    packing: int = 1
    sigmas: Callable[[int], list[float]] | None = None
    opening: dict = field(default_factory=dict)


def embed_sd(pipe: DiffusionPipeline, texts: list[str], size: tuple[int, int]) -> Conditioning:
    """The last states of the only text encoder."""
    encoder, tokens = pipe.text_encoder, clip_tokens(pipe, texts)
    uses_mask = getattr(encoder.config, "use_attention_mask", False)
    mask = tokens.attention_mask if uses_mask else None
    states = encoder(tokens.input_ids, attention_mask=mask)[0]
    return Conditioning(states.to(pipe.unet.dtype))


def predict_sd(pipe: DiffusionPipeline, latents: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
    return pipe.unet(latents, t, encoder_hidden_states=cond.embeds, return_dict=False)[0]


def embed_sdxl(pipe: DiffusionPipeline, texts: list[str], size: tuple[int, int]) -> Conditioning:
    """Both encoders' last states but one side by side; pooled states; the picture's size, uncut.

    The six time ids are original size, crop's corner and target size (Podell et al. 2023, arXiv
    2307.01952, section 2.2).
    """
    encoded = pipe.encode_prompt(texts, do_classifier_free_guidance=False)
    embeds, pooled = encoded[0].to(pipe.unet.dtype), encoded[2].to(pipe.unet.dtype)
    time_ids = embeds.new_tensor([[*size, 0, 0, *size]] * len(texts))
    return Conditioning(embeds, added={"text_embeds": pooled, "time_ids": time_ids})


def predict_sdxl(pipe: DiffusionPipeline, latents: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
    return pipe.unet(
        latents,
        t,
        encoder_hidden_states=cond.embeds,
        added_cond_kwargs=cond.added,
        return_dict=False,
    )[0]


def embed_sd3(pipe: DiffusionPipeline, texts: list[str], size: tuple[int, int]) -> Conditioning:
    """Both CLIPs' states beside each other, T5's below them; the CLIPs' pooled states."""
    encoded = pipe.encode_prompt(
        texts, None, None, do_classifier_free_guidance=False, max_sequence_length=T5_TOKENS
    )
    dtype = pipe.transformer.dtype
    return Conditioning(encoded[0].to(dtype), added={"pooled_projections": encoded[2].to(dtype)})


def predict_sd3(pipe: DiffusionPipeline, latents: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
    return pipe.transformer(
        latents,
        timestep=t.expand(len(latents)),
        encoder_hidden_states=cond.embeds,
        return_dict=False,
        **cond.added,
    )[0]


def embed_flux(pipe: DiffusionPipeline, texts: list[str], size: tuple[int, int]) -> Conditioning:
    """T5's states; CLIP's pooled ones; and what guidance scale a distilled network is told."""
    embeds, pooled, _ = pipe.encode_prompt(texts, max_sequence_length=FLUX_TOKENS)
    dtype = pipe.transformer.dtype
    added = {"pooled_projections": pooled.to(dtype)}
    if pipe.transformer.config.guidance_embeds:
        added["guidance"] = torch.full([len(texts)], FLUX_GUIDANCE, device=embeds.device)
    return Conditioning(embeds.to(dtype), added=added)


def predict_flux(pipe: DiffusionPipeline, latents: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
    """Squares of 2 × 2 latents are one token each, whose place is its row and column."""
    tokens = pixel_unshuffle(latents, FLUX.packing)
    rows, columns = tokens.shape[-2:]
    places = torch.cartesian_prod(torch.arange(rows), torch.arange(columns))
    pred = pipe.transformer(
        tokens.flatten(2).transpose(1, 2),
        timestep=t.expand(len(latents)) / 1000,
        encoder_hidden_states=cond.embeds,
        img_ids=pad(places, (1, 0)).to(latents),
        txt_ids=latents.new_zeros(cond.embeds.shape[1], 3),
        return_dict=False,
        **cond.added,
    )[0]
    return pixel_shuffle(pred.transpose(1, 2).unflatten(2, (rows, columns)), FLUX.packing)


SD = Family(
    "Stable Diffusion 1/2",
    StableDiffusionPipeline,
    "unet",
    ("unet", "vae", "text_encoder", "tokenizer"),
    embed_sd,
    predict_sd,
    # The safety checker would black out pictures after the fact; here they are judged instead.
    opening={"safety_checker": None, "requires_safety_checker": False},
)
SDXL = Family(
    "Stable Diffusion XL",
    StableDiffusionXLPipeline,
    "unet",
    ("unet", "vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"),
    embed_sdxl,
    predict_sdxl,
)
SD3 = Family(
    "Stable Diffusion 3",
    StableDiffusion3Pipeline,
    "transformer",
    ("transformer", "vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"),
    embed_sd3,
    predict_sd3,
    FLOW_SCHEDULERS,
    FLOW_STEPPERS,
    flow=True,
)
FLUX = Family(
    "FLUX.1",
    FluxPipeline,
    "transformer",
    ("transformer", "vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"),
    embed_flux,
    predict_flux,
    FLOW_SCHEDULERS,
    FLOW_STEPPERS,
    flow=True,
    packing=2,
    sigmas=lambda N: [1 - i / N for i in range(N)],
)
FAMILIES = (SD, SDXL, SD3, FLUX)


def family_of(pipe: DiffusionPipeline) -> Family:
    """The family of a pipeline that can be guided here.

    Raises:
        ValueError: it is of no known family, or of a kind that needs more than a prompt.
    """
    kind = type(pipe).__name__
    family = next((f for f in FAMILIES if isinstance(pipe, f.pipeline)), None)
    if family is None:
        raise unsupported(kind)
    if missing := [part for part in family.needed if getattr(pipe, part, None) is None]:
        raise ValueError(
            f"this {kind} has no {missing[0]}, which {family.name} is told its prompts with; "
            f"open one that has {', '.join(family.needed)}"
        )
    network = getattr(pipe, family.network)
    channels = network.config.in_channels // family.packing**2
    if channels != pipe.vae.config.latent_channels:
        raise ValueError(
            f"the {family.network} of this {kind} takes {channels} channels and "
            f"the VAE has {pipe.vae.config.latent_channels}, as for inpainting; open a model that "
            "makes pictures from text alone"
        )
    if network.config.get("time_cond_proj_dim") is not None:
        raise ValueError(
            f"the {family.network} of this {kind} has the guidance scale distilled into it, and "
            "there is no ε_u to guide with; open the model that it was distilled from"
        )
    return family


def family_named(class_name: str) -> Family:
    """The family whose pipeline has this class name, as in `model_index.json`.

    Raises:
        ValueError: there is none.
    """
    for family in FAMILIES:
        if family.pipeline.__name__ == class_name:
            return family
    raise unsupported(class_name)


def unsupported(kind: str) -> ValueError:
    known = ", ".join(f"{f.pipeline.__name__} ({f.name})" for f in FAMILIES)
    return ValueError(f"{kind} is not a pipeline that can be guided here; use one of {known}")


def check_scheduler(scheduler: SchedulerMixin, family: Family) -> None:
    """Whether this scheduler makes pictures with models of this family.

    Raises:
        ValueError: it does not; one line that says what would.
    """
    kind = type(scheduler).__name__
    if not isinstance(scheduler, family.steppers):
        known = ", ".join(stepper.__name__ for stepper in family.steppers)
        raise ValueError(
            f"{kind} does not fit {family.name}; use one of {', '.join(family.schedulers)}, or an "
            f"object of one of {known}"
        )
    config = scheduler.config
    is_flow = config.get("prediction_type", "flow_prediction") == "flow_prediction"
    if is_flow != family.flow:
        wanted = "flow_prediction" if family.flow else "the one that the model was trained for"
        raise ValueError(
            f"{kind} with prediction_type {config.get('prediction_type')!r} does not fit "
            f"{family.name}; use one of {', '.join(family.schedulers)}, or set it to {wanted}"
        )
    accepted = inspect.signature(type(scheduler)).parameters  # the config keeps others' options too
    clips = [o for o in ("clip_sample", "thresholding") if o in accepted and config.get(o)]
    if clips:
        raise ValueError(
            f"{kind} clips x̂₀ to a range meant for pixels, and this model has latents; use "
            f"{kind}.from_config(scheduler.config, {', '.join(f'{o}=False' for o in clips)})"
        )
    if isinstance(scheduler, PNDMScheduler) and not config.skip_prk_steps:
        raise ValueError(
            f"{kind} takes several evaluations in each of its first steps (Runge-Kutta), which "
            f"query steps do not fit; use {kind}.from_config(scheduler.config, skip_prk_steps=True)"
        )


def clip_tokens(pipe: DiffusionPipeline, texts: Sequence[str]):
    """`input_ids` and `attention_mask`, `[B, L]`, padded or cut to the first encoder's limit L."""
    tokenizer, texts = pipe.tokenizer, list(texts)
    if isinstance(pipe, TextualInversionLoaderMixin):
        texts = [pipe.maybe_convert_prompt(text, tokenizer) for text in texts]
    limit = tokenizer.model_max_length
    return tokenizer(
        texts, padding="max_length", max_length=limit, truncation=True, return_tensors="pt"
    ).to(pipe._execution_device)


def primary_tokenizer(pipe: DiffusionPipeline) -> tuple[PreTrainedTokenizerBase, int]:
    """The tokenizer of the encoder that reads most of a prompt, and how many tokens it reads."""
    if getattr(pipe, "text_encoder_3", None) is not None:
        return pipe.tokenizer_3, T5_TOKENS
    if isinstance(pipe, FluxPipeline):
        return pipe.tokenizer_2, FLUX_TOKENS
    return pipe.tokenizer, pipe.tokenizer.model_max_length


def truncated(pipe: DiffusionPipeline, text: str) -> str | None:
    """The end of a prompt that no text encoder reads, as it is too long; None where it fits."""
    tokenizer, limit = primary_tokenizer(pipe)
    if isinstance(pipe, TextualInversionLoaderMixin):
        text = pipe.maybe_convert_prompt(text, tokenizer)
    ids = tokenizer(text, truncation=False, verbose=False).input_ids
    return tokenizer.decode(ids[limit - 1 : -1]).strip() if len(ids) > limit else None


def spelled(pipe: DiffusionPipeline, text: str) -> list[str]:
    """The words of a text that are no token of the first tokenizer's, each once, in order.

    It writes such a word in several pieces, or with its mark for the unknown.
    """
    encoded = pipe.tokenizer(text, truncation=False, add_special_tokens=False, verbose=False)
    places, unknown = encoded.word_ids(), pipe.tokenizer.unk_token_id
    pieces = [
        place
        for place, token in zip(places, encoded.input_ids, strict=True)
        if place is not None and (token == unknown or places.count(place) > 1)
    ]
    spans = [encoded.word_to_chars(place) for place in dict.fromkeys(pieces)]
    return list(dict.fromkeys(text[span.start : span.end] for span in spans))


def null_conditioning(pipe: DiffusionPipeline, empty: Conditioning) -> Conditioning:
    """What ε_u is told, given the encoded empty prompt: that, or zeros where SDXL wants them."""
    if not pipe.config.get("force_zeros_for_empty_prompt"):
        return empty
    zeros = {**empty.added, "text_embeds": torch.zeros_like(empty.added["text_embeds"])}
    return Conditioning(torch.zeros_like(empty.embeds), added=zeros)
