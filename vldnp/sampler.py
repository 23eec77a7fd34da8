"""The sampler. The body of `_denoise` is the method: guide, query, steer, step."""

from collections.abc import Iterator, Sequence
from dataclasses import fields, replace

import torch
from diffusers import DiffusionPipeline, SchedulerMixin
from torch import Tensor
from tqdm.auto import tqdm

from vldnp._files import unknown
from vldnp._finite import check_finite, naming
from vldnp.batch import Batch, batch_of, whole
from vldnp.guider import Guider, View, evaluate, guider
from vldnp.methods import CFG, Method
from vldnp.models.backbone import Backbone, as_backbone, to_pil
from vldnp.models.run import Run
from vldnp.trace import Output, Step, Trace, joined, record

OUTPUT_TYPES = {"pil": to_pil, "pt": None, "np": lambda x: x.permute(0, 2, 3, 1).numpy()}


@torch.no_grad()
def _denoise(run: Run, own: Guider, latents: Tensor, x0_every: bool) -> Iterator[Step]:
    """VL-DNP for a batch of B images (arXiv 2510.26052, algorithm 1)."""
    for i, t in enumerate(run.timesteps):
        # 1. ε_cfg = ε_u + g (ε_c − ε_u). ε_n shares the call, unless a query is about to renew it.
        queried, before = i in own.query_steps, own.negatives
        branches = own.positive(i) | ({} if queried else own.negative(i))
        preds = evaluate(run, latents, t, branches)
        pred = own.cfg(preds)

        # 2. The VLM gets x̂₀ without the negative term; the terms it names are the negative prompt.
        view = View(own, i, own.images, run.x0(pred, t, latents), latents)
        if queried:
            own.negatives = own.method.negatives.look(view, before)
            late = own.negative(i)
            branches, preds = branches | late, preds | evaluate(run, latents, t, late)
        if x0_every:
            view.pixels  # noqa: B018  (decodes them)

        # 3. ε = ε_cfg − ω (ε_n − ε_u), for the images that have a negative prompt.
        pred = own.steer(i, t, latents, pred, preds)

        # 4. x_{t−1}.
        latents = run.step(pred, t, latents, own.batch.generators)
        with naming(own.batch.labels, f"at step {i}"):
            check_finite({"the prediction": pred, "x̂₀": view.x0, "the latents": latents})
        yield record(view, float(t), latents, branches, before)


def denoise(
    model: Backbone | DiffusionPipeline,
    prompt: str | Sequence[str],
    method: Method = CFG(),  # noqa: B008  (frozen data)
    *,
    num_inference_steps: int = 50,
    x0_every: bool = False,
    height: int | None = None,
    width: int | None = None,
    scheduler: str | SchedulerMixin | None = None,
    **batch,
) -> Iterator[Step]:
    """Denoise a batch, yielding a `Step` after each step. The arguments are checked at once.

    The same batch on as many threads of the same kind of CPU gives the same pixels. Other images of
    the batch change an image by rounding only, unless rounding changes an answer of the VLM.

    Args:
        model: a `Backbone` (see `vldnp.load`) or a Stable Diffusion or FLUX.1 pipeline.
        method: `CFG()`, `Static(...)`, `VLDNP(...)`, `SAFREE(...)`, `SLD(...)` or another `Method`.
        x0_every: decode x̂₀ at every step, not only where the VLM is queried.
        height, width: in pixels; default is the model's own size.
        scheduler: `dpm++`, `dpm++-karras`, `ddim`, `euler`, or an object that does not clip x̂₀;
            default is the model's.
        batch: `seeds`, `generator`, `guidance_scale`, `num_images_per_prompt`, `noise_device`;
            see `batch_of`.

    Raises:
        ValueError, TypeError: an argument is wrong, in one line.
        NonFiniteError: NaN or infinity, with the step and the image.
    """
    run = Run(as_backbone(model), num_inference_steps, scheduler, height, width)
    return _started(run, batch_of(prompt, **batch), method, x0_every)


def sample(
    model: Backbone | DiffusionPipeline,
    prompt: str | Sequence[str],
    method: Method = CFG(),  # noqa: B008  (frozen data)
    *,
    seeds: Sequence[int] | None = None,
    guidance_scale: float | Sequence[float] = 7.5,
    num_inference_steps: int = 50,
    x0_every: bool = False,
    height: int | None = None,
    width: int | None = None,
    scheduler: str | SchedulerMixin | None = None,
    output_type: str = "pil",
    batch_size: int | None = None,
    progress: bool = True,
    **batch,
) -> Output:
    """Denoise to the end and decode; see `denoise` and `batch_of` for the other arguments. The
    images' type is `pil`, `pt`, `np` or `latent` (see `Output`), and `batch_size` of them are made
    at a time, by default all."""
    if output_type not in (*OUTPUT_TYPES, "latent"):
        raise unknown("output_type", output_type, (*OUTPUT_TYPES, "latent"))
    backbone, asked = as_backbone(model), batch_of(prompt, seeds, guidance_scale, **batch)
    size = len(asked.prompts) if batch_size is None else whole("batch_size", batch_size, 1)
    latents, images, steps = [], [], []
    starts = range(0, len(asked.prompts), size)
    with tqdm(total=len(starts) * num_inference_steps, disable=not progress, unit="step") as bar:
        for start in starts:
            part = Batch(*(getattr(asked, f.name)[start : start + size] for f in fields(Batch)))
            run = Run(backbone, num_inference_steps, scheduler, height, width)
            steps.append([])
            for step in _started(run, part, method, x0_every):
                steps[-1].append(replace(step, latents=None, x0=None))
                bar.update()
            latents.append(step.latents.cpu())
            if output_type != "latent":
                with naming(part.labels, "after the last step"):
                    images.append(backbone.decode(step.latents).cpu())
    clean, convert = torch.cat(latents), OUTPUT_TYPES.get(output_type)
    found = torch.cat(images) if images else clean
    trace = Trace(asked.prompts, asked.seeds, [joined(s) for s in zip(*steps, strict=True)])
    return Output(convert(found) if convert else found, trace, clean, method)


def _started(run: Run, batch: Batch, method: Method, x0_every: bool) -> Iterator[Step]:
    """The loop, ready to run: what is wrong with a method is an error before its first step."""
    if not isinstance(method, Method):
        raise TypeError(f"method must be a Method such as CFG() or VLDNP(vlm), not {method!r}")
    run.warn_of_distillation(max(batch.guidance_scales))
    own, latents = guider(method, run, batch), run.initial_latents(batch.generators)
    return _denoise(run, own, latents, x0_every)
