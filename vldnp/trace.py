"""What happened at each denoising step, and what came out."""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import pandas as pd
from PIL import Image
from torch import Tensor

from vldnp.guider import Branches, View
from vldnp.methods import Method
from vldnp.negatives import Negative


@dataclass(frozen=True)
class Step:
    """What happened at one denoising step, for a batch of B images; a list has one entry per image.

    Attributes:
        index: i = 0 … N−1.
        timestep: the scheduler's t.
        latents: x_{t−1}, `[B, C, h, w]`; after the last step the clean latents. None in a trace.
        x0: x̂₀ from ε_cfg, `[B, C, h, w]` float32. None in a trace.
        x0_images: x̂₀ decoded (PIL, RGB), as the VLM saw it; None where it was not decoded.
        queried: whether the VLM was queried about any image.
        vlm_answers: its words; None for an image without an answer, or where nothing was queried.
        vlm_failures: why an answer is missing or was not understood.
        concepts: the terms in each negative prompt.
        negative_prompts: in force in this step; None for an image without.
        model_evaluations: evaluations of the network: one for each of ε_u, ε_c and ε_n, and one
            for the extra row of SAFREE's re-attention and of NAG.
        vlm_calls, x0_decodes: 1 where the VLM was queried and where x̂₀ was decoded, else 0.
    """

    index: int
    timestep: float
    latents: Tensor | None
    x0: Tensor | None
    x0_images: list[Image.Image | None] | None
    queried: bool
    vlm_answers: list[str | None] | None
    vlm_failures: list[str | None] | None
    concepts: list[tuple[str, ...]]
    negative_prompts: list[str | None]
    model_evaluations: list[int]
    vlm_calls: list[int]
    x0_decodes: list[int]

    def x0_image(self, image: int) -> Image.Image | None:
        """This image's x̂₀; None where it was not decoded."""
        return self.x0_images[image] if self.x0_images else None


def record(
    view: View, t: float, latents: Tensor, branches: Branches, before: Sequence[Negative]
) -> Step:
    """The `Step` of a view's step, from the branches evaluated and the negatives before it."""
    own, negatives = view.guider, view.guider.negatives
    calls = [int(new is not old) for new, old in zip(negatives, before, strict=True)]
    evaluations = [0] * len(negatives)
    for rows, conditioning in branches.values():
        for row in (*rows, *(rows[k] for k in conditioning.has_auxiliary)):
            evaluations[row] += 1
    asked = [n if called else Negative() for n, called in zip(negatives, calls, strict=True)]
    return Step(
        index=view.index,
        timestep=t,
        latents=latents,
        x0=view.x0,
        x0_images=[view.decoded.get(row) for row in own.images] if view.decoded else None,
        queried=any(calls),
        vlm_answers=[n.answer for n in asked] if any(calls) else None,
        vlm_failures=[n.failure for n in asked] if any(calls) else None,
        concepts=[n.concepts for n in negatives],
        negative_prompts=[n.prompt for n in negatives],
        model_evaluations=evaluations,
        vlm_calls=calls,
        x0_decodes=[int(row in view.decoded) for row in own.images],
    )


def joined(parts: Sequence[Step]) -> Step:
    """The same step of several batches as one step of all their images."""

    def column(name: str) -> object:
        values = [getattr(part, name) for part in parts]
        if not any(isinstance(value, list) for value in values):
            return values[0]
        nothing = [[None] * len(part.concepts) for part in parts]
        return sum((v or n for v, n in zip(values, nothing, strict=True)), start=[])

    together = {field.name: column(field.name) for field in fields(Step)}
    return Step(**together | {"queried": any(part.queried for part in parts)})


@dataclass(frozen=True)
class Trace:
    """The steps of a run without their tensors."""

    prompts: list[str]  # one per image
    seeds: list[int | None]  # None for images whose `generator` the caller passed
    steps: list[Step]  # one per denoising step

    @property
    def model_evaluations(self) -> list[int]:
        """Evaluations of the network for each image over all steps."""
        return self._total("model_evaluations")

    @property
    def vlm_calls(self) -> list[int]:
        """How often the VLM was queried about each image."""
        return self._total("vlm_calls")

    @property
    def x0_decodes(self) -> list[int]:
        """How often x̂₀ of each image was decoded."""
        return self._total("x0_decodes")

    def _total(self, count: str) -> list[int]:
        return np.sum([getattr(step, count) for step in self.steps], axis=0).tolist()

    def to_frame(self) -> pd.DataFrame:
        """One row per image × step."""
        rows = [
            {
                "image": image,
                "prompt": prompt,
                "seed": self.seeds[image],
                "step": step.index,
                "timestep": step.timestep,
                "queried": bool(step.vlm_calls[image]),
                "vlm_answer": step.vlm_answers[image] if step.vlm_answers else None,
                "vlm_failure": step.vlm_failures[image] if step.vlm_failures else None,
                "concepts": ", ".join(step.concepts[image]),
                "negative_prompt": step.negative_prompts[image],
                "model_evaluations": step.model_evaluations[image],
            }
            for image, prompt in enumerate(self.prompts)
            for step in self.steps
        ]
        return pd.DataFrame(rows)


@dataclass(frozen=True)
class Output:
    """Images and how they were generated.

    Attributes:
        images: by `output_type`: `pil` a list of RGB images, `pt` `[B, 3, H, W]` in 0..1,
            `np` `[B, H, W, 3]` in 0..1, `latent` the clean latents.
        trace: what happened at each step.
        latents: the clean latents, `[B, C, h, w]`, on the CPU.
        method: what generated them.
    """

    images: list[Image.Image] | Tensor | np.ndarray
    trace: Trace
    latents: Tensor
    method: Method
