"""A text-to-image model; the parts that need a scheduler are in `models.run`."""

import importlib
import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import AutoencoderTiny, DiffusionPipeline
from PIL import Image
from torch import Tensor, nn
from transformers import BatchEncoding

from vldnp._finite import check_finite
from vldnp.models import families
from vldnp.models.conditioning import Conditioning
from vldnp.models.hub import default_device, live_fingerprint, open_whole, out_of_memory

# Options that save memory and change images by rounding only; options that are refused.
MEMORY = {"model_cpu_offload", "attention_slicing", "vae_slicing", "vae_tiling"}
REFUSED = {"custom_pipeline", "trust_remote_code", "quantization_config"}
HINT = "lower batch_size, or load it with dtype='float16' or model_cpu_offload=True"


class Backbone:
    """A diffusers pipeline, unchanged: Stable Diffusion 1, 2, XL, 3 or 3.5, or FLUX.1. Name and
    revision identify the model in records."""

    def __init__(self, pipe: DiffusionPipeline, name="", revision: str | None = None):
        self.family: families.Family = families.family_of(pipe)
        self.pipe, self.revision = pipe, revision
        self.name = name or pipe.config.get("_name_or_path") or type(pipe).__name__
        self.size = self.picture_size(None, None)

    @classmethod
    def from_pretrained(
        cls, source, revision=None, *, name=None, device=None, dtype=torch.float32, **options
    ) -> "Backbone":
        """Open a folder or a hub id by the pipeline class that it names; see `vldnp.load`."""
        if refused := REFUSED & options.keys():
            raise ValueError(f"{min(refused)} cannot be set; open the pipeline with it yourself")
        saving = {option for option in MEMORY if options.pop(option, False)}
        pipe = _opened(source, revision, dtype, options)
        pipe.set_progress_bar_config(disable=True)
        if "attention_slicing" in saving:
            pipe.enable_attention_slicing()
        pipe.vae.use_slicing, pipe.vae.use_tiling = "vae_slicing" in saving, "vae_tiling" in saving
        move = pipe.enable_model_cpu_offload if "model_cpu_offload" in saving else pipe.to
        move(device=torch.device(device or default_device()))
        return cls(pipe, name or str(source), revision)

    @property
    def network(self) -> nn.Module:
        return getattr(self.pipe, self.family.network)

    @property
    def device(self) -> torch.device:
        return self.pipe._execution_device  # weights may wait elsewhere

    @property
    def dtype(self) -> torch.dtype:
        return self.network.dtype

    def picture_size(self, height: int | None, width: int | None) -> tuple[int, int]:
        """Height and width in pixels, by default the model's own; `ValueError` if none of its."""
        factor = self.pipe.vae_scale_factor
        own = self.network.config.get("sample_size") or self.pipe.default_sample_size
        own_height, own_width = (own, own) if isinstance(own, int) else own
        height, width = height or own_height * factor, width or own_width * factor
        unit = factor * self.family.patch_size(self.network)
        if height % unit or width % unit:
            raise ValueError(f"height and width must be multiples of {unit}, not {height}×{width}")
        return height, width

    @torch.no_grad()
    def encode(self, prompts: Sequence[str], size: tuple[int, int] | None = None) -> Conditioning:
        """Prompts → text conditioning, as by the stock pipeline; a warning quotes what is cut off.
        SDXL is conditioned on `size`, height and width in pixels (default: the model's own)."""
        families.warn_of_truncation(self.pipe, prompts)
        return self.family.embed(self.pipe, list(prompts), size or self.size)

    def tokenize(self, texts: Sequence[str]) -> BatchEncoding:
        """`input_ids` and `attention_mask`, `[B, L]`, padded or cut to the encoder's limit L."""
        families.warn_of_truncation(self.pipe, texts)
        return families.clip_tokens(self.pipe, texts)

    @torch.no_grad()
    def pooled(self, input_ids: Tensor) -> Tensor:
        """Token ids `[n, L]` → the text encoder's pooled states (of the end mark), `[n, D]`."""
        chunks = input_ids.split(256)  # a batch of SAFREE may hold thousands of masked prompts
        return torch.cat([self.pipe.text_encoder(chunk).pooler_output for chunk in chunks])

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Clean latents → images `[B, 3, H, W]`, float32 in 0..1."""
        vae, dtype, xl = self.pipe.vae, self.pipe.vae.dtype, self.family is families.SDXL
        # SDXL's VAE overflows in float16, as its config states; the stock pipeline uses float32.
        overflows = xl and dtype == torch.float16 and vae.config.get("force_upcast")
        with out_of_memory(self.name, HINT):
            if not overflows:
                return decoded(vae, latents)
            try:
                return decoded(vae.to(torch.float32), latents)
            finally:
                vae.to(dtype)

    def fingerprint(self) -> str:
        """A hash of all that decides its images now: weights, tokenizers, scheduler, configs."""
        configs = self.pipe.scheduler.config, self.pipe.config
        # Private keys of a config name its folder.
        public = [{k: v for k, v in config.items() if k[0] != "_"} for config in configs]
        return live_fingerprint(self.pipe.components, type(self.pipe.scheduler).__name__, *public)


class Preview:
    """Decodes x̂₀ for the VLM, and never the final images, by a distilled VAE such as TAESD (Bohan
    2023, github.com/madebyollin/taesd)."""

    def __init__(self, vae: AutoencoderTiny, name: str, revision: str):
        self.vae, self.name, self.revision = vae.eval(), name, revision

    @classmethod
    def from_pretrained(cls, source, revision=None, *, name, device, dtype) -> "Preview":
        # An AutoencoderTiny saves an attribute that it warns about when it is opened.
        logger = logging.getLogger("diffusers.configuration_utils")
        logger.addFilter(known := lambda said: "block_out_channels" not in said.getMessage())
        try:
            vae = open_whole(AutoencoderTiny, source, revision=revision, dtype=dtype)
        finally:
            logger.removeFilter(known)
        return cls(vae.to(device), name, revision or "")

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Clean latents `[B, C, h, w]` → images `[B, 3, H, W]`, float32 in 0..1."""
        return decoded(self.vae, latents.to(self.vae.device))

    def describe(self) -> dict:
        return {"name": self.name, "revision": self.revision, "dtype": str(self.vae.dtype)}


def _opened(source, revision, dtype, options: dict) -> DiffusionPipeline:
    """The pipeline, each of whose models has exactly the weights of its files."""
    config = DiffusionPipeline.load_config(source, revision=revision, **options)
    family = families.family_named(str(config.get("_class_name")))
    options = family.opening | options
    if not (folder := Path(source)).is_dir():
        how = {"revision": revision, "use_safetensors": True, **options}
        folder = Path(family.pipeline.download(source, **how))
    variant, parts = options.get("variant"), {}
    for part, said in config.items():
        library, kind = said if isinstance(said, list | tuple) and len(said) == 2 else ("", "")
        if part in options or library not in ("diffusers", "transformers"):
            continue
        if issubclass(kind := getattr(importlib.import_module(library), kind), nn.Module):
            own = variant if any((folder / part).glob(f"*.{variant}*")) else None
            parts[part] = open_whole(kind, folder / part, dtype=dtype, variant=own)
    return family.pipeline.from_pretrained(folder, dtype=dtype, **options, **parts)


def as_backbone(model: Backbone | DiffusionPipeline) -> Backbone:
    """A backbone as it is, a diffusers pipeline wrapped."""
    if not isinstance(model, Backbone | DiffusionPipeline):
        raise TypeError(f"model must be a pipeline or what vldnp.load(...) opens, not {model!r}")
    return model if isinstance(model, Backbone) else Backbone(model)


def decoded(vae: nn.Module, latents: Tensor) -> Tensor:
    """Clean latents → images `[B, 3, H, W]`, float32 in 0..1; `NonFiniteError` for NaN."""
    latents = latents / vae.config.scaling_factor + (vae.config.get("shift_factor") or 0.0)
    pixels = vae.decode(latents.to(vae.dtype), return_dict=False)[0]
    check_finite({"the decoded picture": pixels})
    return (pixels.float() / 2 + 0.5).clamp(0, 1)


def to_uint8(pixels: Tensor) -> Tensor:
    """`[B, 3, H, W]` in 0..1, rounded as diffusers rounds; uint8 as it is."""
    return pixels if pixels.dtype == torch.uint8 else (pixels * 255).round().to(torch.uint8)


def to_pil(pixels: Tensor) -> list[Image.Image]:
    """`[B, 3, H, W]` in 0..1, or uint8 → RGB images."""
    return [*map(Image.fromarray, to_uint8(pixels).permute(0, 2, 3, 1).cpu().numpy())]
