"""Trajectories as figures, for where no slider works: a row per output, or a contact sheet."""

import textwrap
from collections.abc import Sequence

from matplotlib.figure import Figure
from PIL import Image

from vldnp.models.judges import Judge
from vldnp.show import blur
from vldnp.show.picture_grid import image_grid
from vldnp.show.trajectory_data import (
    Outputs,
    caption_lines,
    final_picture,
    shortened,
    step_count,
    with_labels,
)
from vldnp.trace import Output, Step


def side_by_side(
    outputs: Outputs,
    image: int = 0,
    moments: int = 6,
    *,
    judge: Judge | None = None,
    reveal: bool = False,
) -> Figure:
    """The viewer's pictures where no slider works: a row per output, a column per moment.

    Args:
        outputs, image, judge, reveal: as in `view`; every output with decoded x̂₀.
        moments: so many of the steps at which all outputs have an x̂₀, evenly chosen, those at
            which a VLM was asked first; the final image comes last.

    Raises:
        ValueError: as `view`, or there is no step at which all have an x̂₀.
    """
    labelled = with_labels(outputs)
    num_steps = step_count(labelled, image)
    traces = [output.trace.steps for _, output in labelled]
    common = [i for i in range(num_steps) if all(steps[i].picture(image) for steps in traces)]
    asked = [i for i in common if any(steps[i].asked(image) for steps in traces)]
    chosen = asked or common
    if not chosen:
        raise ValueError("no x̂₀ was decoded in all outputs; sample with x0_every=True")
    count = min(moments, len(chosen))
    spread = [round(k * (len(chosen) - 1) / max(count - 1, 1)) for k in range(count)]
    places = [chosen[k] for k in spread]
    rows, why = {}, {}
    for label, output in labelled:
        final = final_picture(output, image)
        pictures = [output.trace.steps[i].x0_images[image] for i in places]
        rows[label] = pictures + ([final] if final else [])
        why[label] = _reasons(judge, rows[label], reveal)
    return image_grid(rows, [f"step {i}" for i in places] + ["final image"], reasons=why)


def contact_sheet(
    output: Output,
    image: int = 0,
    columns: int = 4,
    *,
    queries_only: bool = False,
    judge: Judge | None = None,
    reveal: bool = False,
) -> Figure:
    """A picture for each x̂₀ that was decoded, with the VLM's words and the negative prompt.

    Args:
        output: with at least one decoded x̂₀ (query steps, or `x0_every=True`).
        image: which image of the output.
        columns: pictures in a row.
        queries_only: leave out the x̂₀ at which the VLM was not asked.
        judge: what it flags is blurred, unless `reveal`.
        reveal: show everything as it is.

    Raises:
        ValueError: no such image, or no x̂₀ to show.
    """
    step_count([("", output)], image)
    seen = [step for step in output.trace.steps if step.picture(image) is not None]
    if queries_only:
        seen = [step for step in seen if step.asked(image)]
        if not seen:
            raise ValueError(f"the VLM was never asked: {output.method.name} has no query steps")
    if not seen:
        raise ValueError("no x̂₀ was decoded in this output; sample with x0_every=True")
    final = final_picture(output, image)
    pictures = [step.x0_images[image] for step in seen] + ([final] if final else [])
    captions = [_caption(step, image) for step in seen] + ["final image"]
    columns = min(columns, len(pictures))
    reasons = _reasons(judge, pictures, reveal)
    starts = range(0, len(pictures), columns)
    return image_grid(
        {" " * start: pictures[start : start + columns] for start in starts},
        captions,
        2.2,
        {" " * start: reasons[start : start + columns] for start in starts},
        heading=shortened(output.trace.prompts[image]),
        between=0.6,
        fontsize=10,
        loc="left",
    )


def _caption(step: Step, image: int) -> str:
    return "\n".join(
        line
        for text in caption_lines(step, step, image)
        for line in textwrap.wrap(text, 26, max_lines=4, placeholder=" …")
    )


def _reasons(
    judge: Judge | None, pictures: Sequence[Image.Image], reveal: bool
) -> list[str | None]:
    return blur.reasons(judge, pictures, reveal) if judge else [None] * len(pictures)
