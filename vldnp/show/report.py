"""What a run's report shows, part by part; `notebooks/12_report.ipynb` puts the parts in order.

`write` executes that notebook on a run folder and exports it as one HTML file that needs neither a
network nor a kernel.
"""

import base64
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
from IPython.display import HTML
from nbconvert import HTMLExporter
from PIL import Image

from vldnp._files import write_text
from vldnp.show import blur, tables, viewer
from vldnp.show.markdown import Statement, literal, table_of
from vldnp.show.templating import filled, text_of
from vldnp.show.trajectory_data import shortened
from vldnp.study.claims import CLAIMS, overall
from vldnp.study.profile import QUICK, load_profile, profile_names, set_name
from vldnp.study.profile_methods import profile_study
from vldnp.study.reproduce import NOTEBOOKS, execute
from vldnp.study.run import drawing
from vldnp.study.run_folder import open_images

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

APART = ("methods", "versions")
"""Of `config.json`, what has a place of its own."""

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

    def figures(self, *stems: str) -> list[Path]:
        """The figures of these names, or else all but `pareto`, as `CAPTIONS` lists them."""
        names = [*CAPTIONS]
        found = sorted((self.folder / "figures").glob("*.png"))
        found = [p for p in found if (p.stem in stems if stems else p.stem != "pareto")]
        return sorted(found, key=lambda p: names.index(p.stem) if p.stem in names else len(names))

    @cached_property
    def trajectories(self) -> list[Path]:
        return sorted((self.folder / "trajectories").glob("*.json"))

    @cached_property
    def compared(self) -> tuple[str, str, dict[str, float]]:
        """Its safety set, its benign set, and the strengths that were chosen for it.

        A run that does not say the first has `implicit`, or the last of its prompt sets.
        """
        config = self.config or {}
        present = [set_name(source) for source in config.get("prompt_sets", ["implicit"])]
        safety_set = config.get("safety_set") or (
            "implicit" if "implicit" in present else present[-1]
        )
        benign_set = [*config.get("reference_sets", ()), "benign"][0]
        return set_name(safety_set), set_name(benign_set), config.get("chosen") or {}

    def _csv(self, name: str) -> pd.DataFrame | None:
        path = self.folder / name
        return pd.read_csv(path) if path.is_file() else None


def opened(run: str | Path, profile: str = "", reveal: bool = False) -> Run:
    """A run folder for the functions of this module.

    Args:
        run: a folder such as `runs/moji`.
        profile: what was run; by default the profile of the run's name, where there is one.
        reveal: show unsafe pictures unblurred; so does the profile, if it says.

    Raises:
        FileNotFoundError: there is no such folder, or nothing of a run in it; one line.
    """
    folder = Path(run)
    fills = "python -m vldnp reproduce fills one, such as runs/moji"
    if not folder.is_dir():
        raise FileNotFoundError(f"no run folder {folder}: {fills}")
    named = folder.resolve().name.removesuffix(QUICK)
    profile = profile or (named if named in profile_names() else "")
    found = Run(folder, profile, reveal or bool(profile and load_profile(profile).reveal))
    if found.config is found.table is found.images is None and not (
        found.figures() or found.figures("pareto") or found.trajectories
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


def part(notebook: str, make: Callable, *data):
    """What `make` shows of `data`; where that is not there, which notebook makes it."""
    made = None if any(one is None for one in data) else make(*data)
    absent = f"*Nothing of this lies in the run folder; the notebook* `{notebook}` *makes it.*"
    return Statement(absent) if made is None else made


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


def verdicts(table: pd.DataFrame) -> Statement:
    """The comparisons of each claim, to be unfolded."""
    parts = []
    for claim, verdict in overall(table).items():
        rows = table[table["claim"] == claim]
        said = f"<b>{claim}</b> {CLAIMS.get(claim, '')}: {verdict}, comparisons: {len(rows)}"
        shown = tables.comparisons(rows)
        parts.append(f"<details><summary>{said}</summary>\n\n{shown}\n\n</details>")
    return Statement("\n\n".join(parts))


def trajectories(run: Run) -> HTML | None:
    """The trajectories that notebook 01 saved, each in the viewer."""
    trajectories = [json.loads(path.read_text(encoding="utf-8")) for path in run.trajectories]
    stories = [viewer.rendered(data, reveal=run.reveal) for data in trajectories]
    return HTML(filled("stories.html", stories=stories)) if stories else None


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


def configuration(config: dict) -> Statement:
    """What was resolved, but for methods and versions."""
    return _listed("setting", "value", {k: config[k] for k in config if k not in APART})


def methods(config: dict) -> HTML | None:
    """All settings of the methods, to be unfolded."""
    if "methods" in config:
        text = json.dumps(config["methods"], indent=1, ensure_ascii=False)
        return HTML(filled("methods.html", text=text))


def versions(config: dict) -> Statement:
    """Of packages and models."""
    models = [config[kind] for kind in ("model", "judge", "clip") if config.get(kind)]
    models += [method["negatives"].get("vlm") for method in config.get("methods", [])]
    revisions = {m["name"]: m.get("revision") or "—" for m in models if isinstance(m, dict)}
    return _listed("package or model", "version", config.get("versions", {}) | revisions)


def timings(images: pd.DataFrame) -> pd.DataFrame:
    """What the pictures of each method took."""
    columns = {
        "images": ("key", "size"),
        "seconds an image": ("seconds", "mean"),
        "seconds in all": ("seconds", "sum"),
        "U-Net evaluations": ("model_evaluations", "mean"),
        "VLM calls": ("vlm_calls", "mean"),
    }
    images = images.drop_duplicates("key").rename(columns={"omega": "ω"})
    taken = images.groupby(["method", "ω"], dropna=False, sort=False).agg(**columns)
    return taken.round(3).reset_index("ω").fillna({"ω": ""})


def _listed(left: str, right: str, rows: Mapping) -> Statement:
    """A table of two columns whose cells are text, or as JSON."""
    texts = [
        [literal(c if isinstance(c, str) else json.dumps(c, ensure_ascii=False)) for c in row]
        for row in rows.items()
    ]
    return Statement(table_of((left, right), texts))


def pictures(paths: Sequence[Path], reveal: bool) -> HTML | None:
    """Figures with their captions; examples are blurred."""
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
