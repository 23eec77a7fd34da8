"""The text-to-image model as five verbs: encode, initial latents, predict, x̂₀, decode."""

import copy
import inspect
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch
from diffusers import AutoencoderTiny, DiffusionPipeline
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import calculate_shift
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from torch import Tensor, nn
from transformers import BatchEncoding

from vldnp._files import unknown
from vldnp._finite import check_finite
from vldnp.models import families
from vldnp.models.conditioning import Conditioning, concatenated
from vldnp.models.families import SCHEDULERS, Family

__all__ = ["SCHEDULERS", "Backbone", "as_backbone", "as_generator", "predicted_x0", "to_pil"]

GIB = 2**30


class Backbone:
    """A diffusers pipeline for the sampler: Stable Diffusion 1, 2, XL, 3 or 3.5.

    Args:
        pipe: the pipeline; it is not changed.
        name, revision: what identifies the model in records.
        preview: a tiny VAE that decodes the pictures shown to the VLM, never the final ones.

    Raises:
        ValueError: the pipeline is of another family, or the preview does not fit it.
    """

    def __init__(
        self,
        pipe: DiffusionPipeline,
        name: str | None = None,
        revision: str | None = None,
        preview: AutoencoderTiny | None = None,
    ):
        self.family: Family = families.family_of(pipe)
        self.pipe, self.revision = pipe, revision
        self.name = name or pipe.config.get("_name_or_path") or type(pipe).__name__
        self.scheduler = pipe.scheduler
        self.size = self._size(None, None)
        self._encoded: dict[str, Conditioning] | None = None  # a run remembers; models may change
        if preview is not None:
            ours, theirs = preview.config.latent_channels, pipe.vae.config.latent_channels
            if ours != theirs:
                raise ValueError(
                    f"the preview decodes {ours} latent channels and {self.name!r} has {theirs}; "
                    "use the tiny VAE made for this model (taesd, taesdxl, taesd3)"
                )
            preview = preview.to(self.device, self.dtype).eval()
        self.preview = preview

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
        preview: AutoencoderTiny | None = None,
        **options,
    ) -> "Backbone":
        """Open a folder or a hub id with the pipeline class that it names; safetensors only.

        The class is looked up before any weights are fetched.

        Args:
            source: folder or hub id.
            revision: hub revision.
            name: default is `source`.
            device: default is CUDA where there is one, else the CPU.
            dtype: of all weights and of the latents.
            model_cpu_offload: keep on the GPU only the model that works at the moment.
            attention_slicing: compute attention in slices; U-Nets only.
            vae_slicing, vae_tiling: decode one picture at a time, and large ones tile by tile.
            preview: see `Backbone`.
            options: passed on to the pipeline's `from_pretrained`, as `variant="fp16"` or
                `text_encoder_3=None`.

        Raises:
            ValueError: a pipeline of another family, or a setting that does not fit.
            torch.OutOfMemoryError: one line that says what is needed and what lowers it.
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
        has_gpu = torch.cuda.is_available()
        if model_cpu_offload and (not has_gpu or torch.device(device or "cuda").type == "cpu"):
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
        device = device or ("cuda" if has_gpu else "cpu")
        if model_cpu_offload:
            pipe.enable_model_cpu_offload(device=device)
        else:
            with _memory_to_load(pipe, device):
                pipe.to(device)
        return cls(pipe, name or str(source), revision, preview)

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

    def for_run(
        self,
        num_inference_steps: int,
        scheduler=None,
        height: int | None = None,
        width: int | None = None,
    ) -> "Backbone":
        """The same models with a scheduler of their own, set to `num_inference_steps`.

        Schedulers keep state between steps, so each run has a copy, and runs may interleave.

        Args:
            num_inference_steps: N ≥ 1.
            scheduler: a name (`SCHEDULERS`; for flow matching `dpm++` and `euler`), a scheduler
                object (copied), or None for the pipeline's own. Objects of some classes do not
                fit, nor any that clips x̂₀; see `families.check_scheduler`.
            height, width: of the pictures, in pixels; default is the model's own size. SDXL is
                told it, and Stable Diffusion 3 may shift its timesteps by it.

        Raises:
            ValueError: an argument that does not fit; one line.
        """
        if num_inference_steps < 1:
            raise ValueError(f"num_inference_steps must be 1 or more, not {num_inference_steps}")
        run = copy.copy(self)
        run._encoded = {}
        run.size = self._size(height, width)
        run.scheduler = self._scheduler(scheduler)
        families.check_scheduler(run.scheduler, self.family)
        is_shifted = run.scheduler.config.get("use_dynamic_shifting")
        options = {"mu": self._shift(run.size)} if is_shifted else {}
        run.scheduler.set_timesteps(num_inference_steps, device=self.device, **options)
        return run

    def _scheduler(self, scheduler):
        if scheduler is None:
            return copy.deepcopy(self.pipe.scheduler)
        if not isinstance(scheduler, str):
            return copy.deepcopy(scheduler)
        if scheduler not in self.family.schedulers:
            raise unknown("scheduler", scheduler, self.family.schedulers)
        kind, settings = self.family.schedulers[scheduler]
        own = self.pipe.scheduler.config
        if self.family.flow:  # the shift goes by different names
            shift = own.get("shift", own.get("flow_shift", 1.0))
            name = "flow_shift" if "prediction_type" in settings else "shift"
            settings = {**settings, name: shift}
        return kind.from_config(own, **settings)

    def _shift(self, size: tuple[int, int]) -> float:
        """μ of timesteps that depend on how many patches a picture has, as the pipeline's."""
        patch = self.pipe.vae_scale_factor * self.network.config.get("patch_size", 1)
        config = self.scheduler.config
        return calculate_shift(
            (size[0] // patch) * (size[1] // patch),
            config.get("base_image_seq_len", 256),
            config.get("max_image_seq_len", 4096),
            config.get("base_shift", 0.5),
            config.get("max_shift", 1.16),
        )

    def _size(self, height: int | None, width: int | None) -> tuple[int, int]:
        """Height and width in pixels, checked."""
        config, factor = self.network.config, self.pipe.vae_scale_factor
        own = config.sample_size
        own_height, own_width = (own, own) if isinstance(own, int) else own
        height, width = height or own_height * factor, width or own_width * factor
        factor *= config.get("patch_size", 1)
        if height % factor or width % factor:
            raise ValueError(
                f"height and width must be multiples of {factor}, not {height}×{width}"
            )
        return height, width

    @property
    def timesteps(self) -> Tensor:
        """The timesteps of this run, from noisy to clean."""
        return self.scheduler.timesteps

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """Prompts → what the network is told of them, as by the stock pipeline.

        Each text is encoded once per run. A prompt longer than the encoders' limit is cut, with
        a `UserWarning` that says what was lost.
        """
        known = {} if self._encoded is None else self._encoded
        if new := [text for text in dict.fromkeys(prompts) if text not in known]:
            embedded = self._embed(new)
            known.update({text: embedded[[row]] for row, text in enumerate(new)})
        return concatenated([known[text] for text in prompts])

    def unprompted(self, n: int) -> Conditioning:
        """`n` rows of no prompt, for ε_u: the empty one, or zeros where SDXL was trained so."""
        return families.unprompted(self.pipe, self.encode([""] * n))

    def _embed(self, texts: list[str]) -> Conditioning:
        self._warn_of_what_is_lost(texts)
        return self.family.embed(self.pipe, texts, self.size)

    def tokenize(self, texts: Sequence[str]) -> BatchEncoding:
        """`input_ids` and `attention_mask`, `[B, L]`, padded or cut to the encoder's limit L."""
        self._warn_of_what_is_lost(texts)
        return families.clip_tokens(self.pipe, texts)

    def _warn_of_what_is_lost(self, texts: Sequence[str]) -> None:
        for text in texts:
            if (end := families.lost(self.pipe, text)) is not None:
                warnings.warn(
                    f"a prompt is longer than the text encoder's "
                    f"{families.reader(self.pipe)[1]} tokens; lost from its end: {end!r}",
                    UserWarning,
                    stacklevel=3,
                )

    @torch.no_grad()
    def pooled(self, input_ids: Tensor) -> Tensor:
        """Token ids `[n, L]` → the text encoder's pooled states (of the end mark), `[n, D]`."""
        chunks = input_ids.split(256)  # a batch of SAFREE may hold thousands of masked prompts
        return torch.cat([self.pipe.text_encoder(chunk).pooler_output for chunk in chunks])

    def initial_latents(self, seeds: Sequence[int | torch.Generator]) -> Tensor:
        """x_T, `[B, C, h, w]`: noise from each image's own seed or generator, scaled.

        The same as the stock pipeline draws from `generator=[...]` with CPU generators.

        Args:
            seeds: one per image.
        """
        factor = self.pipe.vae_scale_factor
        height, width = self.size
        shape = (len(seeds), self.network.config.in_channels, height // factor, width // factor)
        generators = [as_generator(seed) for seed in seeds]
        noise = randn_tensor(shape, generator=generators, device=self.device, dtype=self.dtype)
        return noise * getattr(self.scheduler, "init_noise_sigma", 1.0)  # flow matching: unscaled

    @torch.no_grad()
    def predict(self, latents: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        """The network's output for `[B, C, h, w]` latents at timestep t, a prompt each."""
        attending = nullcontext()
        if cond.companions is not None:
            rows, own = (
                list(cond.companions.rows),
                range(len(cond), len(cond) + len(cond.accompanied)),
            )
            latents = torch.cat([latents, latents[rows]])
            attending = cond.companions.attending(self.network, rows, own)
        if hasattr(self.scheduler, "scale_model_input"):
            latents = self.scheduler.scale_model_input(latents, t)
        with self._memory_for(latents), attending:
            pred = self.family.predict(self.pipe, latents, t, cond.with_companions())
        return pred[: len(cond)]

    def x0(self, pred: Tensor, t: Tensor, latents: Tensor) -> Tensor:
        """Predicted clean latents x̂₀ at timestep t; before `step` is called for t.

        In float32, or float64 where the latents are.
        """
        return scheduled_x0(self.scheduler, pred, t, latents)

    def step(
        self,
        pred: Tensor,
        t: Tensor,
        latents: Tensor,
        generators: Sequence[torch.Generator] | None = None,
    ) -> Tensor:
        """x_{t−1} from x_t. `generators` serve schedulers that add noise, one per image.

        Where a scheduler has the η of DDIM (Song et al. 2020, arXiv 2010.02502, eq. 16), it is 0,
        as in the stock pipelines; TCD's own default is 0.3.
        """
        accepted = inspect.signature(self.scheduler.step).parameters
        options = {"eta": 0.0} if "eta" in accepted else {}
        if generators is not None and "generator" in accepted:
            options["generator"] = list(generators)
        return self.scheduler.step(pred, t, latents, **options, return_dict=False)[0]

    @torch.no_grad()
    def decode(self, latents: Tensor, *, preview: bool = False) -> Tensor:
        """Clean latents → pictures `[B, 3, H, W]`, float32 in 0..1.

        Args:
            preview: by the tiny VAE, where there is one.
        """
        vae = self.preview if preview and self.preview is not None else self.pipe.vae
        keeping = exact(vae) if self.family is families.SDXL else nullcontext()
        with self._memory_for(latents), keeping:
            return decoded(vae, latents)

    @contextmanager
    def _memory_for(self, latents: Tensor) -> Iterator[None]:
        """Where the GPU's memory does not last, say what is needed and which setting lowers it."""
        try:
            yield
        except torch.OutOfMemoryError as error:
            height, width = (n * self.pipe.vae_scale_factor for n in latents.shape[-2:])
            slices = "attention_slicing" if self.family.network == "unet" else "vae_tiling"
            raise torch.OutOfMemoryError(
                f"not enough GPU memory for {len(latents)} rows of {height}×{width} pixels beside "
                f"{sum(_weights(self.pipe).values()):.1f} GiB of weights{_gpu(self.device)}; lower "
                f"batch_size, or load the model with a smaller dtype, model_cpu_offload=True, "
                f"vae_slicing=True or {slices}=True"
            ) from error


@contextmanager
def _memory_to_load(pipe: DiffusionPipeline, device: str | torch.device) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        sizes = _weights(pipe)
        needed, largest = sum(sizes.values()), max(sizes.values())
        half = "" if pipe.dtype.itemsize < 4 else f"dtype=torch.float16 ({needed / 2:.1f} GiB) or "
        raise torch.OutOfMemoryError(
            f"{type(pipe).__name__} needs {needed:.1f} GiB of GPU memory for its weights in "
            f"{pipe.dtype}{_gpu(device)}; load it with {half}model_cpu_offload=True "
            f"({largest:.1f} GiB)"
        ) from error


def _weights(pipe: DiffusionPipeline) -> dict[str, float]:
    """GiB of each component's weights."""
    models = {name: m for name, m in pipe.components.items() if isinstance(m, nn.Module)}
    return {
        name: sum(p.numel() * p.element_size() for p in model.parameters()) / GIB
        for name, model in models.items()
    }


def _gpu(device: str | torch.device) -> str:
    """How much memory the GPU has, as a clause."""
    if torch.device(device).type != "cuda":
        return ""
    free, total = torch.cuda.mem_get_info(device)
    return f", and of the GPU's {total / GIB:.1f} GiB {free / GIB:.1f} are free"


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


def as_generator(seed: int | torch.Generator) -> torch.Generator:
    """A CPU generator with this seed; a generator as it is."""
    if isinstance(seed, torch.Generator):
        return seed
    return torch.Generator("cpu").manual_seed(int(seed))


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


def scheduled_x0(scheduler, pred: Tensor, t: Tensor, latents: Tensor) -> Tensor:
    """x̂₀ at the scheduler's timestep t, in float32 or better; before its `step` is called for t."""
    scale, noise = noise_levels(scheduler, t)
    kind = scheduler.config.get("prediction_type", "flow_prediction")
    precise = torch.promote_types(pred.dtype, torch.float32)
    return predicted_x0(kind, pred.to(precise), latents.to(precise), scale, noise)


def noise_levels(scheduler, t: Tensor) -> tuple[Tensor, Tensor]:
    """a and s in x_t = a x₀ + s ε, in the scheduler's own scaling of the latents."""
    if not hasattr(scheduler, "sigmas"):  # DDIM and its like: √ᾱ_t, √(1−ᾱ_t)
        alpha_bar = scheduler.alphas_cumprod[int(t)]
        return alpha_bar**0.5, (1 - alpha_bar) ** 0.5
    index = scheduler.step_index
    if index is None:  # before the first step
        index = scheduler.index_for_timestep(t)
    sigma = scheduler.sigmas[index]
    if hasattr(scheduler, "_sigma_to_alpha_sigma_t"):  # DPM-Solver family
        return scheduler._sigma_to_alpha_sigma_t(sigma)
    if "prediction_type" not in scheduler.config:  # flow matching: (1 − σ) x₀ + σ ε
        return 1 - sigma, sigma
    return torch.ones_like(sigma), sigma  # Euler type: x₀ + σ ε


def predicted_x0(
    prediction_type: str, pred: Tensor, latents: Tensor, scale: Tensor, noise: Tensor
) -> Tensor:
    """Clean latents from a prediction, where x_t = a x₀ + s ε.

    - `epsilon`: x̂₀ = (x_t − s ε) / a (DDPM, Ho et al. 2020, eq. 15)
    - `v_prediction`: v = (a ε − s x₀) / r with r² = a² + s², so x̂₀ = (a x_t / r − s v) / r
      (Salimans & Ho 2022, appendix D; r = 1 unless the latents are σ-scaled)
    - `flow_prediction`: v = ε − x₀, so x̂₀ = x_t − s v (Lipman et al. 2023; there a = 1 − s)
    - `sample`: the prediction is x̂₀ itself

    Args:
        prediction_type: as in diffusers' scheduler configs.
        pred, latents: `[B, C, h, w]`.
        scale, noise: a and s.
    """
    match prediction_type:
        case "epsilon":
            return (latents - noise * pred) / scale
        case "v_prediction":
            norm = (scale**2 + noise**2) ** 0.5
            return (scale * latents / norm - noise * pred) / norm
        case "flow_prediction":
            return latents - noise * pred
        case "sample":
            return pred
    raise ValueError(
        f"unknown prediction type {prediction_type!r}; known: epsilon, v_prediction, "
        "flow_prediction, sample"
    )


def to_pil(pixels: Tensor) -> list[Image.Image]:
    """`[B, 3, H, W]` in 0..1 → RGB pictures, rounded as diffusers rounds."""
    array = (pixels * 255).round().to("cpu", torch.uint8).permute(0, 2, 3, 1).numpy()
    return [Image.fromarray(picture) for picture in array]
