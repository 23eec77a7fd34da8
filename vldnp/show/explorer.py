"""The explorer: run a prompt, follow its steps, compare runs, copy the command."""

import html
import shlex
import threading
from collections import deque
from dataclasses import replace

import ipywidgets as ui
from PIL import Image

from vldnp._files import first_line
from vldnp.methods import Method
from vldnp.models import load
from vldnp.models.backbone import to_pil
from vldnp.sampler import denoise
from vldnp.schedules import SPACINGS
from vldnp.show.images import image_html, judged, templates
from vldnp.study.profile import chosen_methods, dynamic, load_profile
from vldnp.study.prompts import load_prompts, sampled

SAMPLES = 12  # prompts of each set that can be picked
WRAP = ui.Layout(display="flex", flex_flow="row wrap")
LABELS = {"vlm": "VLM", "omega": "ω"}


class Explorer:
    """The widgets of the notebook `08_explorer`: `panel` is shown, and `controls` are those of
    a run's settings. A run takes place in a thread.

    `runs` are the last eight, newest first: settings, image, the judge's probability, and why it is
    blurred. `out` is where run folders lie, for the command. With `reveal`, here or in the profile,
    nothing is blurred."""

    def __init__(self, profile: str = "moji", out: str = "../runs", *, reveal: bool = False):
        self.profile, self.out, self.settings = profile, out, load_profile(profile)
        self.reveal = reveal or self.settings.reveal
        self.model = load.load(self.settings.model)
        self.judge = load.load_judge(self.settings.judge)
        self.methods = chosen_methods(self.settings)
        self.runs: deque[tuple[dict, Image.Image, float, str | None]] = deque(maxlen=8)
        self.thread: threading.Thread | None = None
        self._cancelled = threading.Event()
        self.vlms = {str(v): v for v in (self.settings.vlm, *self.settings.lighter_vlms)}
        self.controls = self._controls()
        self.panel = self._panel()
        self._adapt()

    @property
    def choice(self) -> dict:
        """The current settings of the widgets."""
        return {name: widget.value for name, widget in self.controls.items()}

    def start(self, _=None) -> None:
        """Start a run in a thread, because the cancel button needs the kernel."""
        if self.thread is None or not self.thread.is_alive():
            self._cancelled.clear()
            self.run.disabled, self.cancel.disabled = True, False
            self.thread = threading.Thread(target=self._run, args=(self.choice,), daemon=True)
            self.thread.start()

    def show(self, choice: dict) -> None:
        """Set the widgets to earlier settings, the method first, because it sets ω."""
        for name in sorted(choice, key="method".__ne__):
            self.controls[name].value = choice[name]

    def command(self, choice: dict) -> str:
        """The shell line, for the project's root, that generates the image again."""
        line = ["papermill", "notebooks/01_trajectories.ipynb", "explored.ipynb"]
        line += ["--cwd", "notebooks", "-r", "profile", self.profile, "-r", "out", self.out]
        for name, value in choice.items():
            if name != "method":  # -r passes a text as it is; -p would make a number of "7"
                line += ["-r" if isinstance(value, str) else "-p", name, str(value)]
        return shlex.join(line)

    def _run(self, choice: dict) -> None:
        """Run, and show the outcome or the error in the panel."""
        self.words.value = self.line.value = ""
        try:
            said = self._generate(choice)
        except Exception as error:
            said = f"{type(error).__name__}: {first_line(error)}"
        self.status.value = html.escape(said)
        self.run.disabled, self.cancel.disabled = False, True

    def _generate(self, choice: dict) -> str:
        N = self.bar.max
        self.bar.value, self.status.value = 0, "opening the models"
        asked = {"seeds": [choice["seed"]], "x0_every": True, **self.settings.sampling}
        for step in denoise(self.model, choice["prompt"], self._method(choice), **asked):
            self.bar.value, self.status.value = step.index + 1, f"step {step.index + 1} of {N}"
            self._show(step.x0_images[0], choice)
            if step.queried:
                said = step.vlm_failures[0] or f"“{step.vlm_answers[0].strip()}”"
                away = step.negative_prompts[0] or "—"
                line = html.escape(f"step {step.index}: {said[:300]} → away from: {away}")
                self.words.value += f"<div>{line}</div>"
            if self._cancelled.is_set() and step.index + 1 < N:
                return f"cancelled after step {step.index + 1} of {N}"
        image = to_pil(self.model.decode(step.latents))[0]
        probability, reason = self._show(image, choice)
        self.runs.appendleft((choice, image, probability, reason))
        template = templates.get_template("command.html")
        self.line.value = template.render(command=self.command(choice))
        self.history.children = [self._thumbnail(*run) for run in self.runs]
        return f"done: {_label(choice)}; judge: P(unsafe) = {probability:.2f}"

    def _method(self, choice: dict) -> Method:
        method = self.methods[choice["method"]]
        if choice["method"] == "vl-dnp":
            query_steps = {choice["schedule"]: choice["queries"]}
            vlm = load.load_vlm(self.vlms[choice["vlm"]])
            return dynamic(self.settings, choice["omega"], vlm=vlm, query_steps=query_steps)
        return method if method.omega is None else replace(method, omega=choice["omega"])

    def _show(self, image: Image.Image, choice: dict) -> tuple[float, str | None]:
        ((probability, reason),) = judged(self.judge, [image], self.reveal)
        self.image.value = image_html(image, 256, choice["prompt"], reason)
        return probability, reason

    def _thumbnail(self, choice: dict, image: Image.Image, p: float, reason) -> ui.VBox:
        shown = image_html(image, 112, choice["prompt"], reason)
        text = html.escape(f"P(unsafe) = {p:.2f}, {choice['prompt'][:80]}, {_label(choice)}")
        again = ui.Button(description="settings", icon="undo")
        again.on_click(lambda _: self.show(choice))
        return ui.VBox([ui.HTML(f"<div>{shown}{text}</div>"), again])

    def _adapt(self, _=None) -> None:
        """Enable the controls that the method uses, and set the ω that was chosen for it."""
        name, omega = self.controls["method"].value, self.controls["omega"]
        omega.disabled = self.methods[name].omega is None
        omega.value = self.methods[name].omega or 0.0
        for used in ("vlm", "schedule", "queries"):
            self.controls[used].disabled = name != "vl-dnp"

    def _controls(self) -> dict[str, ui.Widget]:
        tables = (sampled(load_prompts(s), SAMPLES) for s in self.settings.prompt_sets)
        prompts = list(dict.fromkeys(p for table in tables for p in table["prompt"]))
        ((spacing, queries),) = self.methods["vl-dnp"].negatives.query_steps.describe().items()
        controls = {
            "prompt": ui.Combobox(value=prompts[0], options=prompts, layout=ui.Layout(width="98%")),
            "method": ui.Dropdown(options=list(self.methods), value="vl-dnp"),
            "vlm": ui.Dropdown(options=list(self.vlms)),
            "omega": ui.BoundedFloatText(max=1000),
            "schedule": ui.Dropdown(options=list(SPACINGS), value=spacing),
            "queries": ui.BoundedIntText(queries, min=1, max=1000),
            "seed": ui.BoundedIntText(max=2**31 - 1),
        }
        for name in list(controls)[1:]:
            controls[name].description = LABELS.get(name, name)
            controls[name].layout.width = "190px"
        return controls

    def _panel(self) -> ui.VBox:
        self.run = ui.Button(description="run", button_style="primary", icon="play")
        self.cancel = ui.Button(description="cancel", icon="stop", disabled=True)
        self.bar = ui.IntProgress(max=self.settings.sampling["num_inference_steps"])
        self.history = ui.Box(layout=WRAP)
        self.status, self.image, self.words, self.line = (ui.HTML() for _ in range(4))
        self.history.add_class("vldnp-history")
        self.run.on_click(self.start)
        self.cancel.on_click(lambda _: self._cancelled.set())
        prompt, *others = self.controls.values()
        prompt.on_msg(lambda _, said, __: said.get("event") == "submit" and self.start())
        self.controls["method"].observe(self._adapt, "value")
        css = templates.loader.get_source(templates, "explorer.css")[0]
        words = ui.VBox([self.words, self.line], layout=ui.Layout(flex="1 1 300px"))
        rows = (others, [self.run, self.cancel, self.bar, self.status], [self.image, words])
        rows = [ui.Box(row, layout=WRAP) for row in rows]
        known = ui.HTML(_known_words(self.model))
        panel = ui.VBox([ui.HTML(f"<style>{css}</style>"), prompt, known, *rows, self.history])
        panel.add_class("vldnp-explorer")
        return panel


def _known_words(model) -> str:
    """The words of a model that has few, as HTML to unfold; else nothing."""
    words = [word.removesuffix("</w>") for word in model.pipe.tokenizer.get_vocab()]
    words = sorted(word for word in words if word.isalpha() and len(word) > 1)
    if len(words) > 500:
        return ""
    return f"<details><summary>words that the model knows</summary>{', '.join(words)}</details>"


def _label(choice: dict) -> str:
    return f"{choice['method']}, ω = {choice['omega']:g}, seed {choice['seed']}"
