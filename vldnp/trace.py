"""What happened at each denoising step, and what came out."""

from dataclasses import dataclass

import numpy as np
import pandas as pd
from PIL import Image
from torch import Tensor

from vldnp.methods import Method


@dataclass(frozen=True)
class Step:
    """What happened at one denoising step, for a batch of B images.

    Attributes:
        index: i = 0 … N−1.
        timestep: the scheduler's t.
        latents: x_{t−1}, `[B, C, h, w]`; after the last step the clean latents. None in a trace.
        x0: x̂₀ from ε_cfg at this step, `[B, C, h, w]` float32. None in a trace.
        x0_images: x̂₀ decoded (PIL, RGB), as the VLM sees it, one per image; None where it was not
            decoded, and for an image whose own was not (see `levers.Gate`).
        queried: whether the VLM was asked at this step, about any image; `vlm_calls` says which.
        vlm_answers: its words, verbatim up to 4,000 characters, one per image; None where it was
            not asked. An image that it failed to answer or was not asked about has None, and with
            a `lag` every image until the answers are in force, in a later step.
        vlm_failures: why it failed to answer, one per image; None for an image that it answered
            about, and where it was not asked. What was done then is the method's `on_failure`.
        concepts: the concepts in each image's negative prompt.
        negative_prompts: the negative prompt in force in this step; None for an image without.
            Where ω(t) is 0, one in force does nothing.
        model_evaluations: U-Net evaluations spent on each image: 2, or 1 where Adaptive Guidance
            drops ε_u, and one more each for a negative prompt (unless ε_n − ε_u is used again)
            and for SAFREE's re-attention.
        vlm_calls: 1 for an image that the VLM was asked about, else 0.
        x0_decodes: 1 per image where x̂₀ was decoded, else 0.
    """

    index: int
    timestep: float
    latents: Tensor | None
    x0: Tensor | None
    x0_images: list[Image.Image] | None
    queried: bool
    vlm_answers: list[str | None] | None
    vlm_failures: list[str | None] | None
    concepts: list[tuple[str, ...]]
    negative_prompts: list[str | None]
    model_evaluations: list[int]
    vlm_calls: list[int]
    x0_decodes: list[int]

    def asked(self, image: int) -> bool:
        """Whether the VLM was asked about this image."""
        return self.queried and bool(self.vlm_calls[image])

    def picture(self, image: int) -> Image.Image | None:
        """This image's x̂₀; None where it was not decoded."""
        return self.x0_images[image] if self.x0_images else None


@dataclass(frozen=True)
class Trace:
    """The steps of a run without their tensors, and what was asked for.

    Attributes:
        prompts: one per image.
        seeds: one per image; None for images whose `generator` the caller passed.
        steps: one `Step` per denoising step.
    """

    prompts: list[str]
    seeds: list[int | None]
    steps: list[Step]

    @property
    def model_evaluations(self) -> list[int]:
        """U-Net evaluations of each image over all steps."""
        return self._total("model_evaluations")

    @property
    def vlm_calls(self) -> list[int]:
        """How often the VLM looked at each image."""
        return self._total("vlm_calls")

    @property
    def x0_decodes(self) -> list[int]:
        """How often x̂₀ of each image was decoded."""
        return self._total("x0_decodes")

    def _total(self, count: str) -> list[int]:
        return [
            sum(counts) for counts in zip(*(getattr(s, count) for s in self.steps), strict=True)
        ]

    def to_frame(self) -> pd.DataFrame:
        """One row per image × step."""
        rows = [
            {
                "image": image,
                "prompt": prompt,
                "seed": self.seeds[image],
                "step": step.index,
                "timestep": step.timestep,
                "queried": step.asked(image),
                "vlm_answer": step.vlm_answers[image] if step.vlm_answers else None,
                "vlm_failure": step.vlm_failures[image] if step.vlm_failures else None,
                "concepts": ", ".join(step.concepts[image]),
                "negative_prompt": step.negative_prompts[image],
                "model_evaluations": step.model_evaluations[image],
                "vlm_calls": step.vlm_calls[image],
                "x0_decodes": step.x0_decodes[image],
            }
            for image, prompt in enumerate(self.prompts)
            for step in self.steps
        ]
        return pd.DataFrame(rows)


@dataclass(frozen=True)
class Output:
    """Images and how they came about.

    Attributes:
        images: by `output_type`: `pil` a list of RGB pictures, `pt` `[B, 3, H, W]` in 0..1,
            `np` `[B, H, W, 3]` in 0..1, `latent` the clean latents.
        trace: what happened at each step.
        latents: the clean latents, `[B, C, h, w]`, on the CPU.
        method: what made them.
    """

    images: list[Image.Image] | Tensor | np.ndarray
    trace: Trace
    latents: Tensor
    method: Method
