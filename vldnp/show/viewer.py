"""The trajectory viewer: x̂₀, the VLM's answers and the negative prompts of each step.

The viewer is HTML without widgets and works without a kernel, also in an exported page. JupyterLab
removes scripts from an untrusted notebook; the steps are then a row that scrolls."""

import base64
import hashlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from IPython.display import HTML
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from PIL import Image

from vldnp._files import write_text
from vldnp.metrics.intervals import UNSAFE_THRESHOLD
from vldnp.models.judges import Judge
from vldnp.show import figures
from vldnp.show.images import image_grid, image_html, judged, templates
from vldnp.trace import Output, Step

Outputs = Output | Sequence[Output] | Mapping[str, Output]


class Viewer(HTML):
    """A page that a notebook shows and `save` writes."""

    def save(self, path: str | Path) -> Path:
        """Write a page that runs only the viewer's own script; returns the path."""
        script = templates.get_template("viewer.js").render().encode()
        known = base64.b64encode(hashlib.sha256(script).digest()).decode()
        policy = f"default-src 'none'; img-src data:; script-src 'sha256-{known}'"
        policy = f"{policy}; style-src 'unsafe-inline'"
        head = f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        head = f'<!doctype html><meta charset="utf-8">{head}<title>Trajectories</title>'
        write_text(path, head + self.data)
        return Path(path)


def view(
    outputs: Outputs,
    image: int = 0,
    width: int = 224,
    *,
    judge: Judge | None = None,
    reveal: bool = False,
) -> Viewer:
    """Step through one or several trajectories, side by side under one slider.

    Each step shows x̂₀ (where it was decoded: at every step with `x0_every=True`, else as last
    seen), the VLM's answer and the negative prompt in force; the last one is the final image.
    Under the slider are the judge's probabilities, and a mark at each query.

    Args:
        outputs: an `Output`, several, or label → `Output`; all with the same number of steps.
        image, width: which image of each output, and how wide in screen pixels.
        judge, reveal: flagged images are blurred unless `reveal`; without a judge none are.

    Raises:
        ValueError: no output, different numbers of steps, no such image, or none of type PIL.
    """
    labelled, N = _checked(outputs, image)
    methods = [output.method.name for _, output in labelled]
    # A second output of a method has another colour.
    keys = [m if methods.index(m) == k else labelled[k][0] for k, m in enumerate(methods)]
    look = partial(judged, judge, reveal=reveal)
    hues = {name: to_hex(hue) for name, (_, hue) in figures.looks(keys).items()}
    hues["cfg"] = "currentColor"
    columns = [
        {"label": label, "colour": hues[key], "places": _places(output, image, width, look)}
        for (label, output), key in zip(labelled, keys, strict=True)
    ]
    trace = labelled[0][1].trace
    what = {"prompt": trace.prompts[image], "seed": trace.seeds[image], "num_steps": N}
    what |= {"columns": columns, "width": width, "threshold": UNSAFE_THRESHOLD}
    return Viewer(templates.get_template("viewer.html").render(what, judged=judge is not None))


def contact_sheet(
    outputs: Outputs, image: int = 0, *, judge: Judge | None = None, reveal: bool = False
) -> Figure:
    """The viewer's images as a figure: a row per output, a column per step, the final image last.

    The steps are up to six at which all outputs have an x̂₀, those of queries if there are any.
    Arguments and errors are those of `view`; a ValueError too where there is no such step."""
    labelled, N = _checked(outputs, image)
    traces = [output.trace.steps for _, output in labelled]
    common = [i for i in range(N) if all(steps[i].x0_images[image] for steps in traces)]
    queries = [i for i in common if any(steps[i].vlm_calls[image] for steps in traces)]
    if not (chosen := queries or common):
        raise ValueError("no x̂₀ was decoded in all outputs; sample with x0_every=True")
    spread = np.linspace(0, len(chosen) - 1, min(6, len(chosen))).round().astype(int)
    steps = [chosen[k] for k in spread]
    rows, captions = {}, {}
    for label, output in labelled:
        shown = [output.trace.steps[i] for i in steps]
        rows[label] = [step.x0_images[image] for step in shown] + [output.images[image]]
        captions[label] = [_caption(step, step, image)[-1] for step in shown] + [""]
    why = {label: [flag for _, flag in judged(judge, rows[label], reveal)] for label in rows}
    titles = [f"step {i}" for i in steps] + ["final image"]
    return image_grid(rows, titles, reasons=why, captions=captions)


def _checked(outputs: Outputs, image: int) -> tuple[list[tuple[str, Output]], int]:
    """Outputs with labels, by default the method and its ω, and how many steps all of them have."""
    outputs = [outputs] if isinstance(outputs, Output) else outputs
    if isinstance(outputs, Mapping):
        labelled = list(outputs.items())
    else:
        omegas = [f", ω = {o.method.omega:g}" if o.method.omega else "" for o in outputs]
        labelled = [(o.method.name + w, o) for o, w in zip(outputs, omegas, strict=True)]
    if not labelled:
        raise ValueError("no output to view; give at least one")
    fewest = min(len(output.trace.prompts) for _, output in labelled)
    if not 0 <= image < fewest:
        raise ValueError(f"no image {image}: there are {fewest}; use 0 to {fewest - 1}")
    numbers = {len(output.trace.steps) for _, output in labelled}
    if len(numbers) > 1:
        raise ValueError(f"the outputs have {sorted(numbers)} steps; view those of one number")
    if not all(isinstance(output.images[image], Image.Image) for _, output in labelled):
        raise ValueError("the outputs hold no PIL images; sample with output_type='pil'")
    return labelled, numbers.pop()


def _places(output: Output, image: int, width: int, look: Callable) -> list[dict]:
    """The page's content for one output at each step, and for its final image."""
    steps, trace = output.trace.steps, output.trace
    images = [step.x0_images[image] for step in steps if step.x0_images[image]]
    images += [output.images[image]]
    looks = zip(images, look(images), strict=True)
    shown = ((image_html(one, width, "x̂₀", why), p) for one, (p, why) in looks)
    places, decoded, html = [], None, None
    for step in steps:
        p = None
        if step.x0_images[image]:
            decoded, (html, p) = step, next(shown)
        place = {"step": len(places), "image": html, "p": p, "queried": step.vlm_calls[image]}
        places.append(place | {"caption": _caption(step, decoded, image)})
    (html, p), spent = next(shown), f"{trace.model_evaluations[image]} evaluations of the network"
    caption = ["final image", spent, f"{trace.vlm_calls[image]} VLM queries"]
    place = {"step": len(places), "image": html, "p": p, "queried": 0}
    return [*places, place | {"caption": caption}]


def _caption(step: Step, decoded: Step | None, image: int) -> list[str]:
    """Lines about a step; `decoded` is the step whose x̂₀ is shown."""
    lines = [f"step {step.index}, t = {step.timestep:g}"]
    if decoded is not None and decoded is not step:
        lines[0] += f" (x̂₀ of step {decoded.index})"
    if step.vlm_calls[image]:
        answer, failure = step.vlm_answers[image], step.vlm_failures[image]
        lines += [] if answer is None else [f"VLM: “{answer.strip()[:300]}”"]
        lines += [] if failure is None else [f"VLM failed: {failure[:300]}"]
    return [*lines, f"away from: {step.negative_prompts[image] or '—'}"]
