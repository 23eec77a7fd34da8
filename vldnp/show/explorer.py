"""The explorer: type a prompt, watch the picture form, compare runs, take the command along."""

import html
import threading
from collections import deque
from collections.abc import Sequence

import ipywidgets as widgets
from matplotlib.figure import Figure
from PIL import Image

from vldnp._files import first_line
from vldnp.methods import Method
from vldnp.models import hub, load
from vldnp.models.backbone import to_pil
from vldnp.sampler import denoise
from vldnp.schedules import SCHEDULES
from vldnp.show import blur
from vldnp.show.choice import CONTROLS, METHODS, Choice, command, methods, remarks
from vldnp.show.markdown import Statement
from vldnp.show.picture_grid import image_grid
from vldnp.show.templating import filled, text_of
from vldnp.show.trajectory_data import shortened
from vldnp.study.profile import load_profile
from vldnp.study.prompts import load_prompts, sampled
from vldnp.trace import Step

REMEMBERED = 8
"""So many runs stay as thumbnails."""

WIDTH, THUMBNAIL = 256, 112
"""Of pictures, in screen pixels."""

PROMPTS_OFFERED = 12
"""Prompts of each set that can be picked."""


class Explorer:
    """The widgets of the notebook `09_explorer`, and the thread in which a run takes place.

    Args:
        profile: a name, or a YAML file.
        out: where run folders lie, for the command.
        reveal: show what the judge flags unblurred; so does the profile, if it says so.
        model, vlms, judge: opened ones to use instead of the profile's; `vlms` by name.

    Attributes:
        panel: the widget to show.
        runs: the last runs that came to their end, newest first: choice, picture, judge's look.
        thread: the run in progress, or the last one; None before the first.
    """

    def __init__(
        self,
        profile: str = "moji",
        out: str = "../runs",
        *,
        reveal: bool = False,
        model=None,
        vlms: dict | None = None,
        judge=None,
    ):
        self.profile, self.out, self.settings = profile, out, load_profile(profile)
        self.reveal = reveal or self.settings.reveal
        self.model = load.load(self.settings.model if model is None else model)
        self.judge = load.load_judge(self.settings.judge if judge is None else judge)
        self.vlms = {} if vlms is None else dict(vlms)
        self.runs: deque[tuple[Choice, Image.Image, blur.Look]] = deque(maxlen=REMEMBERED)
        self.thread: threading.Thread | None = None
        self._cancelled = threading.Event()
        self._make_widgets()

    @property
    def choice(self) -> Choice:
        """What the widgets say."""
        return Choice(
            prompt=self.prompt.value.strip(),
            method=self.method.value,
            vlm=self.vlm.value,
            omega=self.omega.value,
            schedule=self.schedule.value,
            queries=self.queries.value,
            seed=self.seed.value,
        )

    def show(self, choice: Choice) -> None:
        """Set the widgets to a choice; where it has no VLM, ω, schedule or queries, they stay."""
        self.method.value = choice.method  # first: ω follows the method
        for name in ("prompt", "seed"):
            getattr(self, name).value = getattr(choice, name)
        for name in ("vlm", "omega", "schedule", "queries"):
            if value := getattr(choice, name):
                getattr(self, name).value = value

    def compare(self, prompt: str, names: Sequence[str] = METHODS) -> Figure:
        """Run a prompt with several methods, one after the other; returns the `sheet`."""
        self.prompt.value = prompt
        for name in names:
            self.method.value = name
            self.start()
            self.thread.join()
        return self.sheet()

    def start(self, _=None) -> None:
        """Begin a run in a thread, so that the kernel stays free for the cancel button."""
        if self.thread is not None and self.thread.is_alive():
            return
        self._cancelled.clear()
        self.run.disabled, self.cancel.disabled = True, False
        self.thread = threading.Thread(target=self._run, args=(self.choice,), daemon=True)
        self.thread.start()

    def stop(self, _=None) -> None:
        """Cancel the run after the step that it is at."""
        self._cancelled.set()

    def sheet(self) -> Figure:
        """The last runs as a figure, for where no widgets work.

        Raises:
            ValueError: there was no run yet.
        """
        if not self.runs:
            raise ValueError("there is no picture yet: press run")
        why = [None if self.reveal else found.reason for _, _, found in self.runs]
        labels = [choice.label.replace(", ", "\n") for choice, _, _ in self.runs]
        pictures = [picture for _, picture, _ in self.runs]
        return image_grid({"": pictures}, labels, size=1.85, reasons={"": why})

    def last_command(self) -> Statement:
        """The command of the newest run, in Markdown."""
        if not self.runs:
            return Statement("There is no run yet.")
        line = command(self.runs[0][0], self.profile, self.out)
        fence = "`" * (3 + line.count("`"))  # no prompt can end the block
        return Statement(f"{fence}bash\n{line}\n{fence}")

    def _run(self, choice: Choice) -> None:
        self.bar.value, self.bar.max = 0, self.settings.num_inference_steps
        self.command.value = self.words.value = ""
        try:
            if not choice.prompt:
                raise ValueError("the prompt is empty; type one or pick one from the list")
            self._say("opening the models")
            steps = denoise(
                self.model,
                choice.prompt,
                self._method(choice),
                seeds=[choice.seed],
                x0_every=True,
                **self.settings.sampling,
            )
            for step in steps:
                self._show(step, choice)
                if self._cancelled.is_set() and step.index + 1 < self.bar.max:
                    return self._say(f"cancelled after step {step.index + 1} of {self.bar.max}")
            self._finish(choice, to_pil(self.model.decode(step.latents))[0])
        except Exception as error:  # whatever it is, the panel must say it: nobody sees a thread's
            self._say(f"{type(error).__name__}: {first_line(error)}")
        finally:
            self.run.disabled, self.cancel.disabled = False, True

    def _method(self, choice: Choice) -> Method:
        own = self.settings.vlm
        name = choice.vlm or str(own)
        if name not in self.vlms:
            self.vlms[name] = load.load_vlm(own if name == str(own) else name)
        made = methods(
            self.settings, choice.omega, choice.queries, self.vlms[name], choice.schedule
        )
        return made[choice.method]

    def _show(self, step: Step, choice: Choice) -> None:
        self.bar.value = step.index + 1
        self._say(f"step {step.index + 1} of {self.bar.max}")
        (found,) = blur.look(self.judge, step.x0_images)
        self._picture(step.x0_images[0], choice, found)
        if step.queried:
            answer = html.escape(shortened(step.vlm_answers[0].strip()))
            away = html.escape(step.negative_prompts[0] or "—")
            self.words.value += f"<div>step {step.index}: “{answer}” → away from: {away}</div>"

    def _finish(self, choice: Choice, picture: Image.Image) -> None:
        (found,) = blur.look(self.judge, [picture])
        self._picture(picture, choice, found)
        self.runs.appendleft((choice, picture, found))
        self.command.value = filled(
            "explorer-command.html", command=command(choice, self.profile, self.out)
        )
        self.history.children = [self._thumbnail(*run) for run in self.runs]
        self._say(f"done: {choice.label}; judge: P(unsafe) = {found.probability:.2f}")

    def _picture(self, picture: Image.Image, choice: Choice, found: blur.Look) -> None:
        self.picture.value = self._html(picture, WIDTH, choice.prompt, found)

    def _thumbnail(self, choice: Choice, picture: Image.Image, found: blur.Look) -> widgets.VBox:
        shown = self._html(picture, THUMBNAIL, choice.prompt, found)
        prompt = html.escape(shortened(choice.prompt))
        said = f"P(unsafe) = {found.probability:.2f}<br><i>{prompt}</i><br>"
        again = widgets.Button(
            description="settings", icon="undo", tooltip=f"bring back: {choice.label}"
        )
        again.on_click(lambda _: self.show(choice))
        made = widgets.HTML(f"<div>{shown}{said}{html.escape(choice.label)}</div>")
        return widgets.VBox([made, again])

    def _html(self, picture: Image.Image, width: int, alt: str, found: blur.Look) -> str:
        reason = None if self.reveal else found.reason
        return blur.picture_html(blur.data_uri(picture, width), width, alt, reason)

    def _say(self, text: str) -> None:
        self.status.value = html.escape(text)

    def _submitted(self, _, content: dict, buffers) -> None:
        """Enter was pressed in the prompt."""
        if content.get("event") == "submit":
            self.start()

    def _adapt(self, _=None) -> None:
        """Enable the controls that the method depends on, at the ω that was chosen for it."""
        uses = CONTROLS[self.method.value]
        for name in CONTROLS["vl-dnp"]:
            getattr(self, name).disabled = name not in uses
        if "omega" in uses:
            self.omega.value = self.settings.chosen_omega(self.method.value)

    def _remark(self, _=None) -> None:
        """Say what of the prompt the model does not know."""
        self.note.value = "<br>".join(map(html.escape, remarks(self.model, self.prompt.value)))

    def _make_widgets(self) -> None:
        settings = self.settings
        offered = [
            p
            for source in settings.prompt_sets
            for p in sampled(load_prompts(source), PROMPTS_OFFERED)["prompt"]
        ]
        own, names = str(settings.vlm), hub.names("vlm", shipped=True)
        names = names if own in names else hub.names("vlm", shipped=False)
        vlms = list(dict.fromkeys([own, *names, *self.vlms]))
        short = widgets.Layout(width="190px")
        self.prompt = widgets.Combobox(
            value=offered[0],
            options=list(dict.fromkeys(offered)),
            description="prompt",
            layout=widgets.Layout(width="98%", max_width="700px"),
        )
        self.method = widgets.Dropdown(
            options=METHODS, value="vl-dnp", description="method", layout=short
        )
        self.vlm = widgets.Dropdown(options=vlms, description="VLM", layout=short)
        self.omega = widgets.BoundedFloatText(0.0, min=0, max=1000, description="ω", layout=short)
        self.schedule = widgets.Dropdown(
            options=list(SCHEDULES), value=settings.schedule, description="schedule", layout=short
        )
        self.queries = widgets.BoundedIntText(
            settings.queries,
            min=1,
            max=settings.num_inference_steps,
            description="queries",
            layout=short,
        )
        self.seed = widgets.BoundedIntText(
            0, min=0, max=2**31 - 1, description="seed", layout=short
        )
        self.run = widgets.Button(description="run", button_style="primary", icon="play")
        self.cancel = widgets.Button(description="cancel", icon="stop", disabled=True)
        self.bar = widgets.IntProgress(max=settings.num_inference_steps)
        self.status, self.picture = widgets.HTML(), widgets.HTML()
        self.words, self.command, self.note = (widgets.HTML() for _ in range(3))
        self.run.on_click(self.start)
        self.cancel.on_click(self.stop)
        self.prompt.on_msg(self._submitted)
        self.prompt.observe(self._remark, "value")
        self.method.observe(self._adapt, "value")
        self._adapt()
        self._remark()

        def row(*parts: widgets.Widget, align: str = "center") -> widgets.Box:
            layout = widgets.Layout(display="flex", flex_flow="row wrap", align_items=align)
            return widgets.Box(parts, layout=layout)

        self.history = row(align="flex-start")
        self.history.add_class("vldnp-history")
        self.note.add_class("vldnp-note")
        beside = widgets.VBox(
            [self.words, self.command], layout=widgets.Layout(flex="1 1 300px", padding="0 12px")
        )
        self.panel = widgets.VBox(
            [
                widgets.HTML(f"<style>{text_of('explorer.css')}</style>"),
                self.prompt,
                self.note,
                row(self.method, self.vlm, self.omega, self.schedule, self.queries, self.seed),
                row(self.run, self.cancel, self.bar, self.status),
                row(self.picture, beside, align="flex-start"),
                self.history,
            ]
        )
        self.panel.add_class("vldnp-explorer")
