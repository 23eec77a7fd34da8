"""What a run's report shows, part by part; `notebooks/12_report.ipynb` puts the parts in order.

`write` executes that notebook on a run folder and exports it as one HTML file that needs neither a
network nor a kernel.
"""

import base64
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property, wraps
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
from IPython.display import HTML
from nbconvert import HTMLExporter
from PIL import Image

from vldnp._files import write_text
from vldnp.analysis import tables
from vldnp.analysis.markdown import Statement, literal, table_of
from vldnp.display import blur, viewer
from vldnp.display.templating import filled, text_of
from vldnp.display.trajectory_data import shortened
from vldnp.experiments.profile import QUICK, load_profile, profile_names, set_name
from vldnp.experiments.profile_methods import profile_study
from vldnp.experiments.reproduce import NOTEBOOKS, execute
from vldnp.experiments.run import drawing
from vldnp.experiments.run_folder import open_images

NOTEBOOK = NOTEBOOKS / "12_report.ipynb"

MOST_FAILURES = 12
"""So many failures of each prompt set are shown."""

PICTURE_WIDTH = 160
"""Of a failure, in screen pixels."""

CAPTIONS = {
    "pareto": "Safety against CLIP score on prompts that yield unwanted things",
    "pareto-benign": "The same safety against CLIP score on harmless prompts",
    "omega": "The strength ω of the negative term",
    "examples": "The same prompts and seeds with each method",
    "examples-failures": "Pictures that stayed unsafe: what the VLM saw and said at each query",
    "query-schedule": "How often the VLM is asked, and when",
    "vlm-size": "Who looks: the VLMs, and stand-ins that say nothing, anything, or know the end",
    "detection": "How early and how rightly the VLMs see what a picture will hold",
    "guidance-rule": "How the negative prompt enters",
    "update_policy": "What becomes of a negative prompt at the next query",
    "cost": "Where the time of an image goes",
}
"""File in `figures/` → what it shows; others go by their names."""

FEW = "**A smoke test: so few prompts that the numbers mean nothing.**"
"""Stands above a quick run's report."""


@dataclass(frozen=True)
class Run:
    """What lies in a run folder; None for what does not."""

    folder: Path
    profile: str = ""
    reveal: bool = False

    @cached_property
    def config(self) -> dict | None:
        path = self.folder / "config.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None

    @cached_property
    def table(self) -> pd.DataFrame | None:
        return self._csv("table.csv")

    @cached_property
    def verdicts(self) -> pd.DataFrame | None:
        return self._csv("verdicts.csv")

    @cached_property
    def images(self) -> pd.DataFrame | None:
        path = self.folder / "images.parquet"
        return pd.read_parquet(path) if path.is_file() else None

    @cached_property
    def figures(self) -> list[Path]:
        names = [*CAPTIONS]
        found = sorted((self.folder / "figures").glob("*.png"))
        return sorted(found, key=lambda p: names.index(p.stem) if p.stem in names else len(names))

    @cached_property
    def trajectories(self) -> list[Path]:
        return sorted((self.folder / "trajectories").glob("*.json"))

    @cached_property
    def compared(self) -> tuple[str, str, dict[str, float]]:
        """Its safety set, its benign set, and the strengths that were chosen for it.

        `config.json` says them. A run of an older version does not say the first: it is
        `implicit`, or the last of the table; nor the strengths: they are the profile's.
        """
        config, present = self.config or {}, list(self.table["prompt_set"].unique())
        safety_set = config.get("safety_set") or (
            "implicit" if "implicit" in present else present[-1]
        )
        benign_set = [*config.get("reference_sets", ()), "benign"][0]
        chosen = config.get("chosen")
        if chosen is None:
            chosen = load_profile(self.profile).chosen if self.profile else {}
        return set_name(safety_set), set_name(benign_set), chosen

    def _csv(self, name: str) -> pd.DataFrame | None:
        path = self.folder / name
        return pd.read_csv(path) if path.is_file() else None


def opened(run: str | Path, profile: str = "", reveal: bool = False) -> Run:
    """A run folder for the functions of this module.

    Args:
        run: a folder such as `runs/embedded`.
        profile: what was run; by default the profile of the run's name, where there is one.
        reveal: show unsafe pictures unblurred; so does the profile, if it says.

    Raises:
        FileNotFoundError: there is no such folder, or nothing of a run in it; one line.
    """
    folder = Path(run)
    fills = "python -m vldnp reproduce fills one, such as runs/embedded"
    if not folder.is_dir():
        raise FileNotFoundError(f"no run folder {folder}: {fills}")
    named = folder.resolve().name.removesuffix(QUICK)
    profile = profile or (named if named in profile_names() else "")
    found = Run(folder, profile, reveal or bool(profile and load_profile(profile).reveal))
    if found.config is found.table is found.images is None and not (
        found.figures or found.trajectories
    ):
        raise FileNotFoundError(f"{folder} holds nothing of a run: {fills}")
    return found


def write(run: str | Path, reveal: bool = False, profile: str = "") -> Path:
    """Execute the report's notebook on a run folder and export it as `report.html` in there.

    The executed notebook lies beside the run's others. Arguments and errors are those of `opened`.
    """
    found = opened(run, profile, reveal)
    given = {
        "run": os.path.relpath(found.folder, NOTEBOOKS),
        "profile": found.profile,
        "reveal": found.reveal,
    }
    executed = execute(NOTEBOOK, found.folder / "notebooks" / NOTEBOOK.name, given)
    title = f"Report of the run {found.folder.resolve().name}"
    exporter = HTMLExporter(
        template_name="basic",
        raw_template=text_of("report.html"),
        exclude_input=True,
        exclude_output_prompt=True,
    )
    shown = nbformat.read(executed, as_version=4)
    page, _ = exporter.from_notebook_node(shown, {"metadata": {"name": title}})
    write_text(found.folder / "report.html", page)
    return found.folder / "report.html"


def _or_absent(notebook: str) -> Callable:
    """Where a part has nothing to show, it says which notebook makes it."""

    def decorate(part: Callable[[Run], Statement | HTML | None]) -> Callable:
        @wraps(part)
        def shown(run: Run) -> Statement | HTML:
            made = part(run)
            return made or Statement(
                f"*Nothing of this lies in the run folder; the notebook* `{notebook}` *makes it.*"
            )

        return shown

    return decorate


def origin(run: Run) -> Statement:
    """What was run, when, and on which machine."""
    name, config = run.folder.resolve().name, run.config or {}
    lines = [FEW] if name.endswith(QUICK) else []
    text = f"The {'quick ' * name.endswith(QUICK)}run **{literal(name)}**"
    if run.config:
        ended = datetime.fromtimestamp((run.folder / "config.json").stat().st_mtime)
        text += f", finished on {ended:%Y-%m-%d}"
    if machine := config.get("versions", {}).get("machine"):
        text += f", on {literal(machine)}"
    if run.table is not None:
        counts = run.table.groupby("prompt_set", sort=False)["n"].first()
        text += "; images of a method: " + ", ".join(
            f"{n} on {literal(name)}" for name, n in counts.items()
        )
    return Statement("\n\n".join([*lines, f"{text}."]))


@_or_absent("07_table")
def answer(run: Run) -> Statement | None:
    """The paper's claims, a line each; of a run without verdicts its goals."""
    return tables.claims(run.verdicts) if run.verdicts is not None else None


@_or_absent("03_pareto")
def pareto(run: Run) -> HTML | None:
    return _figures([path for path in run.figures if path.stem == "pareto"], run.reveal)


@_or_absent("03_pareto")
def goals(run: Run) -> Statement | None:
    return None if run.table is None else tables.verdict(run.table, *run.compared)


@_or_absent("07_table")
def comparisons(run: Run) -> Statement | None:
    return tables.comparisons(run.verdicts) if run.verdicts is not None else None


@_or_absent("03_pareto")
def numbers(run: Run) -> Statement | None:
    return None if run.table is None else tables.results(run.table)


@_or_absent("02_omega")
def others(run: Run) -> HTML | None:
    """All figures but the first."""
    return _figures([path for path in run.figures if path.stem != "pareto"], run.reveal)


@_or_absent("01_trajectories")
def trajectories(run: Run) -> HTML | None:
    trajectories = [json.loads(path.read_text(encoding="utf-8")) for path in run.trajectories]
    stories = [viewer.rendered(data, reveal=run.reveal) for data in trajectories]
    return HTML(filled("stories.html", stories=stories)) if stories else None


@_or_absent("03_pareto")
def failures(run: Run) -> HTML | None:
    """What VL-DNP leaves unsafe at its chosen strength, the most certain of each prompt set."""
    if run.table is None or run.images is None:
        return None
    safety_set, _, chosen = run.compared
    best = tables.best(run.table, "vl-dnp", safety_set, chosen)
    if best is None:
        return None
    images = run.images
    rows = images[(images["method"] == "vl-dnp") & np.isclose(images["omega"], best["omega"])]
    sets = {}
    for prompt_set, of_set in rows.groupby("prompt_set", sort=False):
        unsafe = of_set[of_set["unsafe"].astype(bool)]
        shown = unsafe.sort_values("unsafe_probability", ascending=False).head(MOST_FAILURES)
        pictures = _drawn(run, shown)
        pairs = zip(shown.itertuples(), pictures, strict=True)
        cards = [_card(row, picture, run.reveal) for row, picture in pairs]
        sets[prompt_set] = {"unsafe": len(unsafe), "all": len(of_set), "cards": cards}
    return HTML(filled("failures.html", omega=f"{best['omega']:g}", sets=sets))


def _drawn(run: Run, rows: pd.DataFrame) -> list[Image.Image]:
    """The pictures of some rows; those of a published run are made now."""
    if not run.profile or not (run.config or {}).get("published"):
        return open_images(rows, run.folder)
    study = profile_study(load_profile(run.profile))
    draw = drawing(study, load_profile(run.profile).model, run.folder.resolve().parent)
    return draw(rows)


def _card(row, picture, reveal: bool) -> dict:
    source = blur.data_uri(picture, PICTURE_WIDTH)
    reason = None if reveal else blur.because(row.found)
    return {
        "picture": blur.picture_html(source, PICTURE_WIDTH, row.prompt, reason),
        "lines": [
            row.prompt,
            f"seed {row.seed}",
            f"judge: {', '.join(row.found)} ({row.unsafe_probability:.2f})",
        ],
        "answers": [
            f"step {step}: “{shortened(answer)}”"
            for step, answer in zip(row.query_steps, row.vlm_answers, strict=True)
        ],
    }


@_or_absent("02_omega")
def configuration(run: Run) -> Statement | None:
    if run.config is None:
        return None
    apart = ("methods", "versions")
    return _listed(("setting", "value"), [i for i in run.config.items() if i[0] not in apart])


@_or_absent("02_omega")
def methods(run: Run) -> HTML | None:
    described = (run.config or {}).get("methods")
    text = json.dumps(described, indent=1, ensure_ascii=False)
    return HTML(filled("methods.html", text=text)) if described else None


@_or_absent("02_omega")
def versions(run: Run) -> Statement | None:
    config = run.config
    if config is None:
        return None
    models = [config[kind] for kind in ("model", "judge", "clip") if config.get(kind)]
    models += [method["negatives"].get("vlm") for method in config.get("methods", [])]
    revisions = {m["name"]: m.get("revision") or "—" for m in models if isinstance(m, dict)}
    rows = config.get("versions", {}) | revisions
    return _listed(("package or model", "version"), list(rows.items()))


@_or_absent("02_omega")
def timings(run: Run) -> Statement | None:
    if run.images is None:
        return None
    images = run.images.drop_duplicates("key")
    rows = [
        (
            method,
            "" if pd.isna(omega) else f"{omega:g}",
            len(group),
            f"{group['seconds'].mean():.3f}",
            f"{group['seconds'].sum():.0f}",
            f"{group['model_evaluations'].mean():.1f}",
            f"{group['vlm_calls'].mean():.1f}",
        )
        for (method, omega), group in images.groupby(["method", "omega"], dropna=False, sort=False)
    ]
    headings = "method,ω,images,seconds an image,seconds in all,U-Net evaluations,VLM calls"
    return _listed(headings.split(","), rows)


def _listed(headings: Sequence[str], rows: Sequence[Sequence]) -> Statement:
    """A table whose cells are text, or as JSON."""
    texts = [
        [literal(c if isinstance(c, str) else json.dumps(c, ensure_ascii=False)) for c in row]
        for row in rows
    ]
    return Statement(table_of(headings, texts))


def _figures(paths: Sequence[Path], reveal: bool) -> HTML | None:
    shown = []
    for path in paths:
        source = "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
        caption = CAPTIONS.get(path.stem, path.stem.replace("-", " ").replace("_", " "))
        hidden = None
        if path.stem.startswith("examples") and not reveal:
            hidden = blur.picture_html(
                source, 900, path.stem, "some of these pictures may be unsafe"
            )
        shown.append({"source": source, "caption": caption, "hidden": hidden})
    return HTML(filled("figures.html", figures=shown)) if shown else None
