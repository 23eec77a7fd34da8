"""The trajectory viewer: what the VLM saw and said, and what the image was steered away from."""

import html
import io
import textwrap
from collections.abc import Mapping, Sequence
from itertools import accumulate

import ipywidgets as widgets
import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from vldnp.backbone import to_pil
from vldnp.sampler import Output, Step

LONGEST_ANSWER = 300
"""An answer may be endless; so many characters are shown."""

Outputs = Output | Sequence[Output] | Mapping[str, Output]


def view(outputs: Outputs, image: int = 0, width: int = 224, interval: int = 500) -> widgets.Widget:
    """Step through one or several trajectories, side by side under one slider.

    Each step shows x̂₀ (where it was decoded: at every step with `x0_every=True`, else as last
    seen), the VLM's words and the negative prompt in force; the last place is the final image.
    Everything lies in the widget's state, so it also moves in a saved notebook, without a kernel.

    Args:
        outputs: an `Output`, several, or label → `Output`; all with the same number of steps.
        image: which image of each output.
        width: of a picture, in screen pixels.
        interval: of the play button, in milliseconds.

    Raises:
        ValueError: no output, different numbers of steps, or no such image.
    """
    labelled = _labelled(outputs)
    num_steps = _num_steps(labelled, image)
    columns = [_column(label, output, image, width) for label, output in labelled]
    shared = widgets.Layout()  # one for all places, because each would be stored in the notebook
    stack = widgets.Stack([widgets.HBox(row, layout=shared) for row in zip(*columns, strict=True)])
    stack.selected_index = 0
    play = widgets.Play(min=0, max=num_steps, interval=interval)
    slider = widgets.IntSlider(
        min=0, max=num_steps, description="step", layout=widgets.Layout(width="24em")
    )
    widgets.jslink((play, "value"), (slider, "value"))
    widgets.jslink((slider, "value"), (stack, "selected_index"))
    return widgets.VBox([widgets.HBox([play, slider]), stack])


def contact_sheet(
    output: Output, image: int = 0, columns: int = 6, *, queries_only: bool = False
) -> Figure:
    """A picture for each x̂₀ that was decoded, with the VLM's words and the negative prompt.

    Args:
        output: with at least one decoded x̂₀ (query steps, or `x0_every=True`).
        image: which image of the output.
        columns: pictures in a row.
        queries_only: leave out the x̂₀ at which the VLM was not asked.

    Raises:
        ValueError: no such image, or no x̂₀ to show.
    """
    _num_steps([("", output)], image)
    seen = [step for step in output.trace.steps if step.x0_images is not None]
    if queries_only:
        seen = [step for step in seen if step.queried]
        if not seen:
            raise ValueError(f"the VLM was never asked: {output.method.name} has no query steps")
    if not seen:
        raise ValueError("no x̂₀ was decoded in this output; sample with x0_every=True")
    final = _final(output, image)
    count = len(seen) + (final is not None)
    columns = min(columns, count)
    rows = -(-count // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(2.4 * columns, 3.2 * rows), squeeze=False, layout="constrained"
    )
    plt.close(figure)  # a notebook would show it twice
    for axis in axes.flat:
        axis.set_axis_off()
    for axis, step in zip(axes.flat, seen, strict=False):
        axis.imshow(step.x0_images[image])
        # An answer is text, not mathematics: a lone $ must not break the figure.
        axis.set_title(_caption(step, image), fontsize=8, loc="left", parse_math=False)
    if final is not None:
        axis = axes.flat[len(seen)]
        axis.imshow(final)
        axis.set_title("final image", fontsize=8, loc="left")
    figure.suptitle(_shortened(output.trace.prompts[image]), fontsize=10, parse_math=False)
    return figure


def _labelled(outputs: Outputs) -> list[tuple[str, Output]]:
    if isinstance(outputs, Mapping):
        return list(outputs.items())
    outputs = [outputs] if isinstance(outputs, Output) else outputs
    return [(_label(output), output) for output in outputs]


def _label(output: Output) -> str:
    method = output.method
    return method.name if method.omega is None else f"{method.name}, ω = {method.omega:g}"


def _num_steps(labelled: Sequence[tuple[str, Output]], image: int) -> int:
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


def _column(label: str, output: Output, image: int, width: int) -> list[widgets.Widget]:
    """One widget for each step, and one for the final image."""
    steps = output.trace.steps
    seen = list(accumulate(steps, lambda last, step: step if step.x0_images else last))
    layout = widgets.Layout(width=f"{width + 16}px", padding="4px")
    style = widgets.HTML().style

    def text(value: str) -> widgets.HTML:
        return widgets.HTML(value, layout=layout, style=style)

    # Widgets that come again are shared between the places, which keeps a saved notebook small.
    head = text(f"{_html('b', label)}<br>{_html('i', output.trace.prompts[image])}")
    blank = text("<i>x̂₀ was not decoded</i>")
    size = widgets.Layout(width=f"{width}px")
    pictures = {
        step.index: _picture(step.x0_images[image], width, size) for step in steps if step.x0_images
    }
    places = [
        (pictures.get(last.index, blank), text(_html("div", *_told(step, last, image))))
        for step, last in zip(steps, seen, strict=True)
    ]
    final = _final(output, image)
    spent = f"{output.trace.model_evaluations[image]} U-Net evaluations"
    asked = f"{output.trace.vlm_calls[image]} VLM calls"
    places.append(
        (
            blank if final is None else _picture(final, width, size),
            text(_html("div", "final image", spent, asked)),
        )
    )
    return [widgets.VBox([head, *place], layout=layout) for place in places]


def _told(step: Step, last: Step, image: int) -> list[str]:
    """What there is to say about a step; `last` is the step whose x̂₀ is shown."""
    lines = [f"step {step.index}, t = {step.timestep:g}"]
    if last.x0_images and last.index != step.index:
        lines.append(f"(x̂₀ of step {last.index})")
    if step.queried and step.vlm_failures[image]:
        lines.append(f"VLM failed: {_shortened(step.vlm_failures[image])}")
    elif step.queried:
        lines.append(f"VLM: “{_shortened(step.vlm_answers[image])}”")
    lines.append(f"away from: {step.negative_prompts[image] or '—'}")
    return lines


def _caption(step: Step, image: int) -> str:
    return "\n".join(
        line
        for told in _told(step, step, image)
        for line in textwrap.wrap(told, 30, max_lines=4, placeholder=" …")
    )


def _shortened(text: str) -> str:
    return text if len(text) <= LONGEST_ANSWER else text[:LONGEST_ANSWER] + " …"


def _html(tag: str, *lines: str) -> str:
    """Lines of text as HTML. Everything is escaped: prompts and answers may hold markup."""
    return f"<{tag}>{'<br>'.join(html.escape(line) for line in lines)}</{tag}>"


def _picture(picture: Image.Image, width: int, layout: widgets.Layout) -> widgets.Image:
    if picture.width > width:
        picture = picture.resize((width, round(picture.height * width / picture.width)))
    data = io.BytesIO()
    picture.save(data, "PNG", optimize=True)
    return widgets.Image(value=data.getvalue(), layout=layout)


def _final(output: Output, image: int) -> Image.Image | None:
    """The final picture; None where the output has latents instead."""
    picture = output.images[image]
    if isinstance(picture, Image.Image):
        return picture
    if isinstance(picture, Tensor):
        is_picture = picture.shape[0] == 3
        return to_pil(picture[None])[0] if is_picture else None
    return Image.fromarray((picture * 255).round().astype("uint8"))
