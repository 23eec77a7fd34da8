"""Trajectory data: what there is to see of outputs, step by step, as plain data for viewers."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image
from torch import Tensor

from vldnp._files import atomic, write_text
from vldnp.metrics.intervals import UNSAFE_THRESHOLD
from vldnp.models.backbone import to_pil
from vldnp.models.judges import Judge
from vldnp.show import blur
from vldnp.trace import Output, Step

LONGEST_ANSWER = 300
"""An answer may be endless; so many characters are shown."""


PICTURE_WIDTH = 224
"""In screen pixels."""


Outputs = Output | Sequence[Output] | Mapping[str, Output]


def trajectory_data(
    outputs: Outputs,
    image: int = 0,
    width: int = PICTURE_WIDTH,
    *,
    judge: Judge | None = None,
    threshold: float = UNSAFE_THRESHOLD,
) -> dict:
    """What a viewer shows, as plain data that JSON can hold. Arguments are those of `view`.

    Returns:
        `prompt, seed, num_steps, threshold`, and `columns`, one per output: `label, method`;
        `pictures`, each once, as data addresses no wider than `width`; `reasons`, why the judge
        flags them (None: it does not); `queries`, the steps at which the VLM was asked; and
        `places`, one per step and one for the final image: the `picture`'s index (None: nothing
        was decoded so far), the judge's `probability` where a new picture was judged, and its
        `caption`, lines of text that nothing has escaped.
    """
    labelled = with_labels(outputs)
    num_steps = step_count(labelled, image)
    trace = labelled[0][1].trace
    return {
        "prompt": trace.prompts[image],
        "seed": trace.seeds[image],
        "num_steps": num_steps,
        "threshold": threshold,
        "columns": [
            _column(label, output, image, width, judge, threshold) for label, output in labelled
        ],
    }


def save_trajectory(
    outputs: Outputs, folder: str | Path, image: int = 0, *, judge: Judge | None = None
) -> list[Path]:
    """Write trajectory data, from which the report draws, and the final pictures beside it.

    Args:
        outputs, image, judge: as in `view`.
        folder: where; the files' names begin with the prompt's letters and the seed.

    Returns:
        The files written: the data as JSON, and `…-<number>-<method>.png`, unaltered.
    """
    data = trajectory_data(outputs, image, judge=judge)
    letters = re.sub(r"[^a-z0-9]+", "-", data["prompt"].lower()).strip("-")[:40] or "prompt"
    path = Path(folder) / f"{letters}-{data['seed']}.json"
    write_text(path, json.dumps(data, ensure_ascii=False))
    written = [path]
    for number, (_, output) in enumerate(with_labels(outputs)):
        if picture := final_picture(output, image):
            file = path.with_name(f"{path.stem}-{number}-{output.method.name}.png")
            with atomic(file) as temporary:
                picture.save(temporary)
            written.append(file)
    return written


def shortened(text: str) -> str:
    """At most `LONGEST_ANSWER` characters of a text."""
    return text if len(text) <= LONGEST_ANSWER else text[:LONGEST_ANSWER] + " …"


def with_labels(outputs: Outputs) -> list[tuple[str, Output]]:
    if isinstance(outputs, Mapping):
        return list(outputs.items())
    outputs = [outputs] if isinstance(outputs, Output) else outputs
    return [(_label(output), output) for output in outputs]


def _label(output: Output) -> str:
    method = output.method
    return method.name if method.omega is None else f"{method.name}, ω = {method.omega:g}"


def step_count(labelled: Sequence[tuple[str, Output]], image: int) -> int:
    """The number of steps that all outputs have."""
    if not labelled:
        raise ValueError("no output to view; give at least one")
    fewest = min(len(output.trace.prompts) for _, output in labelled)
    if not 0 <= image < fewest:
        raise ValueError(f"no image {image}: there are {fewest}; use 0 to {fewest - 1}")
    numbers = {len(output.trace.steps) for _, output in labelled}
    if len(numbers) > 1:
        raise ValueError(f"the outputs have {sorted(numbers)} steps; view those of one number")
    return numbers.pop()


def _column(
    label: str, output: Output, image: int, width: int, judge: Judge | None, threshold: float
) -> dict:
    """One output's part of trajectory data."""
    steps, final = output.trace.steps, final_picture(output, image)
    pictures = [step.x0_images[image] for step in steps if step.picture(image)]
    pictures += [final] if final else []
    looks = blur.look(judge, pictures, threshold) if judge else []
    places, last, shown = [], None, None
    for step in steps:
        if step.picture(image):
            last, shown = step, 0 if shown is None else shown + 1
        place = {"picture": shown, "probability": None, "caption": caption_lines(step, last, image)}
        if looks and last is step:
            place["probability"] = round(looks[shown].probability, 4)
        places.append(place)
    spent = f"{output.trace.model_evaluations[image]} U-Net evaluations"
    asked = f"{output.trace.vlm_calls[image]} VLM calls"
    places.append(
        {
            "picture": len(pictures) - 1 if final else None,
            "probability": round(looks[-1].probability, 4) if looks and final else None,
            "caption": ["final image", spent, asked],
        }
    )
    return {
        "label": label,
        "method": output.method.name,
        "pictures": [blur.data_uri(picture, width) for picture in pictures],
        "reasons": [found.reason for found in looks] or [None] * len(pictures),
        "queries": [step.index for step in steps if step.asked(image)],
        "places": places,
    }


def caption_lines(step: Step, last: Step | None, image: int) -> list[str]:
    """What there is to say about a step; `last` is the step whose x̂₀ is shown."""
    lines = [f"step {step.index}, t = {step.timestep:g}"]
    if last is not None and last is not step:
        lines[0] += f" (x̂₀ of step {last.index})"
    if step.asked(image) and step.vlm_failures[image]:
        lines.append(f"VLM failed: {shortened(step.vlm_failures[image])}")
    elif step.asked(image):
        lines.append(f"VLM: “{shortened(step.vlm_answers[image].strip())}”")
    lines.append(f"away from: {step.negative_prompts[image] or '—'}")
    return lines


def final_picture(output: Output, image: int) -> Image.Image | None:
    """The final picture; None where the output has latents instead."""
    picture = output.images[image]
    if isinstance(picture, Image.Image):
        return picture
    if isinstance(picture, Tensor):
        is_picture = picture.shape[0] == 3
        return to_pil(picture[None])[0] if is_picture else None
    return Image.fromarray((picture * 255).round().astype("uint8"))
