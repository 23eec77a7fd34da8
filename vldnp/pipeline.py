"""A method inside the calls of an unmodified diffusers pipeline: a forward hook on the network gets
ε_u and ε_c in one batch, queries and steers with the sampler's Guider, and returns ε in place of
both, since the pipeline's own ε + g (ε − ε) is ε. What adapters add to the inputs is kept."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from vldnp._finite import check_finite, naming
from vldnp.batch import Batch
from vldnp.guider import Guider, View, guider
from vldnp.methods import Method
from vldnp.models.backbone import as_backbone
from vldnp.models.conditioning import Conditioning, Prompting
from vldnp.models.families import FAMILIES, FLUX, check_scheduler
from vldnp.models.run import Run
from vldnp.negatives import Negative

REFUSED = ("negative_", "clip_skip", "guidance_rescale", "skip_guidance_layers")
"""Arguments of a call, or their first letters, that change ε_u or ε in addition to the method."""


@contextmanager
def guiding(pipe: DiffusionPipeline, method: Method) -> Iterator["Guide"]:
    """Within the block, calls of the pipeline are guided by the method, as by `vldnp.sample`.

        with vldnp.guiding(pipe, vldnp.VLDNP(vlm, "nudity", omega=8)) as guide:
            images = pipe("…", guidance_scale=7.5).images

    `pipe` is a Stable Diffusion 1, 2, XL or 3 pipeline, also from image to image or with a
    ControlNet. Other pipelines of the same network are not guided. Query steps are those of all N
    steps, of which image to image skips some. A pipeline or method that a hook cannot serve is a
    ValueError or TypeError of one line. In the block, so is a call without CFG (a guidance scale of
    1 or less), with an argument of `REFUSED`, or a scheduler that clips."""
    guide, kind = Guide(pipe, method), type(pipe)

    def call(self, *args, **kwargs):
        given = inspect.signature(kind.__call__).bind(self, *args, **kwargs).arguments
        for name, value in given.items():
            if name.startswith(REFUSED) and (isinstance(value, Tensor) or value):
                raise ValueError(f"{name} changes ε_u or ε in addition to the method; omit it")
        guide.guider, guide.negatives = None, []
        hook = guide.run.backbone.network.register_forward_hook(guide.guided, with_kwargs=True)
        try:
            return kind.__call__(self, *args, **kwargs)
        finally:
            hook.remove()

    pipe.__class__ = type(kind.__name__, (kind,), {"__call__": call, "guided": True})
    try:
        yield guide
    finally:
        pipe.__class__ = kind


class Guide:
    """Guides the calls of a pipeline; `negatives` are those of the last call, step by step."""

    def __init__(self, pipe: DiffusionPipeline, method: Method):
        if not isinstance(method, Method):
            raise TypeError(f"method must be a Method such as VLDNP(vlm, …), not {method!r}")
        if method.conditioning != Prompting():
            raise _unservable(method)
        if getattr(pipe, "guided", False):
            raise ValueError("this pipeline is guided already; leave that block first")
        self.pipe, self.method, self.run = pipe, method, _Running(pipe)
        if self.run.backbone.family is FLUX:
            raise ValueError("FLUX evaluates ε_u in a call of its own; use vldnp.sample")
        self.guider: Guider | None = None  # of the call
        self.negatives: list[list[Negative]] = []
        self._evaluating = False

    def guided(self, network: nn.Module, args: tuple, kwargs: dict, output: tuple) -> tuple | None:
        """The network's output, with ε in place of ε_u and ε_c."""
        if self._evaluating:
            return None
        if not self.pipe.do_classifier_free_guidance:
            g = self.pipe.guidance_scale
            raise ValueError(f"guidance_scale {g} leaves no ε_u to steer with; use one above 1")
        inputs = args or (kwargs["hidden_states"], kwargs["timestep"])
        run, B, t = self.run, len(inputs[0]) // 2, inputs[1].flatten()[0]
        latents = run.unscaled(inputs[0][:B], t)
        if self.guider is None:
            self._begin(B, t)
        own, i = self.guider, self._first + len(self.negatives)
        own.g.fill_(self.pipe.guidance_scale)  # a callback may change it
        pred_uncond, pred_cond = output[0].chunk(2)
        rows = own.unconditional = own.guided(i)
        preds = {"uncond": (rows, pred_uncond[rows]), "cond": (own.images, pred_cond)}
        pred = own.cfg(preds)
        if i in own.query_steps:
            view = View(own, i, own.images, run.x0(pred, t, latents), latents)
            own.negatives = self.method.negatives.look(view, own.negatives)
        if negative := own.negative(i):
            late, (rows, conditioning) = negative["late"][0], negative["neg"]
            preds["late"] = late, pred_uncond[late]
            preds["neg"] = rows, self._predicted(network, args, kwargs, rows, conditioning)
        pred = own.steer(i, t, latents, pred, preds)
        self.negatives.append(own.negatives)
        with naming(own.batch.labels, f"at step {i}"):
            check_finite({"the prediction": pred})
        return (torch.cat([pred, pred]), *output[1:])

    def _begin(self, B: int, t: Tensor) -> None:
        """At the first step of a call, at timestep t."""
        check_scheduler(self.pipe.scheduler, self.run.backbone.family)
        labels = [f"image {row}" for row in range(B)]
        batch = Batch([""] * B, [None] * B, [], [float(self.pipe.guidance_scale)] * B, labels)
        self.guider = guider(self.method, self.run, batch)
        self.guider.prompted = self._prompted
        self._first = (self.run.timesteps == t).nonzero()[0].item()

    def _prompted(self, i: int) -> Conditioning:
        raise _unservable(self.method)

    def _predicted(
        self, network: nn.Module, args: tuple, kwargs: dict, rows: list[int], neg: Conditioning
    ) -> Tensor:
        """ε_n of some images; all but the text is as for ε_c."""
        B = len(self.guider.images)
        places = [B + row for row in rows]

        def selected(one: Any) -> Any:  # those rows, of a tensor that has a row for each ε
            return one[places] if isinstance(one, Tensor) and one.shape[:1] == (2 * B,) else one

        args, kwargs = tree_map(selected, (args, kwargs))
        kwargs["encoder_hidden_states"] = neg.embeds
        added = {name: value for name, value in neg.added.items() if name != "time_ids"}
        (kwargs.get("added_cond_kwargs") or kwargs).update(added)
        self._evaluating = True
        try:
            return network(*args, **kwargs)[0]
        finally:
            self._evaluating = False


class _Running(Run):
    """A run of the pipeline itself, with the pipeline's scheduler at its current step."""

    def __init__(self, pipe: DiffusionPipeline):
        self.pipe, self.backbone = pipe, as_backbone(_from_text(pipe))
        self.size = self.backbone.size

    @property
    def scheduler(self):
        return self.pipe.scheduler

    @property
    def num_inference_steps(self) -> int:
        return self.scheduler.num_inference_steps

    def unscaled(self, sample: Tensor, t: Tensor) -> Tensor:
        """x_t of the network's input."""
        scaled = getattr(self.scheduler, "scale_model_input", None)  # flow matching has none
        return sample / scaled(torch.ones_like(sample), t) if scaled else sample


def _from_text(pipe: DiffusionPipeline) -> DiffusionPipeline:
    """A pipeline of the same models that takes text alone, no image and no ControlNet."""
    kinds = {f.pipeline.__name__.removesuffix("Pipeline"): f.pipeline for f in FAMILIES}
    stem = max((s for s in kinds if type(pipe).__name__.startswith(s)), key=len, default="")
    if not stem or isinstance(pipe, kinds[stem]):
        return pipe
    return kinds[stem].from_pipe(pipe, dtype=pipe.dtype)


def _unservable(method: Method) -> ValueError:
    said = f"{method.name!r} changes or needs the encoded prompts, which a hook does not get"
    return ValueError(f"{said}; use vldnp.sample")
