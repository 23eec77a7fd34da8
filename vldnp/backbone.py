"""The text-to-image model as five verbs: encode, initial latents, predict, x̂₀, decode."""

import copy
import inspect
import warnings
from collections.abc import Sequence
from contextlib import nullcontext

import torch
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
)
from diffusers.loaders import TextualInversionLoaderMixin
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from torch import Tensor
from transformers import BatchEncoding

from vldnp.conditioning import Conditioning
from vldnp.files import unknown

SCHEDULERS = {
    "dpm++": (DPMSolverMultistepScheduler, {"algorithm_type": "dpmsolver++"}),
    "dpm++-karras": (
        DPMSolverMultistepScheduler,
        {"algorithm_type": "dpmsolver++", "use_karras_sigmas": True},
    ),
    "ddim": (DDIMScheduler, {}),
    "euler": (EulerDiscreteScheduler, {}),
}
"""name → scheduler class and settings; the rest comes from the pipeline's own scheduler config."""


class Backbone:
    """A Stable Diffusion pipeline (U-Net, latent VAE, one CLIP text encoder) for the sampler.

    Args:
        pipe: the pipeline; it is not changed.
        name, revision: what identifies the model in records.
    """

    def __init__(
        self, pipe: DiffusionPipeline, name: str | None = None, revision: str | None = None
    ):
        missing = {"unet", "vae", "text_encoder", "tokenizer"} - pipe.components.keys()
        if missing or "text_encoder_2" in pipe.components:
            raise ValueError(
                f"{type(pipe).__name__} is not a Stable Diffusion 1/2 text-to-image pipeline "
                "(U-Net, VAE, one CLIP text encoder), which is what can be guided here"
            )
        self.pipe, self.revision = pipe, revision
        self.name = name or pipe.config.get("_name_or_path") or type(pipe).__name__
        self.scheduler = pipe.scheduler
        self._encoded: dict[str, Tensor] | None = None  # a run remembers; the models may change

    @classmethod
    def from_pretrained(
        cls,
        source: str,
        revision: str | None = None,
        *,
        name: str | None = None,
        device: str | torch.device | None = None,
        dtype: torch.dtype = torch.float32,
        **options,
    ) -> "Backbone":
        """Open a folder or a hub id as `StableDiffusionPipeline`; safetensors only.

        Args:
            source: folder or hub id.
            revision: hub revision.
            name: default is `source`.
            device: default is CUDA where there is one, else the CPU.
            dtype: of all weights and of the latents.
            options: passed on to `StableDiffusionPipeline.from_pretrained`.
        """
        # The safety checker would black out pictures after the fact; here they are judged instead.
        options = {"safety_checker": None, "requires_safety_checker": False, **options}
        pipe = StableDiffusionPipeline.from_pretrained(
            source, revision=revision, dtype=dtype, use_safetensors=True, **options
        )
        pipe.set_progress_bar_config(disable=True)
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        return cls(pipe.to(device), name or str(source), revision)

    @property
    def device(self) -> torch.device:
        return self.pipe.device

    @property
    def dtype(self) -> torch.dtype:
        return self.pipe.unet.dtype

    def for_run(self, num_inference_steps: int, scheduler=None) -> "Backbone":
        """The same models with a scheduler of their own, set to `num_inference_steps`.

        Schedulers keep state between steps, so each run has a copy, and runs may interleave.

        Args:
            num_inference_steps: N ≥ 1.
            scheduler: a name in `SCHEDULERS`, a scheduler object (copied), or None for the
                pipeline's own.
        """
        if num_inference_steps < 1:
            raise ValueError(f"num_inference_steps must be 1 or more, not {num_inference_steps}")
        run = copy.copy(self)
        run._encoded = {}
        run.scheduler = self._scheduler(scheduler)
        if run.scheduler.order != 1:
            raise ValueError(
                f"{type(run.scheduler).__name__} takes several evaluations a step, which query "
                f"steps do not fit; use one of {', '.join(SCHEDULERS)}"
            )
        run.scheduler.set_timesteps(num_inference_steps, device=self.device)
        return run

    def _scheduler(self, scheduler):
        if scheduler is None:
            return copy.deepcopy(self.pipe.scheduler)
        if not isinstance(scheduler, str):
            return copy.deepcopy(scheduler)
        if scheduler not in SCHEDULERS:
            raise unknown("scheduler", scheduler, SCHEDULERS)
        kind, settings = SCHEDULERS[scheduler]
        return kind.from_config(self.pipe.scheduler.config, **settings)

    @property
    def timesteps(self) -> Tensor:
        """The timesteps of this run, from noisy to clean."""
        return self.scheduler.timesteps

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """Prompts → text encoder states, as the stock pipeline has them.

        Each text is encoded once per run. A prompt longer than the encoder's limit is cut, with
        a `UserWarning` that says what was lost.
        """
        known = {} if self._encoded is None else self._encoded
        if new := [text for text in dict.fromkeys(prompts) if text not in known]:
            known.update(zip(new, self._embed(new), strict=True))
        return Conditioning(torch.stack([known[text] for text in prompts]))

    def tokenize(self, texts: Sequence[str]) -> BatchEncoding:
        """`input_ids` and `attention_mask`, `[B, L]`, padded or cut to the encoder's limit L."""
        tokenizer, texts = self.pipe.tokenizer, list(texts)
        if isinstance(self.pipe, TextualInversionLoaderMixin):
            texts = [self.pipe.maybe_convert_prompt(text, tokenizer) for text in texts]
        limit = tokenizer.model_max_length
        for text in texts:
            ids = tokenizer(text, truncation=False).input_ids
            if len(ids) > limit:
                lost = tokenizer.decode(ids[limit - 1 : -1]).strip()
                warnings.warn(
                    f"a prompt is longer than the text encoder's {limit} tokens; "
                    f"lost from its end: {lost!r}",
                    UserWarning,
                    stacklevel=2,
                )
        return tokenizer(
            texts, padding="max_length", max_length=limit, truncation=True, return_tensors="pt"
        ).to(self.device)

    def _embed(self, texts: list[str]) -> Tensor:
        encoder, tokens = self.pipe.text_encoder, self.tokenize(texts)
        uses_mask = getattr(encoder.config, "use_attention_mask", False)
        mask = tokens.attention_mask if uses_mask else None
        return encoder(tokens.input_ids, attention_mask=mask)[0].to(self.dtype)

    @torch.no_grad()
    def pooled(self, input_ids: Tensor) -> Tensor:
        """Token ids `[n, L]` → the text encoder's pooled states (of the end mark), `[n, D]`."""
        chunks = input_ids.split(256)  # a batch of SAFREE may hold thousands of masked prompts
        return torch.cat([self.pipe.text_encoder(chunk).pooler_output for chunk in chunks])

    def initial_latents(
        self,
        seeds: Sequence[int | torch.Generator],
        height: int | None = None,
        width: int | None = None,
    ) -> Tensor:
        """x_T, `[B, C, h, w]`: noise from each image's own seed or generator, scaled.

        The same as the stock pipeline draws from `generator=[...]` with CPU generators.

        Args:
            seeds: one per image.
            height, width: of the picture, in pixels; default is the model's own size.
        """
        unet, factor = self.pipe.unet.config, self.pipe.vae_scale_factor
        own = unet.sample_size
        own_height, own_width = (own, own) if isinstance(own, int) else own
        height, width = height or own_height * factor, width or own_width * factor
        if height % factor or width % factor:
            raise ValueError(
                f"height and width must be multiples of {factor}, not {height}×{width}"
            )
        shape = (len(seeds), unet.in_channels, height // factor, width // factor)
        generators = [as_generator(seed) for seed in seeds]
        noise = randn_tensor(shape, generator=generators, device=self.device, dtype=self.dtype)
        return noise * self.scheduler.init_noise_sigma

    @torch.no_grad()
    def predict(self, latents: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        """The U-Net's output for `[B, C, h, w]` latents at timestep t, a prompt each."""
        embeds, beside, attending = cond.embeds, cond.companions, nullcontext()
        if beside is not None:
            rows, own = list(beside.rows), range(len(cond), len(cond) + len(beside.rows))
            latents = torch.cat([latents, latents[rows]])
            embeds = torch.cat([embeds, beside.embeds])
            attending = beside.attending(self.pipe.unet, rows, own)
        if hasattr(self.scheduler, "scale_model_input"):
            latents = self.scheduler.scale_model_input(latents, t)
        with attending:
            pred = self.pipe.unet(latents, t, encoder_hidden_states=embeds, return_dict=False)[0]
        return pred[: len(cond)]

    def x0(self, pred: Tensor, t: Tensor, latents: Tensor) -> Tensor:
        """Predicted clean latents x̂₀ at timestep t, in float32; before `step` is called for t."""
        scale, noise = self._levels(t)
        kind = self.scheduler.config.get("prediction_type", "flow_prediction")
        return predicted_x0(kind, pred.float(), latents.float(), scale, noise)

    def _levels(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """a and s in x_t = a x₀ + s ε, in the scheduler's own scaling of the latents."""
        scheduler = self.scheduler
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

    def step(
        self,
        pred: Tensor,
        t: Tensor,
        latents: Tensor,
        generators: Sequence[torch.Generator] | None = None,
    ) -> Tensor:
        """x_{t−1} from x_t. `generators` serve schedulers that add noise, one per image."""
        options = {}
        if (
            generators is not None
            and "generator" in inspect.signature(self.scheduler.step).parameters
        ):
            options["generator"] = list(generators)
        return self.scheduler.step(pred, t, latents, **options, return_dict=False)[0]

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Clean latents → pictures `[B, 3, H, W]`, float32 in 0..1."""
        vae = self.pipe.vae
        latents = latents / vae.config.scaling_factor + (vae.config.get("shift_factor") or 0.0)
        pixels = vae.decode(latents.to(vae.dtype), return_dict=False)[0]
        return (pixels.float() / 2 + 0.5).clamp(0, 1)


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
