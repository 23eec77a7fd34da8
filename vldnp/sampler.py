"""The sampler: a generator that yields a `Step` per denoising step, and `sample()`, which collects.

The body of `denoise` is the method: guide, look, steer away, step.
"""

import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from numbers import Real

import numpy as np
import torch
from diffusers import DiffusionPipeline, SchedulerMixin
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from vldnp import guidance
from vldnp._files import unknown
from vldnp._finite import check_finite, is_finite, label, naming
from vldnp.levers import AdaptiveGuidance
from vldnp.looking import Looking
from vldnp.methods import CFG, Method
from vldnp.models.backbone import Backbone, as_backbone, to_pil
from vldnp.models.conditioning import concatenated
from vldnp.models.run import Run
from vldnp.negatives import SampleId
from vldnp.steering import Steering
from vldnp.trace import Output, Step, Trace

OUTPUT_TYPES = ("pil", "pt", "np", "latent")


def denoise(
    model: Backbone | DiffusionPipeline,
    prompt: str | Sequence[str],
    method: Method = CFG(),  # noqa: B008  (frozen data)
    *,
    seeds: Sequence[int] | None = None,
    num_inference_steps: int = 50,
    guidance_scale: float | Sequence[float] = 7.5,
    num_images_per_prompt: int = 1,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
    noise_device: str = "cpu",
    height: int | None = None,
    width: int | None = None,
    scheduler: str | SchedulerMixin | None = None,
    x0_every: bool = False,
) -> Iterator[Step]:
    """Denoise a batch, yielding a `Step` after each step. The arguments are checked at once.

    Every image has its own negative prompt or none. The predictions of a step come from one U-Net
    call of batch 2B + k, where k images have a negative prompt. Where the VLM is asked, the
    negative prompts follow from ε_cfg, so there a call of batch 2B is followed by one of batch k.
    A negative prompt costs its image one evaluation a step either way. The levers of a method
    (see `Method`) take evaluations and queries away; with all of them off nothing else changes.

    What else is in its batch changes an image by rounding only. In float64 it comes out the same
    to 1e-9 (with DDIM; the other schedulers step in float32). In float32 the guidance amplifies
    rounding: on moji-sd, 32 images alone and in one batch, with five queries at ω = 15, differ in
    their latents by 3e-5 (median) to 2.5e-3 and in their pictures by 1/255 at most. Where a VLM's
    answer hangs on such a difference, the image goes another way altogether. The same pixels are
    promised for the same batch on as many threads of a CPU with the same kernels.

    Args:
        model: a `Backbone` (see `vldnp.load`) or a Stable Diffusion or FLUX.1 pipeline.
        prompt: one or several.
        method: `CFG()`, `Static(...)`, `VLDNP(...)`, `SAFREE(...)`, `SLD(...)` or another `Method`.
        seeds: one per image; default 0 … B−1.
        num_inference_steps: N ≥ 1.
        guidance_scale: g, one for all or one per image; at 1 no ε_u is evaluated but for
            a rule that needs it, as suits few-step and guidance-distilled models.
        num_images_per_prompt: each prompt is repeated so often, as in diffusers.
        generator: instead of seeds, as in diffusers: one, drawn from in turn, or one per image.
        noise_device: where the generators of `seeds` draw. A seed gives the same noise on every
            machine with `cpu`, other noise with `cuda`.
        height, width: in pixels; default is the model's own size.
        scheduler: `dpm++`, `dpm++-karras`, `ddim`, `euler`, or an object that does not clip x̂₀;
            default is the model's.
        x0_every: decode x̂₀ at every step, not only where the VLM is asked.

    Raises:
        ValueError, TypeError: an argument is wrong; one line that says which and what is right.
        NonFiniteError: while it runs; NaN or infinity, with the step and the image it is of.
    """
    batch = _batch(prompt, seeds, generator, guidance_scale, num_images_per_prompt, noise_device)
    run = Run(as_backbone(model), num_inference_steps, scheduler, height, width)
    return _start(run, batch, method, x0_every)


def sample(
    model: Backbone | DiffusionPipeline,
    prompt: str | Sequence[str],
    method: Method = CFG(),  # noqa: B008  (frozen data)
    *,
    seeds: Sequence[int] | None = None,
    num_inference_steps: int = 50,
    guidance_scale: float | Sequence[float] = 7.5,
    num_images_per_prompt: int = 1,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
    noise_device: str = "cpu",
    height: int | None = None,
    width: int | None = None,
    scheduler: str | SchedulerMixin | None = None,
    x0_every: bool = False,
    output_type: str = "pil",
    batch_size: int | None = None,
    progress: bool = True,
) -> Output:
    """Denoise to the end and decode; see `denoise` for the arguments that both have.

    Args:
        output_type: `pil`, `pt`, `np` or `latent`; see `Output`.
        batch_size: so many images at a time; default is all at once. It changes
            them by rounding only; see `denoise`.
        progress: show a progress bar.
    """
    if output_type not in OUTPUT_TYPES:
        raise unknown("output_type", output_type, OUTPUT_TYPES)
    backbone = as_backbone(model)
    batch = _batch(prompt, seeds, generator, guidance_scale, num_images_per_prompt, noise_device)
    parts = batch.split(batch_size)
    latents: list[Tensor] = []
    pixels: list[Tensor] = []
    steps: list[list[Step]] = []
    with tqdm(total=len(parts) * num_inference_steps, disable=not progress, unit="step") as bar:
        for part in parts:
            steps.append([])
            run = Run(backbone, num_inference_steps, scheduler, height, width)
            for step in _start(run, part, method, x0_every):
                steps[-1].append(replace(step, latents=None, x0=None))
                bar.update()
            latents.append(step.latents.cpu())
            if output_type != "latent":
                with naming(part.labels, "after the last step"):
                    pixels.append(backbone.decode(step.latents).cpu())
    return Output(
        images=_as_type(output_type, torch.cat(latents if output_type == "latent" else pixels)),
        trace=Trace(
            batch.prompts, batch.seeds, [_side_by_side(s) for s in zip(*steps, strict=True)]
        ),
        latents=torch.cat(latents),
        method=method,
    )


def _start(run: Run, batch: "_Batch", method: Method, x0_every: bool) -> Iterator[Step]:
    """Everything that can be wrong is found here; the generator comes back ready to run."""
    if not isinstance(method, Method):
        raise TypeError(f"method must be a Method such as CFG() or VLDNP(vlm), not {method!r}")
    if method.preview is not None:
        method.preview.check(run.backbone)
    N = run.num_inference_steps  # an answer that would come too late is not asked for
    query_steps = [i for i in method.negatives.query_steps_of(N) if i + method.lag < N]
    latents = run.initial_latents(batch.generators)
    return _denoise(run, batch, method, query_steps, latents, x0_every)


@torch.no_grad()
def _denoise(
    run: Run,
    batch: "_Batch",
    method: Method,
    query_steps: Sequence[int],
    latents: Tensor,
    x0_every: bool,
) -> Iterator[Step]:
    B, N = len(batch.prompts), len(run.timesteps)
    nothing, prompted = run.null_conditioning(B), method.conditioning.begin(run, batch.prompts)
    g = latents.new_tensor(batch.guidance_scales).view(B, 1, 1, 1)
    negatives = method.negatives.initial(batch.identities)
    cfg = (prompted, g, batch.generators)
    looking = Looking(run, method, negatives, query_steps, x0_every, batch.labels, cfg)
    steering = Steering(method, run, negatives, latents, g)
    adaptive = method.adaptive or AdaptiveGuidance()
    aligned = [scale == 1 for scale in batch.guidance_scales]  # ε_cfg is ε_c, as in few-step models

    def predict(t: Tensor, uncond: list[int], all_cond: bool, neg: list[int]):
        """ε_u, ε_c and ε_n of these images (ε_c of all of them, or of none) from one call."""
        parts = [nothing[uncond]] + ([cond] if all_cond else [])
        parts += [steering.conditioning(neg, cond, i)] if neg else []
        each = [row for row in neg for _ in steering.negatives[row].prompts]
        rows = [*uncond, *(range(B) if all_cond else ()), *each]
        preds = run.predict(latents[rows], t, concatenated(parts))
        return preds.split([len(uncond), len(preds) - len(uncond) - len(each), len(each)])

    for i, t in enumerate(run.timesteps):
        cond, waits = prompted(i), i in query_steps and not method.lag
        steering.use(looking.in_force(i))

        # 1. Classifier-free guidance. Where the VLM is asked, ε_n has to wait for its answer. Where
        # ε_u is dropped, ε_c stands for it, so that ε_cfg is ε_c.
        dropped = [True] * B if adaptive.has_started(i, N) else aligned
        needing = steering.needing_uncond(i)
        guided = [row for row in range(B) if row in needing or not dropped[row]]
        steered = [] if waits else steering.outdated(i)
        evaluated, pred_cond, pred_neg = predict(t, guided, True, steered)
        pred_uncond = pred_cond.clone()
        pred_uncond[guided] = evaluated
        pred = guidance.cfg(pred_uncond, pred_cond, g)
        if adaptive.cosine is not None:
            near = (guidance.cosine(pred_cond, pred_uncond) >= adaptive.cosine).tolist()
            aligned = [aligned[row] or (row in guided and near[row]) for row in range(B)]

        # 2. Look at x̂₀, which is free of the negative term, and renew the negative prompts.
        x0 = run.x0(pred, t, latents)
        asked, pictures, said = looking.at(i, x0, latents)
        if waits:
            steering.use(looking.in_force(i))
            if steered := steering.outdated(i):
                needing = steering.needing_uncond(i)
                late = [row for row in steered if row in needing and row not in guided]
                pred_uncond[late], _, pred_neg = predict(t, late, False, steered)
                guided += late

        # 3. Steer the images that have a negative prompt away from it, or from each of several.
        pred = steering.away(i, latents, pred, pred_uncond, pred_cond, pred_neg, steered)
        if method.correction is not None:
            pred = method.correction.step(run, pred, t, latents, i / N)

        # 4. Step.
        latents = run.step(pred, t, latents, batch.generators)
        with naming(batch.labels, f"at step {i}"):
            check_finite({"the prediction": pred, "x̂₀": x0, "the denoised latents": latents})
        negatives = steering.negatives
        yield Step(
            index=i,
            timestep=float(t),
            latents=latents,
            x0=x0,
            x0_images=pictures if any(pictures) else None,
            queried=bool(asked),
            vlm_answers=said and said.answers,
            vlm_failures=said and said.failures,
            concepts=[negative.concepts for negative in negatives],
            negative_prompts=[negative.prompt for negative in negatives],
            model_evaluations=[
                1
                + (row in guided)
                + (row in steered) * steering.evaluations(row)
                + (row in cond.has_auxiliary)
                for row in range(B)
            ],
            vlm_calls=[int(row in asked) for row in range(B)],
            x0_decodes=[int(picture is not None) for picture in pictures],
        )


@dataclass(frozen=True)
class _Batch:
    """What is asked for, one entry per image."""

    prompts: list[str]
    seeds: list[int | None]
    generators: list[torch.Generator]
    guidance_scales: list[float]
    places: list[int]

    @cached_property
    def labels(self) -> list[str]:
        """The images in an error's words."""
        images = zip(self.places, self.prompts, self.seeds, strict=True)
        return [label(*image) for image in images]

    @property
    def identities(self) -> list[SampleId]:
        return [SampleId(*image) for image in zip(self.prompts, self.seeds, strict=True)]

    def split(self, size: int | None) -> list["_Batch"]:
        """Parts of `size` images; one part for None."""
        size = len(self.prompts) if size is None else _whole("batch_size", size, 1)
        return [
            _Batch(*(getattr(self, field.name)[start : start + size] for field in fields(self)))
            for start in range(0, len(self.prompts), size)
        ]


def _batch(
    prompt: str | Sequence[str],
    seeds: Sequence[int] | None,
    generator: torch.Generator | Sequence[torch.Generator] | None,
    guidance_scale: float | Sequence[float],
    num_images_per_prompt: int,
    noise_device: str = "cpu",
) -> _Batch:
    """Check the arguments and lay them out per image."""
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    if not prompts:
        raise ValueError("no prompt given; give at least one")
    if wrong := [p for p in prompts if not isinstance(p, str)]:
        raise ValueError(f"prompts must be texts, not {wrong[0]!r}")
    if not all(p.strip() for p in prompts):
        raise ValueError("a prompt is empty; for a picture without one, use guidance_scale=0")
    count = _whole("num_images_per_prompt", num_images_per_prompt, 1)
    prompts = [p for p in prompts for _ in range(count)]
    B = len(prompts)

    if generator is None:
        seeds = _each("seeds", range(B) if seeds is None else seeds, B)
        seeds = [_whole("a seed", seed, 0) for seed in seeds]
        generators = [_generator(noise_device).manual_seed(seed) for seed in seeds]
    elif seeds is None:
        single = isinstance(generator, torch.Generator)
        generators = [generator] * B if single else _each("generator", generator, B)
        seeds = [None] * B
    else:
        raise ValueError("give either seeds or generator, not both")

    single = isinstance(guidance_scale, Real | str)
    scales = [guidance_scale] * B if single else _each("guidance_scale", guidance_scale, B)
    if wrong := [scale for scale in scales if not is_finite(scale)]:
        raise ValueError(f"guidance_scale must be finite numbers, not {wrong[0]!r}")
    scales = [float(scale) for scale in scales]
    return _Batch(prompts, list(seeds), generators, scales, list(range(B)))


def _whole(name: str, value, least: int) -> int:
    """`value`, if it is a whole number from `least` on that a file of records can hold."""
    try:
        number = operator.index(value)
    except TypeError:
        number = least - 1
    if not least <= number < 2**63:
        raise ValueError(f"{name} must be a whole number, {least} or more, not {value!r}")
    return number


def _generator(device: str) -> torch.Generator:
    try:
        return torch.Generator(device)
    except RuntimeError as error:  # no such device, or a build of PyTorch without it
        raise ValueError(
            f"noise_device {device!r} is not here: {str(error).splitlines()[0]}; "
            "'cpu' is, and draws other noise"
        ) from error


def _each(name: str, values: Sequence, B: int) -> list:
    """`values` as a list, if it has one per image."""
    try:
        values = list(values)
    except TypeError:
        raise TypeError(f"{name} must be a sequence of one per image, not {values!r}") from None
    if len(values) != B:
        raise ValueError(f"{name} has {len(values)} entries for {B} images; give one per image")
    return values


def _side_by_side(parts: Sequence[Step]) -> Step:
    """The same step of several batches as one step of all their images."""

    def joined(name: str) -> list | None:
        values = [getattr(part, name) for part in parts]
        if not any(isinstance(value, list) for value in values):
            return values[0]
        nothing = [[None] * len(part.concepts) for part in parts]
        return sum((v or n for v, n in zip(values, nothing, strict=True)), start=[])

    together = {field.name: joined(field.name) for field in fields(Step)}
    return Step(**together | {"queried": any(part.queried for part in parts)})


def _as_type(output_type: str, images: Tensor) -> list[Image.Image] | Tensor | np.ndarray:
    if output_type == "pil":
        return to_pil(images)
    if output_type == "np":
        return images.permute(0, 2, 3, 1).numpy()
    return images
