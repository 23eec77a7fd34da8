"""The trajectory viewer: what the VLM saw and said, and what the image was steered away from.

It is HTML without widgets, so that it works without a kernel, in an exported page too. Where a
notebook is not trusted, JupyterLab takes scripts away; the steps then lie in a row that scrolls.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from IPython.display import HTML
from markupsafe import Markup
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from vldnp._files import write_text
from vldnp.metrics.intervals import UNSAFE_THRESHOLD
from vldnp.models.backbone import to_pil
from vldnp.models.judges import Judge
from vldnp.show import figures
from vldnp.show.images import image_grid, image_html, judged, reasons, templates
from vldnp.trace import Output, Step

Outputs = Output | Sequence[Output] | Mapping[str, Output]
SLIDER_WIDTH, INSET = 440, 8  # screen pixels; the slider's ends lie INSET within its width


class Viewer(HTML):
    """A page that a notebook shows and `save` writes."""

    def save(self, path: str | Path) -> Path:
        """Write it as a page of its own; returns the path."""
        page = f'<!doctype html><meta charset="utf-8"><title>Trajectories</title>{self.data}'
        write_text(path, page)
        return Path(path)


def view(
    outputs: Outputs,
    image: int = 0,
    width: int = 224,
    interval: int = 500,
    *,
    judge: Judge | None = None,
    reveal: bool = False,
    threshold: float = UNSAFE_THRESHOLD,
) -> Viewer:
    """Step through one or several trajectories, side by side under one slider.

    Each step shows x̂₀ (where it was decoded: at every step with `x0_every=True`, else as last
    seen), the VLM's answer and the negative prompt in force; the last one is the final image.
    Under the slider are the judge's probabilities, and a mark at each query.

    Args:
        outputs: an `Output`, several, or label → `Output`; all with the same number of steps.
        image: which image of each output.
        width: of an image, in screen pixels.
        interval: of the play button, in milliseconds.
        judge: judges every image; without one there is no line, and nothing is blurred.
        reveal: show what the judge flags unblurred.
        threshold: an image is flagged from this probability on.

    Raises:
        ValueError: no output, different numbers of steps, or no such image.
    """
    labelled = labels(outputs)
    N, trace = step_count(labelled, image), labelled[0][1].trace
    hues = figures.colours(output.method.name for _, output in labelled) | {"cfg": "currentColor"}
    columns = [
        {"label": label, "colour": hues[output.method.name], "dash": dash}
        | _column(output, image, width, judge, reveal, threshold)
        for (label, output), dash in zip(labelled, _dashes(labelled), strict=True)
    ]
    page = templates.get_template("viewer.html").render(
        prompt=trace.prompts[image],
        seed=trace.seeds[image],
        num_steps=N,
        columns=columns,
        chart=_chart(columns, N, threshold),
        width=width,
        narrowest=min(width, 150),
        slider_width=SLIDER_WIDTH,
        interval=interval,
    )
    return Viewer(page)


def contact_sheet(
    outputs: Outputs,
    image: int = 0,
    moments: int = 6,
    *,
    judge: Judge | None = None,
    reveal: bool = False,
) -> Figure:
    """The viewer's images as a figure: a row per output, a column per step, the final image last.

    Args:
        outputs, image, judge, reveal: as in `view`.
        moments: so many steps at which all outputs have an x̂₀, those of queries first.

    Raises:
        ValueError: as `view`, or there is no such step.
    """
    labelled = labels(outputs)
    N = step_count(labelled, image)
    traces = [output.trace.steps for _, output in labelled]
    common = [i for i in range(N) if all(steps[i].x0_image(image) for steps in traces)]
    queries = [i for i in common if any(steps[i].vlm_calls[image] for steps in traces)]
    if not (chosen := queries or common):
        raise ValueError("no x̂₀ was decoded in all outputs; sample with x0_every=True")
    last = max(min(moments, len(chosen)) - 1, 1)
    spread = sorted({round(k * (len(chosen) - 1) / last) for k in range(last + 1)})
    steps = [chosen[k] for k in spread]
    rows, captions = {}, {}
    for label, output in labelled:
        shown = [output.trace.steps[i] for i in steps]
        rows[label] = [step.x0_image(image) for step in shown] + [final_image(output, image)]
        captions[label] = [_caption(step, step, image)[-1] for step in shown]
    why = {label: reasons(judge, images, reveal) for label, images in rows.items()}
    titles = [f"step {i}" for i in steps] + ["final image"]
    return image_grid(rows, titles, reasons=why, captions=captions)


def labels(outputs: Outputs) -> list[tuple[str, Output]]:
    """Outputs with labels: those given, or the method and its ω."""
    if isinstance(outputs, Mapping):
        return list(outputs.items())
    found = []
    for output in [outputs] if isinstance(outputs, Output) else outputs:
        omega = output.method.omega
        found.append((output.method.name + (f", ω = {omega:g}" if omega else ""), output))
    return found


def step_count(labelled: Sequence[tuple[str, Output]], image: int) -> int:
    """The number of steps that all outputs have; a ValueError where there is none."""
    if not labelled:
        raise ValueError("no output to view; give at least one")
    fewest = min(len(output.trace.prompts) for _, output in labelled)
    if not 0 <= image < fewest:
        raise ValueError(f"no image {image}: there are {fewest}; use 0 to {fewest - 1}")
    numbers = {len(output.trace.steps) for _, output in labelled}
    if len(numbers) > 1:
        raise ValueError(f"the outputs have {sorted(numbers)} steps; view those of one number")
    return numbers.pop()


def final_image(output: Output, image: int) -> Image.Image:
    """The final image (PIL, RGB) of an output of type `pil`, `pt` or `np`."""
    found = output.images[image]
    if isinstance(found, Image.Image):
        return found
    if isinstance(found, Tensor):
        if len(found) != 3:
            raise ValueError("these outputs hold latents; sample with output_type='pil'")
        return to_pil(found[None])[0]
    return Image.fromarray((found * 255).round().astype("uint8"))


def _column(output: Output, image: int, width: int, judge, reveal: bool, threshold: float) -> dict:
    """What the page shows of one output: images, captions, probabilities and queries."""
    steps, trace = output.trace.steps, output.trace
    decoded = [step for step in steps if step.x0_image(image)]
    images = [step.x0_image(image) for step in decoded] + [final_image(output, image)]
    looks = judged(judge, images, threshold)
    shown = [
        image_html(one, width, "x̂₀", None if reveal else reason)
        for one, (_, reason) in zip(images, looks, strict=True)
    ]
    places, last = [], -1
    for step in steps:
        last += step in decoded
        own = decoded[last] if last >= 0 else None
        p = looks[last][0] if own is step else None
        caption = _caption(step, own, image)
        places.append({"image": shown[last] if own else None, "p": p, "caption": caption})
    spent = f"{trace.model_evaluations[image]} evaluations of the network"
    caption = ["final image", spent, f"{trace.vlm_calls[image]} VLM queries"]
    places.append({"image": shown[-1], "p": looks[-1][0], "caption": caption})
    queries = [step.index for step in steps if step.vlm_calls[image]]
    return {"places": places, "queries": queries}


def _caption(step: Step, decoded: Step | None, image: int) -> list[str]:
    """Lines about a step; `decoded` is the step whose x̂₀ is shown."""
    lines = [f"step {step.index}, t = {step.timestep:g}"]
    if decoded is not None and decoded is not step:
        lines[0] += f" (x̂₀ of step {decoded.index})"
    if step.vlm_calls[image]:
        answer, failure = step.vlm_answers[image], step.vlm_failures[image]
        lines += [f"VLM: “{answer.strip()[:300]}”"] * (answer is not None)
        lines += [f"VLM failed: {failure[:300]}"] * (failure is not None)
    return [*lines, f"away from: {step.negative_prompts[image] or '—'}"]


def _dashes(labelled: Sequence[tuple[str, Output]]) -> list[str]:
    """Dashes of each column's line, where a method occurs again."""
    names, dashes = (
        [output.method.name for _, output in labelled],
        ["none", "5 3", "1 3", "8 2 2 2"],
    )
    return [dashes[names[:i].count(name) % len(dashes)] for i, name in enumerate(names)]


def _chart(columns: Sequence[dict], num_steps: int, threshold: float, height: int = 72) -> Markup:
    """The judge's probability over the steps, as SVG that lies under the slider."""
    top, bottom = 4, height - 16

    def at(step: int, p: float | None) -> tuple[str, str]:
        x = INSET + step / num_steps * (SLIDER_WIDTH - 2 * INSET)
        return f"{x:.1f}", f"{bottom - (p or 0) * (bottom - top):.1f}"

    lines = []
    for column in columns:
        ps = [place["p"] for place in column["places"]]
        known = [",".join(at(step, p)) for step, p in enumerate(ps) if p is not None]
        dots = [at(step, ps[step]) for step in column["queries"]]
        lines.append(column | {"points": " ".join(known), "dots": dots})
    chart = templates.get_template("chart.svg").render(
        width=SLIDER_WIDTH,
        height=height,
        inset=INSET,
        bottom=bottom,
        level=at(0, threshold)[1],
        lines=lines,
        judged=any(line["points"] for line in lines),
    )
    return Markup(chart)
