"""The trajectory viewer: what the VLM saw and said, and what the image was steered away from.

A `storyboard` holds what there is to see as plain data, `rendered` is its HTML. It holds no
widgets, because JupyterLab does not draw saved ones where no kernel was started, or in a notebook
that it does not trust. From the HTML of such a notebook it takes scripts and styles away, and no
form element works; what then remains is scrolled from step to step instead of moved by a slider.
"""

import html
import json
import re
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
from IPython.display import HTML
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from vldnp import figures, sensitive
from vldnp.backbone import to_pil
from vldnp.files import atomic, write_text
from vldnp.judges import Judge
from vldnp.metrics import UNSAFE_THRESHOLD
from vldnp.sampler import Output, Step

LONGEST_ANSWER = 300
"""An answer may be endless; so many characters are shown."""

PICTURE_WIDTH = 224
SLIDER_WIDTH = 440
"""In screen pixels."""

INSET = 8
"""So far within its ends a slider's first and last places lie, in pixels; the chart follows it."""

STYLE = """<style>
.vldnp-viewer {max-width: 100%}
.vldnp-controls {display: flex; flex-wrap: wrap; align-items: flex-start; gap: 6px}
.vldnp-controls[hidden], .vldnp-moved .vldnp-hint {display: none}
.vldnp-controls button {font: 15px sans-serif; min-width: 2.4em; padding: 3px 8px; color: inherit;
  cursor: pointer; background: #8883; border: 1px solid #8888; border-radius: 4px}
.vldnp-controls input {display: block; width: 100%; margin: 6px 0}
.vldnp-moved .vldnp-frames {display: grid !important; overflow: visible !important}
.vldnp-moved .vldnp-frame {grid-area: 1 / 1; visibility: hidden}
.vldnp-moved .vldnp-now {visibility: visible}
</style>"""

SCRIPT = """<script>{
  const viewer = document.currentScript.closest(".vldnp-viewer");
  const frames = [...viewer.querySelectorAll(".vldnp-frame")];
  const controls = viewer.querySelector(".vldnp-controls");
  const slider = controls.querySelector("input");
  const [play, back, forward] = controls.querySelectorAll("button");
  const show = () => frames.forEach((f, k) => f.classList.toggle("vldnp-now", k == slider.value));
  const go = step => { slider.value = step; show(); };
  let timer = null;
  const stop = () => { clearInterval(timer); timer = null; play.textContent = "▶"; };
  play.onclick = () => {
    if (timer) return stop();
    if (slider.value === slider.max) go(0);
    play.textContent = "❚❚";
    timer = setInterval(() => {
      go(+slider.value + 1);
      if (slider.value === slider.max) stop();
    }, viewer.dataset.interval);
  };
  back.onclick = () => go(+slider.value - 1);
  forward.onclick = () => go(+slider.value + 1);
  slider.oninput = show;
  viewer.addEventListener("toggle", ({target}) => {  // one opened picture opens its whole column
    const column = target.closest(".vldnp-column");
    if (!column) return;
    const place = [...column.parentElement.children].indexOf(column);
    for (const frame of frames)
      for (const other of frame.children[place].querySelectorAll("details"))
        other.open = target.open;
  }, true);
  viewer.classList.add("vldnp-moved");
  viewer.querySelector(".vldnp-steps").open = true;
  controls.hidden = false;
  show();
}</script>"""
"""Several viewers may be in a page, hence the block."""

Outputs = Output | Sequence[Output] | Mapping[str, Output]


def view(
    outputs: Outputs,
    image: int = 0,
    width: int = PICTURE_WIDTH,
    interval: int = 500,
    *,
    judge: Judge | None = None,
    reveal: bool = False,
    threshold: float = UNSAFE_THRESHOLD,
) -> HTML:
    """Step through one or several trajectories, side by side under one slider.

    Each step shows x̂₀ (where it was decoded: at every step with `x0_every=True`, else as last
    seen), the VLM's words and the negative prompt in force; the last place is the final image.
    Under the slider are the judge's probabilities, and a mark at each query. It needs no kernel and
    no network, also in exported HTML.

    Args:
        outputs: an `Output`, several, or label → `Output`; all with the same number of steps.
        image: which image of each output.
        width: of a picture, in screen pixels.
        interval: of the play button, in milliseconds.
        judge: looks at every picture; without one there is no line, and nothing is blurred.
        reveal: show what the judge flags unblurred.
        threshold: a picture is flagged from this probability on.

    Raises:
        ValueError: no output, different numbers of steps, or no such image.
    """
    board = storyboard(outputs, image, width, judge=judge, threshold=threshold)
    return HTML(rendered(board, width, interval, reveal))


def storyboard(
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
        was decoded so far), the judge's `probability` where a new picture was judged, and what is
        `told`, in lines of text that nothing has escaped.
    """
    labelled = _labelled(outputs)
    num_steps = _num_steps(labelled, image)
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


def keep(
    outputs: Outputs, folder: str | Path, image: int = 0, *, judge: Judge | None = None
) -> list[Path]:
    """Write a storyboard, from which the report draws, and the final pictures beside it.

    Args:
        outputs, image, judge: as in `view`.
        folder: where; the files' names begin with the prompt's letters and the seed.

    Returns:
        The files written: the storyboard as JSON, and `…-<number>-<method>.png`, unaltered.
    """
    board = storyboard(outputs, image, judge=judge)
    letters = re.sub(r"[^a-z0-9]+", "-", board["prompt"].lower()).strip("-")[:40] or "prompt"
    path = Path(folder) / f"{letters}-{board['seed']}.json"
    write_text(path, json.dumps(board, ensure_ascii=False))
    written = [path]
    for number, (_, output) in enumerate(_labelled(outputs)):
        if picture := _final(output, image):
            file = path.with_name(f"{path.stem}-{number}-{output.method.name}.png")
            with atomic(file) as temporary:
                picture.save(temporary)
            written.append(file)
    return written


def rendered(
    board: dict, width: int = PICTURE_WIDTH, interval: int = 500, reveal: bool = False
) -> str:
    """A storyboard as HTML: a frame per step and one for the final image, a column per output.

    `SCRIPT` shows one frame at a time, moved by a slider, arrow keys and buttons. Where it may not
    run, the frames lie in a row that scrolls, folded up: a code host that takes the layout away too
    would stack them to a tower. Arguments are those of `view`.
    """
    columns = [
        _column_html(column, width, reveal, *stroke)
        for column, stroke in zip(board["columns"], _strokes(board), strict=True)
    ]
    frames = "".join(
        '<div class="vldnp-frame" style="display: flex; flex-wrap: wrap; flex-shrink: 0; '
        f'align-content: flex-start; width: 100%; gap: 16px">{"".join(parts)}</div>'
        for parts in zip(*columns, strict=True)
    )
    prompt = html.escape(shortened(board["prompt"]))
    seed = "" if board["seed"] is None else f", seed {board['seed']}"
    buttons = "".join(
        f'<button type="button" title="{title}" aria-label="{title}">{sign}</button>'
        for title, sign in (("play", "▶"), ("one step back", "|◀"), ("one step forward", "▶|"))
    )
    # JupyterLab gives the arrow keys to the notebook, unless the focused element asks it not to.
    return (
        f'<div class="vldnp-viewer" data-interval="{interval}">{STYLE}<p><i>{prompt}</i>{seed}</p>'
        '<details class="vldnp-steps"><summary class="vldnp-hint" style="cursor: pointer"><i>Open, '
        "and scroll sideways from step to step; a trusted notebook has a slider here.</i></summary>"
        f'<div class="vldnp-controls" hidden="hidden">{buttons}'
        f'<div style="width: {SLIDER_WIDTH}px; max-width: 100%">'
        f'<input type="range" min="0" max="{board["num_steps"]}" value="0" '
        f'aria-label="step" data-lm-suppress-shortcuts="true">{chart(board)}</div></div>'
        '<div class="vldnp-frames" style="display: flex; overflow-x: auto; max-width: '
        f'{len(columns) * (width + 16)}px">{frames}</div></details>{SCRIPT}</div>'
    )


def _column_html(column: dict, width: int, reveal: bool, colour: str, dash: str) -> list[str]:
    """What one output shows in each frame."""
    blank = (
        f'<div class="vldnp-blank" style="width: {width}px; height: {width}px; max-width: 100%; '
        'background-color: rgba(128, 128, 128, .15)"><i>x̂₀ was not decoded</i></div>'
    )
    pictures = [
        sensitive.picture_html(source, width, column["label"], None if reveal else reason)
        for source, reason in zip(column["pictures"], column["reasons"], strict=True)
    ]
    head = f"{_stroke_html(colour, dash)} <b>{html.escape(column['label'])}</b>"
    return [
        f'<div class="vldnp-column" style="width: {width}px; line-height: 1.35; '
        f'overflow-wrap: break-word"><div>{head}</div>'
        f"{blank if place['picture'] is None else pictures[place['picture']]}"
        f'<div class="vldnp-told">{"<br>".join(map(html.escape, place["told"]))}</div></div>'
        for place in column["places"]
    ]


def chart(board: dict, width: int = SLIDER_WIDTH, height: int = 72) -> str:
    """The judge's probability over the steps, as SVG that lies under a slider of this width.

    A line per column, a dot at each step at which its method asked the VLM, and a dashed line at
    the threshold. Without a judge only the queries are marked.
    """
    num_steps, top, bottom = board["num_steps"], 4, height - 16

    def x(step: int) -> float:
        return INSET + step / num_steps * (width - 2 * INSET)

    def y(probability: float) -> float:
        return bottom - probability * (bottom - top)

    level = y(board["threshold"])
    drawn = [
        f'<path d="M{INSET} {bottom}H{width - INSET}" stroke="currentColor" opacity="0.5"/>',
        f'<path d="M{INSET} {level:.1f}H{width - INSET}" stroke="currentColor" opacity="0.5" '
        'stroke-dasharray="2 3"/>',
    ]
    judged = False
    for column, (colour, dash) in zip(board["columns"], _strokes(board), strict=True):
        known = {
            step: place["probability"]
            for step, place in enumerate(column["places"])
            if place["probability"] is not None
        }
        judged = judged or bool(known)
        points = " ".join(f"{x(step):.1f},{y(value):.1f}" for step, value in known.items())
        drawn.append(
            f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="1.8" '
            f'stroke-dasharray="{dash}"/>'
        )
        drawn += [
            f'<circle cx="{x(step):.1f}" cy="{y(known.get(step, 0)):.1f}" r="3.2" fill="{colour}"/>'
            for step in column["queries"]
        ]
    words = "judge: P(unsafe) 0 to 1, dashed: flagged from here on; " if judged else ""
    drawn.append(
        f'<text x="{INSET}" y="{height - 3}" font-size="10.5" fill="currentColor" '
        f'font-family="sans-serif">{words}● VLM asked</text>'
    )
    return (
        f'<svg class="vldnp-chart" viewBox="0 0 {width} {height}" width="{width}" '
        f'height="{height}" style="max-width: 100%" role="img" '
        f'aria-label="the judge\'s probability at each step">{"".join(drawn)}</svg>'
    )


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
    labelled = _labelled(outputs)
    num_steps = _num_steps(labelled, image)
    traces = [output.trace.steps for _, output in labelled]
    common = [i for i in range(num_steps) if all(steps[i].x0_images for steps in traces)]
    asked = [i for i in common if any(steps[i].queried for steps in traces)]
    chosen = asked or common
    if not chosen:
        raise ValueError("no x̂₀ was decoded in all outputs; sample with x0_every=True")
    count = min(moments, len(chosen))
    spread = [round(k * (len(chosen) - 1) / max(count - 1, 1)) for k in range(count)]
    places = [chosen[k] for k in spread]
    rows, why = {}, {}
    for label, output in labelled:
        final = _final(output, image)
        pictures = [output.trace.steps[i].x0_images[image] for i in places]
        rows[label] = pictures + ([final] if final else [])
        why[label] = _reasons(judge, rows[label], reveal)
    return figures.image_grid(rows, [f"step {i}" for i in places] + ["final image"], reasons=why)


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
    _num_steps([("", output)], image)
    seen = [step for step in output.trace.steps if step.x0_images is not None]
    if queries_only:
        seen = [step for step in seen if step.queried]
        if not seen:
            raise ValueError(f"the VLM was never asked: {output.method.name} has no query steps")
    if not seen:
        raise ValueError("no x̂₀ was decoded in this output; sample with x0_every=True")
    final = _final(output, image)
    pictures = [step.x0_images[image] for step in seen] + ([final] if final else [])
    captions = [_caption(step, image) for step in seen] + ["final image"]
    columns = min(columns, len(pictures))
    rows = -(-len(pictures) // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(2.2 * columns, 2.9 * rows), squeeze=False, layout="constrained"
    )
    plt.close(figure)  # a notebook would show it twice
    for axis in axes.flat:
        axis.set_axis_off()
    reasons = _reasons(judge, pictures, reveal)
    for axis, picture, reason, caption in zip(axes.flat, pictures, reasons, captions, strict=False):
        figures.show_picture(axis, picture, reason)
        # An answer is text, not mathematics: a lone $ must not break the figure.
        axis.set_title(caption, fontsize=10, loc="left", parse_math=False)
    figure.suptitle(shortened(output.trace.prompts[image]), fontsize=11, parse_math=False)
    return figure


def shortened(text: str) -> str:
    """At most `LONGEST_ANSWER` characters of a text."""
    return text if len(text) <= LONGEST_ANSWER else text[:LONGEST_ANSWER] + " …"


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


def _column(
    label: str, output: Output, image: int, width: int, judge: Judge | None, threshold: float
) -> dict:
    """One output's part of a storyboard."""
    steps, final = output.trace.steps, _final(output, image)
    pictures = [step.x0_images[image] for step in steps if step.x0_images]
    pictures += [final] if final else []
    looks = sensitive.look(judge, pictures, threshold) if judge else []
    places, last, shown = [], None, None
    for step in steps:
        if step.x0_images:
            last, shown = step, 0 if shown is None else shown + 1
        place = {"picture": shown, "probability": None, "told": _told(step, last, image)}
        if looks and last is step:
            place["probability"] = round(looks[shown].probability, 4)
        places.append(place)
    spent = f"{output.trace.model_evaluations[image]} U-Net evaluations"
    asked = f"{output.trace.vlm_calls[image]} VLM calls"
    places.append(
        {
            "picture": len(pictures) - 1 if final else None,
            "probability": round(looks[-1].probability, 4) if looks and final else None,
            "told": ["final image", spent, asked],
        }
    )
    return {
        "label": label,
        "method": output.method.name,
        "pictures": [sensitive.data_uri(picture, width) for picture in pictures],
        "reasons": [found.reason for found in looks] or [None] * len(pictures),
        "queries": [step.index for step in steps if step.queried],
        "places": places,
    }


def _told(step: Step, last: Step | None, image: int) -> list[str]:
    """What there is to say about a step; `last` is the step whose x̂₀ is shown."""
    lines = [f"step {step.index}, t = {step.timestep:g}"]
    if last is not None and last is not step:
        lines[0] += f" (x̂₀ of step {last.index})"
    if step.queried and step.vlm_failures[image]:
        lines.append(f"VLM failed: {shortened(step.vlm_failures[image])}")
    elif step.queried:
        lines.append(f"VLM: “{shortened(step.vlm_answers[image].strip())}”")
    lines.append(f"away from: {step.negative_prompts[image] or '—'}")
    return lines


def _caption(step: Step, image: int) -> str:
    return "\n".join(
        line
        for told in _told(step, step, image)
        for line in textwrap.wrap(told, 26, max_lines=4, placeholder=" …")
    )


def _reasons(
    judge: Judge | None, pictures: Sequence[Image.Image], reveal: bool
) -> list[str | None]:
    return sensitive.reasons(judge, pictures, reveal) if judge else [None] * len(pictures)


def _strokes(board: dict) -> list[tuple[str, str]]:
    """Colour and dashes of each column's line: a colour per method, dashes where one comes again.

    Plain CFG takes the text's colour, which is seen in light and in dark.
    """
    methods = [column["method"] for column in board["columns"]]
    colours = figures.colours(methods) | {"cfg": "currentColor"}
    dashes = ["none", "5 3", "1 3", "8 2 2 2"]
    return [
        (colours[method], dashes[methods[:i].count(method) % len(dashes)])
        for i, method in enumerate(methods)
    ]


def _stroke_html(colour: str, dash: str) -> str:
    return (
        '<svg width="22" height="10"><path d="M0 5H22" stroke-width="3" '
        f'stroke="{colour}" stroke-dasharray="{dash}"/></svg>'
    )


def _final(output: Output, image: int) -> Image.Image | None:
    """The final picture; None where the output has latents instead."""
    picture = output.images[image]
    if isinstance(picture, Image.Image):
        return picture
    if isinstance(picture, Tensor):
        is_picture = picture.shape[0] == 3
        return to_pil(picture[None])[0] if is_picture else None
    return Image.fromarray((picture * 255).round().astype("uint8"))
