"""A second way in: VL-DNP inside diffusers' modular pipelines, as a guider and a block.

The guider adds the negative term to whatever the pipeline's own denoiser predicts; the block sits
in the denoising loop between the denoiser and the scheduler's step, looks at x̂₀ and renews the
negative prompts. What ControlNets or adapters add to the pipeline stays in force.

    blocks = looking(StableDiffusionXLAutoBlocks().get_workflow("text2image"))
    pipe = blocks.init_pipeline(folder)
    pipe.load_components()
    pipe.update_components(guider=VLDNPGuidance(vldnp.VLDNP(vlm, "nudity", omega=8)))
    images = pipe(prompt="…", output="images")

Unlike in `vldnp.core.sampler`, each kind of prediction is a call of its own, and a step's third
one is made for all images as soon as one of them has a negative prompt: diffusers' loop gives a
guider no way to pick images. The pictures are the same.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.guiders import BaseGuidance
from diffusers.guiders.guider_utils import GuiderOutput
from diffusers.modular_pipelines import (
    LoopSequentialPipelineBlocks,
    ModularPipeline,
    ModularPipelineBlocks,
    SequentialPipelineBlocks,
)
from diffusers.modular_pipelines.modular_pipeline import BlockState
from diffusers.modular_pipelines.modular_pipeline_utils import InputParam
from diffusers.modular_pipelines.stable_diffusion_xl.encoders import (
    StableDiffusionXLTextEncoderStep,
)
from diffusers.utils import logging
from torch import Tensor

from vldnp._finite import check_finite, is_finite, label, naming
from vldnp.core import guidance
from vldnp.core.methods import CFG, Method
from vldnp.core.negatives import Negative, SampleId
from vldnp.models.backbone import decoded, exact, to_pil
from vldnp.models.conditioning import AsWritten
from vldnp.models.families import SDXL, check_scheduler
from vldnp.models.run import scheduled_x0

Tell = Callable[[ModularPipeline, BlockState, list[str]], dict[str, Tensor]]


@contextmanager
def without_remarks() -> Iterator[None]:
    """Without what diffusers logs at every guider that is made, as that guiders are new."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


class VLDNPGuidance(BaseGuidance):
    """Classifier-free guidance and a method's negative term; needs a `Look` in the loop.

    Args:
        method: as for `vldnp.sample`; the default is plain CFG.
        guidance_scale: g.

    Attributes:
        negatives: the negative prompts in force, one per image.

    Raises:
        ValueError: a method that changes the prompts themselves (SAFREE), steers inside the network
            (NAG), has levers on, a correction, several negative prompts at a time or a look ahead,
            or a guidance scale that is no finite number.
    """

    _input_predictions = ["pred_cond", "pred_uncond", "pred_neg"]
    ignore_for_config = ["method"]

    @register_to_config
    def __init__(self, method: Method | None = None, guidance_scale: float = 7.5):
        with without_remarks():
            super().__init__()
        self.method = CFG() if method is None else method
        if not isinstance(self.method.conditioning, AsWritten):
            raise ValueError(
                f"{self.method.name!r} changes what the prompts are encoded to, which a guider "
                "cannot; use vldnp.sample"
            )
        policy = self.method.negatives
        if self.method.correction or hasattr(policy, "foreseen") or hasattr(policy, "categories"):
            raise ValueError(
                f"{self.method.name!r} needs several negative prompts at a time, or x̂₀ and the "
                "scheduler, which a guider has not; use vldnp.sample"
            )
        if hasattr(self.method.rule, "conditioning"):
            raise ValueError(
                f"{self.method.name!r} steers inside the network, which a guider cannot; use "
                "vldnp.sample"
            )
        if levers := self.method.levers():
            raise ValueError(f"a guider has no {', '.join(levers)}; use vldnp.sample")
        if not is_finite(guidance_scale):
            raise ValueError(f"guidance_scale must be a finite number, not {guidance_scale!r}")
        self.guidance_scale = guidance_scale
        self.negatives: list[Negative] = []
        self._told: dict[str, Tensor] | None = None
        self._only_negative = False

    def begin(self, images: Sequence[SampleId], num_inference_steps: int) -> None:
        """At the first step of a run."""
        self.negatives = self.method.negatives.initial(images)
        self._queries = self.method.negatives.query_steps_of(num_inference_steps)
        self._rule = guidance.rule(self.method.rule)
        self._state = None

    def is_query(self, i: int) -> bool:
        return i in self._queries

    def tell(self, told: dict[str, Tensor] | None) -> None:
        """What the denoiser is told for ε_n from now on; None where no image has a negative."""
        self._told = told

    @contextmanager
    def only_negative(self) -> Iterator[None]:
        """The next call of the denoiser adds ε_n to the ε_u and ε_c that it has just predicted."""
        self._only_negative = True
        try:
            yield
        finally:
            self._only_negative = False

    def _wanted(self) -> list[str]:
        """What is predicted in this call; where the VLM is asked, ε_n has to wait for it."""
        if self._only_negative:
            return ["pred_neg"]
        waits = not self._step or self.is_query(self._step)
        return self._input_predictions[: 2 if waits or self._told is None else 3]

    def prepare_inputs(self, data: dict[str, tuple[Tensor, Tensor]]) -> list[BlockState]:
        sources = {
            "pred_cond": (data, 0),
            "pred_uncond": (data, 1),
            "pred_neg": (data | (self._told or {}), 0),
        }
        return [self._prepare_batch(*sources[kind], kind) for kind in self._wanted()]

    def forward(
        self,
        pred_cond: Tensor | None = None,
        pred_uncond: Tensor | None = None,
        pred_neg: Tensor | None = None,
    ) -> GuiderOutput:
        """ε, as in `vldnp.core.sampler`, from predictions `[B, C, h, w]`."""
        if pred_cond is None:
            pred_cond, pred_uncond = self._before
        self._before = pred_cond, pred_uncond
        pred = guidance.cfg(pred_uncond, pred_cond, self.guidance_scale)
        if pred_neg is not None:
            rows = [row for row, n in enumerate(self.negatives) if n.prompt is not None]
            if self._state is None:
                precise = torch.promote_types(pred.dtype, torch.float32)
                self._state = torch.zeros_like(pred, dtype=precise)
            pred[rows], self._state[rows] = self._rule.step(
                pred_uncond[rows],
                pred_cond[rows],
                pred_neg[rows],
                self.guidance_scale,
                self.method.omega,
                self._state[rows],
                self._step / self._num_inference_steps,
            )
        return GuiderOutput(pred=pred, pred_cond=pred_cond, pred_uncond=pred_uncond)

    @property
    def is_conditional(self) -> bool:
        return self._count_prepared == 1

    @property
    def num_conditions(self) -> int:
        return len(self._wanted())


def told_sdxl(components: ModularPipeline, state: BlockState, texts: list[str]) -> dict:
    """What SDXL's denoiser is told of these prompts, by the names it has for it."""
    embeds, _, pooled, _ = StableDiffusionXLTextEncoderStep.encode_prompt(
        components,
        texts,
        device=components._execution_device,
        prepare_unconditional_embeds=False,
    )
    return {"prompt_embeds": embeds, "text_embeds": pooled, "time_ids": state.add_time_ids}


class Look(ModularPipelineBlocks):
    """Between the denoiser and the scheduler's step: look at x̂₀, renew the negative prompts.

    Args:
        denoiser: the loop's own, which is called once more where ε_n had to wait.
        tell: what the denoiser is told of the negative prompts.
    """

    model_name = "stable-diffusion-xl"

    def __init__(self, denoiser: ModularPipelineBlocks, tell: Tell = told_sdxl):
        super().__init__()
        self.denoiser, self.tell = denoiser, tell

    @property
    def description(self) -> str:
        return "Shows the predicted pictures to a VLM and renews the negative prompts"

    @property
    def inputs(self) -> list[InputParam]:
        return [
            InputParam("latents", required=True),
            InputParam("prompt"),
            InputParam("num_images_per_prompt", default=1),
        ]

    def __call__(self, components: ModularPipeline, state: BlockState, i: int, t: Tensor):
        images = enumerate(_identities(state))
        labels = [label(row, image.prompt, image.seed) for row, image in images]
        with naming(labels, f"at step {i}"):
            components, state = self._look(components, state, i, t)
            check_finite({"the prediction": state.noise_pred})
        return components, state

    @torch.no_grad()
    def _look(self, components: ModularPipeline, state: BlockState, i: int, t: Tensor):
        guider = components.guider
        if i == 0:
            check_scheduler(components.scheduler, SDXL)
            guider.begin(_identities(state), state.num_inference_steps)
        if guider.is_query(i):
            x0 = scheduled_x0(components.scheduler, state.noise_pred, t, state.latents)
            with exact(components.vae):
                pictures = to_pil(decoded(components.vae, x0))
            before = [negative.at(i) for negative in guider.negatives]
            guider.negatives = guider.method.negatives.updated(pictures, before)
        if i == 0 or guider.is_query(i):
            prompts = [negative.prompt for negative in guider.negatives]
            any_is = any(prompt is not None for prompt in prompts)
            texts = [prompt or "" for prompt in prompts]
            guider.tell(self.tell(components, state, texts) if any_is else None)
            if any_is:
                with guider.only_negative():
                    components, state = self.denoiser(components, state, i=i, t=t)
        return components, state


def looking(blocks: SequentialPipelineBlocks, tell: Tell = told_sdxl) -> SequentialPipelineBlocks:
    """A workflow's blocks with a `Look` in their denoising loop.

    Args:
        blocks: of one workflow, as `StableDiffusionXLAutoBlocks().get_workflow("text2image")`.
        tell: see `Look`.

    Raises:
        ValueError: there is no denoising loop in them.
    """
    for block in blocks.sub_blocks.values():
        if isinstance(block, LoopSequentialPipelineBlocks) and "denoiser" in block.sub_blocks:
            after = list(block.sub_blocks).index("denoiser") + 1
            look = Look(block.sub_blocks["denoiser"], tell)
            block.sub_blocks.insert("look", look, after)
            return blocks
    raise ValueError(
        f"{type(blocks).__name__} has no denoising loop with a block named denoiser; pass the "
        "blocks of one workflow, as blocks.get_workflow('text2image')"
    )


def _identities(state: BlockState) -> list[SampleId]:
    """The images in their order; generators have no seed to tell."""
    prompts = [state.prompt] if isinstance(state.prompt, str) else list(state.prompt)
    return [SampleId(p, None) for p in prompts for _ in range(state.num_images_per_prompt)]
