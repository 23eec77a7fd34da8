"""A third way in: a method inside the calls of a diffusers pipeline that nobody changed.

    with vldnp.guiding(pipe, vldnp.VLDNP(vlm, "nudity", omega=8)) as guide:
        images = pipe("…", guidance_scale=7.5).images

A forward hook on its network sees ε_u and ε_c in one batch, looks and steers away as the sampler
does, and puts the guided prediction ε in the place of both: the pipeline's own ε + g (ε − ε) is ε.
What ControlNets or adapters add to the network's inputs stays in force.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from vldnp import guidance
from vldnp._finite import check_finite, naming
from vldnp.looking import Looking
from vldnp.methods import Method
from vldnp.models.backbone import as_backbone
from vldnp.models.conditioning import AsWritten
from vldnp.models.families import FLUX, check_scheduler
from vldnp.models.run import Run
from vldnp.negatives import Negative, SampleId
from vldnp.steering import Steering


@contextmanager
def guiding(pipe: DiffusionPipeline, method: Method) -> Iterator["Guide"]:
    """Within the block, calls of the pipeline are guided by the method, as by `vldnp.sample`.

    Args:
        pipe: a Stable Diffusion 1, 2, XL or 3 pipeline; its guidance scale must be above 1.
        method: as for `vldnp.sample`.

    Raises:
        ValueError, TypeError: a pipeline of another family, a method that a hook cannot serve, or
            in the block a call without CFG or with a scheduler that clips; one line.
    """
    guide = Guide(pipe, method)
    handle = guide.run.backbone.network.register_forward_hook(guide.guided, with_kwargs=True)
    try:
        yield guide
    finally:
        handle.remove()


class Guide:
    """What guides the calls of a pipeline.

    Attributes:
        negatives: of the last call, for each step those in force, one per image, with the VLM's
            words.
    """

    def __init__(self, pipe: DiffusionPipeline, method: Method):
        if not isinstance(method, Method):
            raise TypeError(f"method must be a Method such as VLDNP(vlm, …), not {method!r}")
        vlm = getattr(method.negatives, "vlm", None)
        for what, is_so in {
            "changes what the prompts are encoded to": method.conditioning != AsWritten(),
            "drops ε_u in some steps": method.adaptive is not None,
            "steers inside the network": hasattr(method.rule, "conditioning"),
            "looks ahead": hasattr(method.negatives, "foreseen"),
            "is told prompts and seeds": getattr(vlm, "by_identity", False),
        }.items():
            if is_so:
                raise ValueError(f"{method.name!r} {what}, which no hook can; use vldnp.sample")
        self.pipe, self.method = pipe, method
        self.run = _Running(pipe)
        if self.run.backbone.family is FLUX:
            raise ValueError("FLUX evaluates ε_u in a call of its own; use vldnp.sample")
        self.negatives: list[list[Negative]] = []
        self._asking = False

    def guided(self, network: nn.Module, args: tuple, kwargs: dict, output: tuple) -> tuple | None:
        """The network's output, with ε for ε_u and ε_c of the images that are steered."""
        if self._asking:
            return None
        if getattr(self.pipe, "guidance_rescale", 0) or kwargs.get("skip_layers"):
            raise ValueError("guidance_rescale and skipped layers change ε once more; leave them")
        inputs = args or (kwargs["hidden_states"], kwargs["timestep"])
        run, B, t = self.run, len(inputs[0]) // 2, inputs[1].flatten()[0]
        latents = run.unscaled(inputs[0][:B], t)
        if t == run.timesteps[0]:
            self._begin(latents)
        i, looking, steering = len(self.negatives), self._looking, self._steering

        pred_uncond, pred_cond = output[0].chunk(2)
        pred = guidance.cfg(pred_uncond, pred_cond, steering.g)
        steering.use(looking.in_force(i))
        if i in looking.query_steps:
            looking.at(i, run.x0(pred, t, latents), latents)
            steering.use(looking.in_force(i))
        self.negatives.append(steering.negatives)

        evaluated = steering.outdated(i)
        pred_neg = self._predicted(network, args, kwargs, evaluated) if evaluated else pred[:0]
        pred = steering.away(i, latents, pred, pred_uncond, pred_cond, pred_neg, evaluated)
        rows = steering.rows(i)
        if (correction := self.method.correction) is not None:
            pred, rows = correction.step(run, pred, t, latents, i / len(run.timesteps)), range(B)
        with naming(looking.labels, f"at step {i}"):
            check_finite({"the prediction": pred})
        preds = output[0].clone()
        preds[[*rows, *(B + row for row in rows)]] = torch.cat([pred[list(rows)]] * 2)
        return (preds, *output[1:])

    def _begin(self, latents: Tensor) -> None:
        """At the first step of a call."""
        if not self.pipe.do_classifier_free_guidance:
            g = self.pipe.guidance_scale
            raise ValueError(f"guidance_scale {g} leaves no ε_u to steer with; use one above 1")
        check_scheduler(self.pipe.scheduler, self.run.backbone.family)
        B, method = len(latents), self.method
        first = method.negatives.initial([SampleId("", None)] * B)
        N = self.pipe.scheduler.num_inference_steps
        queries = [i for i in method.negatives.query_steps_of(N) if i + method.lag < N]
        labels = [f"image {row}" for row in range(B)]
        g = latents.new_tensor([self.pipe.guidance_scale] * B).view(B, 1, 1, 1)
        self._looking = Looking(self.run, method, first, queries, False, labels, ())
        self._steering = Steering(method, self.run, first, latents, g)
        self.negatives = []

    def _predicted(self, network: nn.Module, args: tuple, kwargs: dict, rows: list[int]) -> Tensor:
        """ε_n of some images, for each of their negative prompts; all else is as for ε_c."""
        negatives = self._steering.negatives
        each = [(row, text) for row in rows for text in negatives[row].prompts]
        told, B = self.run.encode([text for _, text in each]), len(negatives)
        args, kwargs = _selected((args, kwargs), [B + row for row, _ in each], 2 * B)
        kwargs["encoder_hidden_states"] = told.embeds
        added = {name: value for name, value in told.added.items() if name != "time_ids"}
        (kwargs.get("added_cond_kwargs") or kwargs).update(added)
        self._asking = True
        try:
            return network(*args, **kwargs)[0]
        finally:
            self._asking = False


class _Running(Run):
    """A run that the pipeline itself is in, with its own scheduler at the step it is at."""

    def __init__(self, pipe: DiffusionPipeline):
        self.backbone = as_backbone(pipe)
        self.size, self._encoded = self.backbone.size, {}

    @property
    def scheduler(self):
        return self.backbone.pipe.scheduler

    def unscaled(self, sample: Tensor, t: Tensor) -> Tensor:
        """x_t of what the network is given."""
        if not hasattr(self.scheduler, "scale_model_input"):  # flow matching
            return sample
        return sample / self.scheduler.scale_model_input(torch.ones_like(sample), t)


def _selected(value: Any, rows: Sequence[int], of: int) -> Any:
    """Those rows of every tensor in a network's inputs that has `of` of them."""
    if isinstance(value, Tensor):
        return value[list(rows)] if value.ndim and len(value) == of else value
    if isinstance(value, Mapping):
        return {name: _selected(one, rows, of) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_selected(one, rows, of) for one in value)
    return value
