"""The explorer: type a prompt, watch the image form, compare runs, take the command along."""

import html
import shlex
import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import replace

import ipywidgets as widgets
from matplotlib.figure import Figure
from PIL import Image

from vldnp._files import first_line
from vldnp.methods import Method
from vldnp.models import families, load
from vldnp.models.backbone import to_pil
from vldnp.sampler import denoise
from vldnp.schedules import SPACINGS
from vldnp.show.images import image_grid, image_html, judged, templates
from vldnp.study.profile import chosen_methods, dynamic, load_profile
from vldnp.study.prompts import load_prompts, sampled

CONTROLS = ("prompt", "method", "vlm", "omega", "schedule", "queries", "seed")
SAMPLES = 12  # prompts of each set that can be picked


class Explorer:
    """The widgets of the notebook `08_explorer`, and the thread in which a run takes place.

    Args:
        profile: a name, or a YAML file.
        out: where run folders lie, for the command.
        reveal: show what the judge flags unblurred; so does the profile, if it says so.

    Attributes:
        panel: the widget to show.
        runs: the last eight runs, newest first: settings, image, the judge's probability, reason.
        thread: the run in progress, or the last one; None before the first.
    """

    def __init__(self, profile: str = "moji", out: str = "../runs", *, reveal: bool = False):
        self.profile, self.out, self.settings = profile, out, load_profile(profile)
        self.reveal = reveal or self.settings.reveal
        self.model = load.load(self.settings.model)
        self.judge = load.load_judge(self.settings.judge)
        self.methods = chosen_methods(self.settings)
        self.runs: deque[tuple[dict, Image.Image, float, str | None]] = deque(maxlen=8)
        self.thread: threading.Thread | None = None
        self._cancelled = threading.Event()
        self.panel = self._panel()

    @property
    def choice(self) -> dict:
        """What the widgets say, by the names of `CONTROLS`."""
        return {name: getattr(self, name).value for name in CONTROLS}

    def compare(self, prompt: str, names: Sequence[str] = ()) -> Figure:
        """Run a prompt with several methods, one after the other (default: all)."""
        self.prompt.value = prompt
        for name in names or self.methods:
            self.method.value = name
            self.start()
            self.thread.join()
        return self.sheet()

    def start(self, _=None) -> None:
        """Begin a run in a thread, so that the kernel stays free for the cancel button."""
        if self.thread is None or not self.thread.is_alive():
            self._cancelled.clear()
            self.run.disabled, self.cancel.disabled = True, False
            self.thread = threading.Thread(target=self._run, args=(self.choice,), daemon=True)
            self.thread.start()

    def stop(self, _=None) -> None:
        """Cancel the run after the current step."""
        self._cancelled.set()

    def sheet(self) -> Figure:
        """The last runs as a figure, for where no widgets work; a ValueError before the first."""
        if not self.runs:
            raise ValueError("there is no image yet: press run")
        choices, images, _, why = zip(*self.runs, strict=True)
        blur = [None if self.reveal else reason for reason in why]
        return image_grid({"": images}, list(map(_label, choices)), reasons={"": blur}, size=1.8)

    def command(self, choice: dict) -> str:
        """The shell line, for the project's root, that generates the image again."""
        line = ["papermill", "notebooks/01_trajectories.ipynb", "explored.ipynb"]
        texts = {"profile": self.profile, "out": self.out, "prompt": choice["prompt"]}
        texts |= {"vlm": choice["vlm"], "schedule": choice["schedule"]}
        # -r passes a text as it is; -p would make a number of the prompt "7".
        line += ["--cwd", "notebooks", *(w for pair in texts.items() for w in ("-r", *pair))]
        for name in ("seed", "omega", "queries"):
            line += ["-p", name, str(choice[name])]
        return shlex.join(line)

    def _run(self, choice: dict) -> None:
        N = self.settings.sampling["num_inference_steps"]
        self.bar.value, self.bar.max = 0, N
        self.words.value = self.line.value = ""
        try:
            self._say("opening the models")
            asked = {"seeds": [choice["seed"]], "x0_every": True, **self.settings.sampling}
            for step in denoise(self.model, choice["prompt"], self._method(choice), **asked):
                self.bar.value = step.index + 1
                self._say(f"step {step.index + 1} of {N}")
                self._show(step.x0_images[0], choice)
                if step.queried:
                    said = step.vlm_failures[0] or f"“{step.vlm_answers[0].strip()}”"
                    away = step.negative_prompts[0] or "—"
                    line = html.escape(f"step {step.index}: {said[:300]} → away from: {away}")
                    self.words.value += f"<div>{line}</div>"
                if self._cancelled.is_set() and step.index + 1 < N:
                    return self._say(f"cancelled after step {step.index + 1} of {N}")
            image = to_pil(self.model.decode(step.latents))[0]
            probability, reason = self._show(image, choice)
            self.runs.appendleft((choice, image, probability, reason))
            line = templates.get_template("command.html").render(command=self.command(choice))
            self.line.value = line
            self.history.children = [self._thumbnail(*run) for run in self.runs]
            self._say(f"done: {_label(choice)}; judge: P(unsafe) = {probability:.2f}")
        except Exception as error:  # the panel must say it: nobody sees a thread's
            self._say(f"{type(error).__name__}: {first_line(error)}")
        finally:
            self.run.disabled, self.cancel.disabled = False, True

    def _method(self, choice: dict) -> Method:
        method = self.methods[choice["method"]]
        if choice["method"] == "vl-dnp":
            query_steps = {choice["schedule"]: choice["queries"]}
            vlm = load.load_vlm(self.vlms[choice["vlm"]])
            return dynamic(self.settings, choice["omega"], vlm=vlm, query_steps=query_steps)
        return method if method.omega is None else replace(method, omega=choice["omega"])

    def _show(self, image: Image.Image, choice: dict) -> tuple[float, str | None]:
        ((probability, reason),) = judged(self.judge, [image])
        why = None if self.reveal else reason
        self.image.value = image_html(image, 256, choice["prompt"], why)
        return probability, reason

    def _thumbnail(self, choice: dict, image: Image.Image, p: float, reason) -> widgets.VBox:
        shown = image_html(image, 112, choice["prompt"], None if self.reveal else reason)
        text = html.escape(f"P(unsafe) = {p:.2f}, {choice['prompt'][:80]}, {_label(choice)}")
        again = widgets.Button(description="settings", icon="undo")
        again.on_click(lambda _: self.show(choice))
        return widgets.VBox([widgets.HTML(f"<div>{shown}{text}</div>"), again])

    def show(self, choice: dict) -> None:
        """Set the widgets to earlier settings."""
        self.method.value = choice["method"]  # first: ω follows the method
        for name in CONTROLS:
            getattr(self, name).value = choice[name]

    def _say(self, text: str) -> None:
        self.status.value = html.escape(text)

    def _submitted(self, _, content: dict, buffers) -> None:
        """Enter was pressed in the prompt."""
        if content.get("event") == "submit":
            self.start()

    def _adapt(self, _=None) -> None:
        """Enable the controls that the method depends on, at the ω that was chosen for it."""
        method = self.methods[self.method.value]
        self.omega.disabled = method.omega is None
        self.omega.value = method.omega or 0.0
        for name in ("vlm", "schedule", "queries"):
            getattr(self, name).disabled = self.method.value != "vl-dnp"

    def _remark(self, _=None) -> None:
        """Say what of the prompt the model does not know."""
        words = families.spelled(self.model.pipe, self.prompt.value)
        known = "not in the text encoder's vocabulary: " + ", ".join(words)
        self.note.value = html.escape(known) if words else ""

    def _panel(self) -> widgets.VBox:
        settings, W, L = self.settings, widgets, widgets.Layout
        prompts = [
            p for s in settings.prompt_sets for p in sampled(load_prompts(s), SAMPLES)["prompt"]
        ]
        self.vlms = {str(vlm): vlm for vlm in (settings.vlm, *settings.lighter_vlms)}
        ((schedule, queries),) = self.methods["vl-dnp"].negatives.query_steps.describe().items()
        short = {"layout": L(width="190px")}
        self.prompt = W.Combobox(
            value=prompts[0], options=list(dict.fromkeys(prompts)), layout=L(width="98%")
        )
        names = list(self.methods)
        self.method = W.Dropdown(options=names, value="vl-dnp", description="method", **short)
        self.vlm = W.Dropdown(options=list(self.vlms), description="VLM", **short)
        self.omega = W.BoundedFloatText(0.0, min=0, max=1000, description="ω", **short)
        spacings = list(SPACINGS)
        self.schedule = W.Dropdown(options=spacings, value=schedule, description="spacing", **short)
        self.queries = W.BoundedIntText(queries, min=1, max=1000, description="queries", **short)
        self.seed = W.BoundedIntText(0, min=0, max=2**31 - 1, description="seed", **short)
        self.run = W.Button(description="run", button_style="primary", icon="play")
        self.cancel = W.Button(description="cancel", icon="stop", disabled=True)
        self.bar = W.IntProgress()
        self.status, self.image, self.words, self.note, self.line = (W.HTML() for _ in range(5))
        self.history = W.Box(layout=L(flex_flow="row wrap"))
        self.history.add_class("vldnp-history")
        self.note.add_class("vldnp-note")
        self.run.on_click(self.start)
        self.cancel.on_click(self.stop)
        self.prompt.on_msg(self._submitted)
        self.prompt.observe(self._remark, "value")
        self.method.observe(self._adapt, "value")
        self._adapt()
        self._remark()

        def row(*parts: widgets.Widget) -> widgets.Box:
            return W.Box(parts, layout=L(display="flex", flex_flow="row wrap"))

        css = templates.loader.get_source(templates, "explorer.css")[0]
        panel = W.VBox(
            [
                W.HTML(f"<style>{css}</style>"),
                *(self.prompt, self.note),
                row(self.method, self.vlm, self.omega, self.schedule, self.queries, self.seed),
                row(self.run, self.cancel, self.bar, self.status),
                row(self.image, W.VBox([self.words, self.line], layout=L(flex="1 1 300px"))),
                self.history,
            ]
        )
        panel.add_class("vldnp-explorer")
        return panel


def _label(choice: dict) -> str:
    return f"{choice['method']}, ω = {choice['omega']:g}, seed {choice['seed']}"
