"""The trajectory viewer: what the VLM saw and said, and what the image was steered away from.

`trajectory_data` holds what there is to see as plain data, `rendered` is its HTML. It holds no
widgets, because JupyterLab does not draw saved ones where no kernel was started, or in a notebook
that it does not trust. From the HTML of such a notebook it takes scripts and styles away, and no
form element works; what then remains is scrolled from step to step instead of moved by a slider.
"""

from IPython.display import HTML
from markupsafe import Markup

from vldnp.metrics.intervals import UNSAFE_THRESHOLD
from vldnp.models.judges import Judge
from vldnp.show import blur, figures
from vldnp.show.templating import filled
from vldnp.show.trajectory_data import PICTURE_WIDTH, Outputs, shortened, trajectory_data

SLIDER_WIDTH = 440
"""In screen pixels."""

INSET = 8
"""So far within its ends a slider's first and last places lie, in pixels; the chart follows it."""

NARROWEST = 150
"""A column gets narrower down to so many pixels before it goes to the next line: four of them fit
beside each other in a notebook on a screen of 1400 pixels."""


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
    data = trajectory_data(outputs, image, width, judge=judge, threshold=threshold)
    return HTML(str(rendered(data, width, interval, reveal)))


def rendered(
    data: dict, width: int = PICTURE_WIDTH, interval: int = 500, reveal: bool = False
) -> Markup:
    """Trajectory data as HTML: a frame per step and one for the final image, a column per output.

    The script shows one frame at a time, moved by a slider, arrow keys and buttons. Where it may
    not run, the frames lie in a row that scrolls, folded up: a code host that takes the layout
    away too would stack them to a tower. Arguments are those of `view`.
    """
    columns = [
        column
        | {"colour": colour, "dash": dash}
        | {
            "shown": [
                blur.picture_html(source, width, column["label"], None if reveal else reason)
                for source, reason in zip(column["pictures"], column["reasons"], strict=True)
            ]
        }
        for column, (colour, dash) in zip(data["columns"], _strokes(data), strict=True)
    ]
    return filled(
        "viewer.html",
        prompt=shortened(data["prompt"]),
        seed=data["seed"],
        num_steps=data["num_steps"],
        columns=columns,
        chart=chart(data),
        width=width,
        narrowest=min(width, NARROWEST),
        slider_width=SLIDER_WIDTH,
        interval=interval,
    )


def chart(data: dict, width: int = SLIDER_WIDTH, height: int = 72) -> Markup:
    """The judge's probability over the steps, as SVG that lies under a slider of this width.

    A line per column, a dot at each step at which its method asked the VLM, and a dashed line at
    the threshold. Without a judge only the queries are marked.
    """
    num_steps, top, bottom = data["num_steps"], 4, height - 16

    def x(step: int) -> float:
        return INSET + step / num_steps * (width - 2 * INSET)

    def y(probability: float) -> float:
        return bottom - probability * (bottom - top)

    lines = []
    for column, (colour, dash) in zip(data["columns"], _strokes(data), strict=True):
        known = {
            step: place["probability"]
            for step, place in enumerate(column["places"])
            if place["probability"] is not None
        }
        points = " ".join(f"{x(step):.1f},{y(value):.1f}" for step, value in known.items())
        dots = [(f"{x(step):.1f}", f"{y(known.get(step, 0)):.1f}") for step in column["queries"]]
        lines.append({"points": points, "dots": dots, "colour": colour, "dash": dash})
    return filled(
        "chart.svg",
        width=width,
        height=height,
        inset=INSET,
        bottom=bottom,
        level=f"{y(data['threshold']):.1f}",
        lines=lines,
        judged=any(line["points"] for line in lines),
    )


def _strokes(data: dict) -> list[tuple[str, str]]:
    """Colour and dashes of each column's line: a colour per method, dashes where one comes again.

    Plain CFG takes the text's colour, which is seen in light and in dark.
    """
    methods = [column["method"] for column in data["columns"]]
    colours = figures.colours(methods) | {"cfg": "currentColor"}
    dashes = ["none", "5 3", "1 3", "8 2 2 2"]
    return [
        (colours[method], dashes[methods[:i].count(method) % len(dashes)])
        for i, method in enumerate(methods)
    ]
