"""A run of a text-to-image model: encode, initial latents, predict, x̂₀, step, decode."""

import copy
import inspect
import warnings
from collections.abc import Sequence
from contextlib import nullcontext

import torch
from diffusers import SchedulerMixin
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import calculate_shift
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from vldnp._files import unknown
from vldnp.models import families
from vldnp.models.backbone import HINT, Backbone
from vldnp.models.conditioning import Conditioning
from vldnp.models.hub import out_of_memory

SHIFT = dict(base_image_seq_len=256, max_image_seq_len=4096, base_shift=0.5, max_shift=1.16)


class Run:
    """A backbone with a scheduler of its own, set to `num_inference_steps`: a name
    (`Family.schedulers`), an object (copied, as it keeps state), or the pipeline's own. Height and
    width are pixels, by default the model's own size."""

    _texts: tuple[str, ...] = ()
    _encoded: Conditioning | None = None  # what is encoded, a row for each text

    def __init__(
        self, backbone: Backbone, num_inference_steps: int, scheduler=None, height=None, width=None
    ):
        if num_inference_steps < 1:
            raise ValueError(f"num_inference_steps must be 1 or more, not {num_inference_steps}")
        self.backbone, self.num_inference_steps = backbone, num_inference_steps
        self.size = backbone.picture_size(height, width)
        self.scheduler = _scheduler(backbone, scheduler)
        families.check_scheduler(self.scheduler, backbone.family)
        config, options, own = self.scheduler.config, {}, backbone.family.sigmas
        if config.get("use_dynamic_shifting"):  # μ follows from the number of patches
            patch = backbone.pipe.vae_scale_factor * backbone.family.patch_size(backbone.network)
            shifts = [backbone.pipe.scheduler.config.get(k, value) for k, value in SHIFT.items()]
            patches = (self.size[0] // patch) * (self.size[1] // patch)
            options["mu"] = calculate_shift(patches, *shifts)
        if own and not config.get("use_flow_sigmas"):
            options["sigmas"] = own(num_inference_steps)
        self.scheduler.set_timesteps(num_inference_steps, device=backbone.device, **options)
        if isinstance(scheduler, str):
            _warn_of_spacing(self.scheduler, backbone.pipe.scheduler)

    @property
    def _kind(self) -> str:
        return self.scheduler.config.get("prediction_type", "flow_prediction")

    @property
    def timesteps(self) -> Tensor:
        return self.scheduler.timesteps  # from noisy to clean

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """As `Backbone.encode`, for images of this size, and each text once."""
        if new := [text for text in dict.fromkeys(prompts) if text not in self._texts]:
            encoded = self.backbone.encode(new, self.size)
            self._encoded = self._encoded + encoded if self._encoded else encoded
            self._texts += tuple(new)
        return self._encoded[[self._texts.index(text) for text in prompts]]

    def null_conditioning(self, n: int) -> Conditioning:
        """`n` rows of no prompt, for ε_u: the empty one, or zeros where SDXL was trained so."""
        empty = self.encode([""] * n)
        if not self.backbone.pipe.config.get("force_zeros_for_empty_prompt"):
            return empty
        zeros = {**empty.added, "text_embeds": torch.zeros_like(empty.added["text_embeds"])}
        return Conditioning(torch.zeros_like(empty.embeds), added=zeros)

    def initial_latents(self, seeds: Sequence[int | torch.Generator]) -> Tensor:
        """x_T, `[B, C, h, w]`: noise from each image's own seed or generator, scaled, as the stock
        pipeline makes it with CPU generators."""
        pipe, kind = self.backbone.pipe, torch.Generator
        given = [s if isinstance(s, kind) else kind().manual_seed(s) for s in seeds]
        sizes = [n // pipe.vae_scale_factor for n in self.size]
        shape = (len(given), pipe.vae.config.latent_channels, *sizes)
        noise = randn_tensor(shape, given, self.backbone.device, self.backbone.dtype)
        return noise * getattr(self.scheduler, "init_noise_sigma", 1.0)  # flow matching: unscaled

    @torch.no_grad()
    def predict(self, latents: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        """The network's output for `[B, C, h, w]` latents at timestep t, a prompt each."""
        backbone, attending, rows = self.backbone, nullcontext(), list(cond.has_auxiliary)
        if rows:
            own = range(len(cond), len(cond) + len(rows))
            latents = torch.cat([latents, latents[rows]])
            attending = cond.auxiliary.attending(backbone.network, rows, own)
        if hasattr(self.scheduler, "scale_model_input"):
            latents = self.scheduler.scale_model_input(latents, t)
        with out_of_memory(backbone.name, HINT), attending:
            pred = backbone.family.predict(backbone.pipe, latents, t, cond.with_auxiliary())
        return pred[: len(cond)]

    def x0(self, pred: Tensor, t: Tensor, latents: Tensor) -> Tensor:
        """Predicted clean latents x̂₀ at timestep t, in float32 or better; before `step` for t."""
        precise = torch.promote_types(pred.dtype, torch.float32)
        levels = noise_levels(self.scheduler, t)
        return predicted_x0(self._kind, pred.to(precise), latents.to(precise), *levels)

    def prediction(self, x0: Tensor, t: Tensor, latents: Tensor) -> Tensor:
        """The prediction whose x̂₀ this is: the inverse of `x0`, in the precision of x̂₀."""
        return prediction_of(self._kind, x0, latents.to(x0.dtype), *noise_levels(self.scheduler, t))

    def step(self, pred: Tensor, t: Tensor, latents: Tensor, generators=None) -> Tensor:
        """x_{t−1} from x_t, with a generator per image for schedulers that add noise; DDIM's η is 0
        (Song et al. 2020, arXiv 2010.02502, eq. 16)."""
        accepted = inspect.signature(self.scheduler.step).parameters
        options = {"eta": 0.0, "generator": generators and list(generators)}
        options = {key: options[key] for key in options.keys() & accepted.keys()}
        return self.scheduler.step(pred, t, latents, **options, return_dict=False)[0]

    def warn_of_distillation(self, g: float) -> None:
        """Warns that g > 1 adds CFG to the guidance that is distilled into FLUX.1-dev."""
        if g > 1 and self.backbone.network.config.get("guidance_embeds"):
            own = f"{self.backbone.name!r} has guidance distilled in, {families.FLUX_GUIDANCE}"
            warnings.warn(f"{own}; guidance_scale {g:g} adds CFG, 1 does not", stacklevel=4)


def _scheduler(backbone: Backbone, scheduler: str | SchedulerMixin | None) -> SchedulerMixin:
    own, known = backbone.pipe.scheduler, backbone.family.schedulers
    if not isinstance(scheduler, str):
        return copy.deepcopy(own if scheduler is None else scheduler)
    if scheduler not in known:
        raise unknown("scheduler", scheduler, known)
    kind, settings = known[scheduler]
    if backbone.family.flow:  # the shift goes by different names
        name = "flow_shift" if "prediction_type" in settings else "shift"
        settings = {**settings, name: own.config.get("shift", own.config.get("flow_shift", 1.0))}
    return kind.from_config(own.config, **settings)


def _warn_of_spacing(made: SchedulerMixin, own: SchedulerMixin) -> None:
    """Warns where a scheduler takes over PNDM's default spacing, which `save_pretrained` wrote."""
    name, both = "timestep_spacing", [inspect.signature(type(s)).parameters for s in (own, made)]
    usual, others = (getattr(accepted.get(name), "default", None) for accepted in both)
    if usual and others and made.config[name] == usual != others:
        said = f"{type(made).__name__} starts at t = {int(made.timesteps[0])} by the {name} of the"
        said += f" model's {type(own).__name__}, {usual!r}, as save_pretrained writes it"
        warnings.warn(f"{said}; with its own, {others!r}, it starts at 999", stacklevel=4)


def noise_levels(scheduler: SchedulerMixin, t: Tensor) -> tuple[Tensor, Tensor]:
    """a and s in x_t = a x₀ + s ε, in the scheduler's own scaling; t is its next timestep."""
    if not hasattr(scheduler, "sigmas"):  # DDIM and its like: √ᾱ_t, √(1−ᾱ_t)
        alpha_bar = scheduler.alphas_cumprod[int(t)]
        return alpha_bar**0.5, (1 - alpha_bar) ** 0.5
    index = scheduler.step_index
    sigma = scheduler.sigmas[scheduler.index_for_timestep(t) if index is None else index]
    if hasattr(scheduler, "_sigma_to_alpha_sigma_t"):  # DPM-Solver family
        return scheduler._sigma_to_alpha_sigma_t(sigma)
    if "prediction_type" not in scheduler.config:  # flow matching: (1 − σ) x₀ + σ ε
        return 1 - sigma, sigma
    return torch.ones_like(sigma), sigma  # Euler type: x₀ + σ ε


def predicted_x0(kind: str, pred: Tensor, latents: Tensor, scale: Tensor, noise: Tensor) -> Tensor:
    """Clean latents `[B, C, h, w]` from a prediction, where x_t = a x₀ + s ε (scale, noise): of ε
    (Ho et al. 2020, eq. 15); of v = (a ε − s x₀) / r with r² = a² + s² (Salimans & Ho 2022,
    appendix D; r = 1 unless latents are σ-scaled); of v = ε − x₀ (Lipman et al. 2023; there
    a = 1 − s); or of x̂₀ itself."""
    norm = (scale**2 + noise**2) ** 0.5
    return {
        "epsilon": (latents - noise * pred) / scale,
        "v_prediction": (scale * latents / norm - noise * pred) / norm,
        "flow_prediction": latents - noise * pred,
        "sample": pred,
    }[kind]


def prediction_of(kind: str, x0: Tensor, latents: Tensor, scale: Tensor, noise: Tensor) -> Tensor:
    """The prediction to which clean latents belong; `predicted_x0` solved for it (s > 0)."""
    norm = (scale**2 + noise**2) ** 0.5
    return {
        "epsilon": (latents - scale * x0) / noise,
        "v_prediction": (scale * latents / norm - norm * x0) / noise,
        "flow_prediction": (latents - x0) / noise,
        "sample": x0,
    }[kind]
