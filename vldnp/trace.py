"""What happened at each denoising step, and what came out."""

import base64
import html
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import torch
from PIL import Image
from torch import Tensor

from vldnp.guider import Branches, View
from vldnp.methods import Method
from vldnp.models.backbone import to_pil
from vldnp.negatives import Negative


@dataclass(frozen=True)
class Step:
    """What happened at one denoising step, for a batch of B images; lists have an entry for each.
    Network evaluations are those of ε_u, ε_c and ε_n, and of the extra row of SAFREE's re-attention
    and of NAG. Tensors are None in a trace."""

    index: int  # i = 0 … N−1
    timestep: float  # the scheduler's t
    latents: Tensor | None  # x_{t−1}, `[B, C, h, w]`; after the last step the clean latents
    x0: Tensor | None  # x̂₀ from ε_cfg, `[B, C, h, w]`, float32
    x0_images: list[Image.Image | None]  # x̂₀ decoded (RGB), where it was decoded
    vlm_answers: list[str | None]  # verbatim; None where there is none
    vlm_failures: list[str | None]  # why an answer is missing or was not understood
    concepts: list[tuple[str, ...]]  # the terms in each negative prompt
    negative_prompts: list[str | None]  # in force in this step; None for an image without
    model_evaluations: list[int]
    vlm_calls: list[int]  # 1 where the VLM was queried
    x0_decodes: list[int]  # 1 where x̂₀ was decoded

    @property
    def queried(self) -> bool:
        """Whether the VLM was queried about any image."""
        return any(self.vlm_calls)


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
    images = to_pil(torch.stack([*view.decoded.values()])) if view.decoded else []  # one transfer
    shown = dict(zip(view.decoded, images, strict=True))
    return Step(
        index=view.index,
        timestep=t,
        latents=latents,
        x0=view.x0,
        x0_images=[shown.get(row) for row in own.images],
        vlm_answers=[n.answer for n in asked],
        vlm_failures=[n.failure for n in asked],
        concepts=[n.concepts for n in negatives],
        negative_prompts=[n.prompt for n in negatives],
        model_evaluations=evaluations,
        vlm_calls=calls,
        x0_decodes=[int(row in view.decoded) for row in own.images],
    )


def joined(parts: Sequence[Step]) -> Step:
    """The same step of several batches as one step of all their images."""
    lists = [name for name, value in vars(parts[0]).items() if isinstance(value, list)]
    return replace(parts[0], **{n: sum((getattr(p, n) for p in parts), start=[]) for n in lists})


def _total(count: str) -> property:
    return property(lambda own: np.sum([getattr(s, count) for s in own.steps], axis=0).tolist())


@dataclass(frozen=True, repr=False)
class Trace:
    """The steps of a run without their tensors, and of each image the totals of a step's counts."""

    prompts: list[str]  # one per image
    seeds: list[int | None]  # None for images whose `generator` the caller passed
    steps: list[Step]  # one per denoising step

    model_evaluations = _total("model_evaluations")
    vlm_calls = _total("vlm_calls")
    x0_decodes = _total("x0_decodes")

    def to_frame(self) -> pd.DataFrame:
        """One row per image × step, sorted by both."""
        parts, about = [], {"prompt": self.prompts, "seed": self.seeds}
        for step in self.steps:
            part = pd.DataFrame(about | {"step": step.index, "timestep": step.timestep})
            part["queried"] = pd.Series(step.vlm_calls, dtype=bool)
            part["vlm_answer"], part["vlm_failure"] = step.vlm_answers, step.vlm_failures
            part["concepts"] = list(map(", ".join, step.concepts))
            part["negative_prompt"] = step.negative_prompts
            part["model_evaluations"] = step.model_evaluations
            parts.append(part.rename_axis("image").reset_index())
        return pd.concat(parts).sort_values(["image", "step"], ignore_index=True)


@dataclass(frozen=True, repr=False)
class Output:
    """Images and how they were generated. By `output_type`, `images` are RGB images (`pil`), values
    in 0..1 as `[B, 3, H, W]` (`pt`) or `[B, H, W, 3]` (`np`), or the clean latents (`latent`)."""

    images: list[Image.Image] | Tensor | np.ndarray
    trace: Trace
    latents: Tensor  # the clean ones, `[B, C, h, w]`, on the CPU
    method: Method

    def __repr__(self) -> str:
        said = f"{len(self.trace.prompts)} images by {self.method.name}, ω = {self.method.omega}"
        return f"<{said}, {len(self.trace.steps)} steps; vldnp.view shows them>"

    def _repr_html_(self) -> str | None:
        """PIL images in a row, each with its last negative prompt; None for other images."""
        if not isinstance(self.images, list):
            return None
        cells = []
        for image, words in zip(self.images, self.trace.steps[-1].negative_prompts, strict=True):
            image = image.copy()
            image.thumbnail((192, 192))
            source = f"data:image/png;base64,{base64.b64encode(image._repr_png_()).decode()}"
            below = f"negative prompt: {html.escape(words or 'none')}"
            cells.append(f'<td style="max-width: 192px"><img src="{source}"><br>{below}</td>')
        return f"<table><tr>{''.join(cells)}</tr></table>{html.escape(repr(self))}"
