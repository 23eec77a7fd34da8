"""A run of a text-to-image model: encode, initial latents, predict, x̂₀, step, decode."""

import copy
import inspect
from collections.abc import Sequence
from contextlib import nullcontext

import torch
from diffusers import SchedulerMixin
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import calculate_shift
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from vldnp._files import unknown
from vldnp.models import families
from vldnp.models.backbone import Backbone
from vldnp.models.conditioning import Conditioning, concatenated


class Run:
    """A backbone's models with a scheduler of their own, set to `num_inference_steps`.

    Schedulers keep state between steps, so each run has a copy, and runs may interleave.

    Args:
        backbone: the models; shared, never changed.
        num_inference_steps: N ≥ 1.
        scheduler: a name (`SCHEDULERS`; for flow matching `dpm++` and `euler`), a scheduler
            object (copied), or None for the pipeline's own. Objects of some classes do not
            fit, nor any that clips x̂₀; see `families.check_scheduler`.
        height, width: of the pictures, in pixels; default is the model's own size. SDXL is
            told it, and Stable Diffusion 3 may shift its timesteps by it.

    Raises:
        ValueError: an argument that does not fit; one line.
    """

    def __init__(
        self,
        backbone: Backbone,
        num_inference_steps: int,
        scheduler: str | SchedulerMixin | None = None,
        height: int | None = None,
        width: int | None = None,
    ):
        if num_inference_steps < 1:
            raise ValueError(f"num_inference_steps must be 1 or more, not {num_inference_steps}")
        self.backbone, self.num_inference_steps = backbone, num_inference_steps
        self.size = backbone.picture_size(height, width)
        self.scheduler = _scheduler(backbone, scheduler)
        families.check_scheduler(self.scheduler, backbone.family)
        is_shifted = self.scheduler.config.get("use_dynamic_shifting")
        options = {"mu": _shift(backbone, self.size)} if is_shifted else {}
        own = backbone.family.sigmas
        if own and not self.scheduler.config.get("use_flow_sigmas"):
            options["sigmas"] = own(num_inference_steps)
        self.scheduler.set_timesteps(num_inference_steps, device=backbone.device, **options)
        self._encoded: dict[str, Conditioning] = {}

    @property
    def timesteps(self) -> Tensor:
        """The timesteps of this run, from noisy to clean."""
        return self.scheduler.timesteps

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """As `Backbone.encode`, for pictures of this size; each text is encoded once."""
        known = self._encoded
        if new := [text for text in dict.fromkeys(prompts) if text not in known]:
            embedded = self.backbone.encode(new, self.size)
            known.update({text: embedded[[row]] for row, text in enumerate(new)})
        return concatenated([known[text] for text in prompts])

    def null_conditioning(self, n: int) -> Conditioning:
        """`n` rows of no prompt, for ε_u: the empty one, or zeros where SDXL was trained so."""
        return families.null_conditioning(self.backbone.pipe, self.encode([""] * n))

    def initial_latents(self, seeds: Sequence[int | torch.Generator]) -> Tensor:
        """x_T, `[B, C, h, w]`: noise from each image's own seed or generator, scaled.

        The same as the stock pipeline draws from `generator=[...]` with CPU generators.

        Args:
            seeds: one per image.
        """
        backbone, (height, width) = self.backbone, self.size
        factor, channels = backbone.pipe.vae_scale_factor, backbone.pipe.vae.config.latent_channels
        noise = randn_tensor(
            (len(seeds), channels, height // factor, width // factor),
            generator=[
                seed if isinstance(seed, torch.Generator) else torch.Generator().manual_seed(seed)
                for seed in seeds
            ],
            device=backbone.device,
            dtype=backbone.dtype,
        )
        return noise * getattr(self.scheduler, "init_noise_sigma", 1.0)  # flow matching: unscaled

    @torch.no_grad()
    def predict(self, latents: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        """The network's output for `[B, C, h, w]` latents at timestep t, a prompt each."""
        backbone, attending = self.backbone, nullcontext()
        if cond.auxiliary is not None:
            rows = list(cond.auxiliary.rows)
            own = range(len(cond), len(cond) + len(rows))
            latents = torch.cat([latents, latents[rows]])
            attending = cond.auxiliary.attending(backbone.network, rows, own)
        if hasattr(self.scheduler, "scale_model_input"):
            latents = self.scheduler.scale_model_input(latents, t)
        with backbone.short_of_memory(), attending:
            pred = backbone.family.predict(backbone.pipe, latents, t, cond.with_auxiliary())
        return pred[: len(cond)]

    def x0(self, pred: Tensor, t: Tensor, latents: Tensor) -> Tensor:
        """Predicted clean latents x̂₀ at timestep t; before `step` is called for t.

        In float32, or float64 where the latents are.
        """
        return scheduled_x0(self.scheduler, pred, t, latents)

    def prediction(self, x0: Tensor, t: Tensor, latents: Tensor) -> Tensor:
        """The prediction whose x̂₀ this is: the inverse of `x0`, in the precision of x̂₀."""
        scale, noise = noise_levels(self.scheduler, t)
        kind = self.scheduler.config.get("prediction_type", "flow_prediction")
        return prediction_of(kind, x0, latents.to(x0.dtype), scale, noise)

    def snr(self, i: int) -> float:
        """Signal-to-noise ratio a²/s² of the latents at step i, where x_t = a x₀ + s ε."""
        scale, noise = noise_levels(self.scheduler, self.timesteps[i], i)
        return float(scale / noise) ** 2

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

    def decode(self, latents: Tensor) -> Tensor:
        """See `Backbone.decode`."""
        return self.backbone.decode(latents)


def _scheduler(backbone: Backbone, scheduler):
    if not isinstance(scheduler, str):
        return copy.deepcopy(backbone.pipe.scheduler if scheduler is None else scheduler)
    if scheduler not in backbone.family.schedulers:
        raise unknown("scheduler", scheduler, backbone.family.schedulers)
    kind, settings = backbone.family.schedulers[scheduler]
    own = backbone.pipe.scheduler.config
    if backbone.family.flow:  # the shift goes by different names
        shift = own.get("shift", own.get("flow_shift", 1.0))
        name = "flow_shift" if "prediction_type" in settings else "shift"
        settings = {**settings, name: shift}
    return kind.from_config(own, **settings)


def _shift(backbone: Backbone, size: tuple[int, int]) -> float:
    """μ of timesteps that depend on how many patches a picture has, as the pipeline's."""
    config = backbone.pipe.scheduler.config
    patch = backbone.pipe.vae_scale_factor * backbone.patch_size
    return calculate_shift(
        (size[0] // patch) * (size[1] // patch),
        config.get("base_image_seq_len", 256),
        config.get("max_image_seq_len", 4096),
        config.get("base_shift", 0.5),
        config.get("max_shift", 1.16),
    )


def scheduled_x0(scheduler, pred: Tensor, t: Tensor, latents: Tensor) -> Tensor:
    """x̂₀ at the scheduler's timestep t, in float32 or better; before its `step` is called for t."""
    scale, noise = noise_levels(scheduler, t)
    kind = scheduler.config.get("prediction_type", "flow_prediction")
    precise = torch.promote_types(pred.dtype, torch.float32)
    return predicted_x0(kind, pred.to(precise), latents.to(precise), scale, noise)


def noise_levels(scheduler, t: Tensor, index: int | None = None) -> tuple[Tensor, Tensor]:
    """a and s in x_t = a x₀ + s ε, in the scheduler's own scaling of the latents.

    At the step `index`, whose timestep is t; default is the step that comes next.
    """
    if not hasattr(scheduler, "sigmas"):  # DDIM and its like: √ᾱ_t, √(1−ᾱ_t)
        alpha_bar = scheduler.alphas_cumprod[int(t)]
        return alpha_bar**0.5, (1 - alpha_bar) ** 0.5
    index = scheduler.step_index if index is None else index
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
    raise _unknown_type(prediction_type)


def prediction_of(
    prediction_type: str, x0: Tensor, latents: Tensor, scale: Tensor, noise: Tensor
) -> Tensor:
    """The prediction to which clean latents belong; `predicted_x0` solved for it (s > 0)."""
    match prediction_type:
        case "epsilon":
            return (latents - scale * x0) / noise
        case "v_prediction":
            norm = (scale**2 + noise**2) ** 0.5
            return (scale * latents / norm - norm * x0) / noise
        case "flow_prediction":
            return (latents - x0) / noise
        case "sample":
            return x0
    raise _unknown_type(prediction_type)


def _unknown_type(prediction_type: str) -> ValueError:
    return ValueError(
        f"unknown prediction type {prediction_type!r}; known: epsilon, v_prediction, "
        "flow_prediction, sample"
    )
