"""A text-to-image model: opening it, and what needs no scheduler; the rest is `models.run`."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from diffusers import DiffusionPipeline
from PIL import Image
from torch import Tensor, nn
from transformers import BatchEncoding

from vldnp._finite import check_finite
from vldnp.models import families
from vldnp.models.conditioning import Conditioning
from vldnp.models.errors import out_of_memory
from vldnp.models.families import Family
from vldnp.models.hub import default_device


class Backbone:
    """A diffusers pipeline for the sampler: Stable Diffusion 1, 2, XL, 3 or 3.5, or FLUX.1.

    Args:
        pipe: the pipeline; it is not changed.
        name, revision: what identifies the model in records.

    Raises:
        ValueError: the pipeline is of another family.
    """

    def __init__(
        self,
        pipe: DiffusionPipeline,
        name: str | None = None,
        revision: str | None = None,
    ):
        self.family: Family = families.family_of(pipe)
        self.pipe, self.revision = pipe, revision
        self.name = name or pipe.config.get("_name_or_path") or type(pipe).__name__
        self.size = self.picture_size(None, None)

    @classmethod
    def from_pretrained(
        cls,
        source: str,
        revision: str | None = None,
        *,
        name: str | None = None,
        device: str | torch.device | None = None,
        dtype: torch.dtype = torch.float32,
        model_cpu_offload: bool = False,
        attention_slicing: bool = False,
        vae_slicing: bool = False,
        vae_tiling: bool = False,
        **options,
    ) -> "Backbone":
        """Open a folder or a hub id with the pipeline class that it names; safetensors only.

        The class is looked up before any weights are fetched.

        Args:
            source, revision: folder or hub id, and the hub's revision.
            name: default is `source`.
            device, dtype, …: as in `vldnp.load`.

        Raises:
            ValueError: a pipeline of another family, or a setting that does not fit.
        """
        if foreign := {"custom_pipeline", "trust_remote_code", "use_safetensors"} & options.keys():
            raise ValueError(
                f"{min(foreign)} cannot be set: weights are safetensors, and no model brings code"
            )
        config = DiffusionPipeline.load_config(source, revision=revision, **options)
        family = families.family_named(str(config.get("_class_name")))
        if attention_slicing and family.network != "unet":
            raise ValueError(
                f"attention_slicing is for U-Nets, and {family.name} has a transformer; use "
                "model_cpu_offload or vae_slicing to save memory"
            )
        device = device or default_device()
        if model_cpu_offload and torch.device(device).type == "cpu":
            raise ValueError("model_cpu_offload is for a GPU, and this is to run on the CPU")
        pipe = family.pipeline.from_pretrained(
            source,
            revision=revision,
            dtype=dtype,
            use_safetensors=True,
            **{**family.opening, **options},
        )
        pipe.set_progress_bar_config(disable=True)
        if attention_slicing:
            pipe.enable_attention_slicing()
        if vae_slicing:
            pipe.vae.enable_slicing()
        if vae_tiling:
            pipe.vae.enable_tiling()
        if model_cpu_offload:
            pipe.enable_model_cpu_offload(device=device)
        else:
            pipe.to(device)
        return cls(pipe, name or str(source), revision)

    @property
    def network(self) -> nn.Module:
        """What predicts: the U-Net or the transformer."""
        return getattr(self.pipe, self.family.network)

    @property
    def device(self) -> torch.device:
        """Where it computes; weights may wait elsewhere."""
        return self.pipe._execution_device

    @property
    def dtype(self) -> torch.dtype:
        return self.network.dtype

    @property
    def patch_size(self) -> int:
        """The side of the squares of latents that the network takes for one."""
        return self.network.config.get("patch_size", 1) * self.family.packing

    def picture_size(self, height: int | None, width: int | None) -> tuple[int, int]:
        """Height and width in pixels; the model's own where there is none.

        Raises:
            ValueError: the model makes no pictures of this size.
        """
        config, factor = self.network.config, self.pipe.vae_scale_factor
        own = config.get("sample_size") or self.pipe.default_sample_size
        own_height, own_width = (own, own) if isinstance(own, int) else own
        height, width = height or own_height * factor, width or own_width * factor
        factor *= self.patch_size
        if height % factor or width % factor:
            raise ValueError(
                f"height and width must be multiples of {factor}, not {height}×{width}"
            )
        return height, width

    @torch.no_grad()
    def encode(self, prompts: Sequence[str], size: tuple[int, int] | None = None) -> Conditioning:
        """Prompts → text conditioning, as by the stock pipeline.

        A prompt longer than the encoders' limit is cut, with a `UserWarning` that
        quotes the truncated text.

        Args:
            size: height, width of the pictures in pixels, which SDXL is conditioned on; default is
                the model's own.
        """
        self._warn_of_truncation(prompts)
        return self.family.embed(self.pipe, list(prompts), size or self.size)

    def tokenize(self, texts: Sequence[str]) -> BatchEncoding:
        """`input_ids` and `attention_mask`, `[B, L]`, padded or cut to the encoder's limit L."""
        self._warn_of_truncation(texts)
        return families.clip_tokens(self.pipe, texts)

    def _warn_of_truncation(self, texts: Sequence[str]) -> None:
        for text in texts:
            if (end := families.truncated(self.pipe, text)) is not None:
                warnings.warn(
                    f"a prompt is longer than the text encoder's "
                    f"{families.primary_tokenizer(self.pipe)[1]} tokens; truncated text: "
                    f"{end!r}",
                    UserWarning,
                    stacklevel=2,
                )

    @torch.no_grad()
    def pooled(self, input_ids: Tensor) -> Tensor:
        """Token ids `[n, L]` → the text encoder's pooled states (of the end mark), `[n, D]`."""
        chunks = input_ids.split(256)  # a batch of SAFREE may hold thousands of masked prompts
        return torch.cat([self.pipe.text_encoder(chunk).pooler_output for chunk in chunks])

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Clean latents → pictures `[B, 3, H, W]`, float32 in 0..1."""
        vae = self.pipe.vae
        keeping = exact(vae) if self.family is families.SDXL else nullcontext()
        with self.short_of_memory(), keeping:
            return decoded(vae, latents)

    def short_of_memory(self) -> AbstractContextManager:
        """Where the GPU's memory does not last, say which settings lower what is needed."""
        return out_of_memory(
            self.name,
            "lower batch_size, or load the model with dtype='float16', model_cpu_offload=True or "
            "vae_slicing=True",
        )


def as_backbone(model: Backbone | DiffusionPipeline) -> Backbone:
    """A backbone as it is, a diffusers pipeline wrapped."""
    if isinstance(model, Backbone):
        return model
    if isinstance(model, DiffusionPipeline):
        return Backbone(model)
    raise TypeError(
        f"model must be a Backbone or a diffusers pipeline, not {model!r}; "
        "open names and folders with vldnp.load(...)"
    )


def decoded(vae: nn.Module, latents: Tensor) -> Tensor:
    """Clean latents → pictures `[B, 3, H, W]`, float32 in 0..1.

    Raises:
        NonFiniteError: a picture holds NaN or infinity, which would be black or white.
    """
    latents = latents / vae.config.scaling_factor + (vae.config.get("shift_factor") or 0.0)
    pixels = vae.decode(latents.to(vae.dtype), return_dict=False)[0]
    check_finite({"the decoded picture": pixels})
    return (pixels.float() / 2 + 0.5).clamp(0, 1)


@contextmanager
def exact(vae: nn.Module) -> Iterator[None]:
    """SDXL's VAE overflows in float16 and says so; the stock pipeline decodes in float32."""
    overflows = vae.dtype == torch.float16 and vae.config.get("force_upcast")
    if not overflows:
        yield
        return
    vae.to(torch.float32)
    try:
        yield
    finally:
        vae.to(torch.float16)


def to_pil(pixels: Tensor) -> list[Image.Image]:
    """`[B, 3, H, W]` in 0..1 → RGB pictures, rounded as diffusers rounds."""
    array = (pixels * 255).round().to("cpu", torch.uint8).permute(0, 2, 3, 1).numpy()
    return [Image.fromarray(picture) for picture in array]
