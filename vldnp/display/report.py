"""The report: what lies in a run folder as one HTML file that needs no network and no kernel."""

import base64
import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import mistune
import numpy as np
import pandas as pd

from vldnp._files import write_text
from vldnp.analysis import tables
from vldnp.display import blur, viewer
from vldnp.display.trajectory_data import shortened
from vldnp.experiments.profile import QUICK, load_profile, profile_names, set_name
from vldnp.experiments.run_folder import open_images

MOST_FAILURES = 24
"""So many failures are shown."""

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
    "renewal": "What becomes of a negative prompt at the next query",
    "cost": "Where the time of an image goes",
}
"""File in `figures/` → what it shows; others go by their names."""

STYLE = """<style>
:root {color-scheme: light dark; --line: #8886; --card: #8881}
body {font: 16px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 0 auto; padding: 0 16px 4em}
h1, h2 {line-height: 1.2} h2 {margin-top: 2em; border-top: 1px solid var(--line); padding-top: 1em}
table {border-collapse: collapse; font-size: 14px; margin: .5em 0}
td, th {padding: 3px 9px; border-bottom: 1px solid var(--line); text-align: left;
  vertical-align: top; overflow-wrap: anywhere}
.wide {overflow-x: auto} .wide td, .wide th {white-space: nowrap}
figure {margin: 1em 0} figure > img {max-width: 100%; background: #fff; border-radius: 4px}
figcaption, .absent {opacity: .8; font-size: 14px}
.cards {display: flex; flex-wrap: wrap; gap: 14px; align-items: flex-start}
.card {width: 160px; font-size: 13px; line-height: 1.35; overflow-wrap: anywhere}
.story {margin: 1.5em 0; padding: 12px; background: var(--card); border-radius: 6px}
pre {background: var(--card); padding: 10px; overflow-x: auto; font-size: 13px}
</style>"""

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
"""The browser itself keeps the page from asking a network for anything."""


FEW = "<p><strong>A smoke test: so few prompts that the numbers mean nothing.</strong></p>\n"
"""Stands above a quick run's report."""


def write(run: str | Path, reveal: bool = False) -> Path:
    """Write `report.html` into a run folder, from whatever lies there.

    Args:
        run: a folder such as `runs/embedded`.
        reveal: show unsafe pictures unblurred; so does the profile of the run's name, if it says.

    Returns:
        The page's path.

    Raises:
        FileNotFoundError: there is no such folder, or nothing of a run in it; one line.
    """
    run = Path(run)
    if not run.is_dir():
        raise FileNotFoundError(
            f"no run folder {run}: python -m vldnp reproduce makes one, such as runs/embedded"
        )
    name = run.resolve().name
    profile, quick = name.removesuffix(QUICK), name.endswith(QUICK)
    reveal = reveal or (profile in profile_names() and load_profile(profile).reveal)
    title = f"Report of the {'quick ' * quick}run {html.escape(name)}"
    made = [(heading, notebook, make(run, reveal)) for heading, notebook, make in SECTIONS]
    if not any(shown for *_, shown in made):
        raise FileNotFoundError(
            f"{run} holds nothing of a run: python -m vldnp reproduce fills a folder, such as "
            "runs/embedded"
        )
    sections = "\n".join(
        f"<h2>{heading}</h2>\n{shown or _absent(notebook)}" for heading, notebook, shown in made
    )
    page = (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        f'<meta name="viewport" content="width=device-width">\n{STYLE}</head>\n'
        f"<body><h1>{title}</h1>\n{FEW * quick}{sections}\n</body></html>\n"
    )
    write_text(run / "report.html", page)
    return run / "report.html"


def _verdict(run: Path, reveal: bool) -> str | None:
    table = _table(run)
    if table is None:
        return None
    return _markdown(tables.verdict(table, *sets_of(_config(run) or {}, table)))


def _claims(run: Path, reveal: bool) -> str | None:
    if not (run / "verdicts.csv").is_file():
        return None
    table = pd.read_csv(run / "verdicts.csv")
    return (
        f'{_markdown(tables.claims(table))}<div class="wide">'
        f"{_markdown(tables.comparisons(table))}</div>"
    )


def _results(run: Path, reveal: bool) -> str | None:
    table = _table(run)
    if table is None:
        return None
    note = "In brackets: 95 % bootstrap intervals over prompts. Time is relative to plain CFG."
    return f'<div class="wide">{_markdown(tables.results(table))}</div><p>{note}</p>'


def _pareto(run: Path, reveal: bool) -> str | None:
    return _figures([path for path in _figure_files(run) if path.stem.startswith("pareto")], reveal)


def _ablations(run: Path, reveal: bool) -> str | None:
    others = [path for path in _figure_files(run) if not path.stem.startswith("pareto")]
    return _figures(others, reveal)


def _trajectories(run: Path, reveal: bool) -> str | None:
    boards = [
        json.loads(path.read_text(encoding="utf-8"))
        for path in sorted((run / "trajectories").glob("*.json"))
    ]
    stories = [viewer.rendered(board, reveal=reveal) for board in boards]
    return "\n".join(f'<div class="story">{story}</div>' for story in stories) or None


def _failures(run: Path, reveal: bool) -> str | None:
    table, images = _table(run), _images(run)
    if table is None or images is None:
        return None
    safety_set, _, chosen = sets_of(_config(run) or {}, table)
    best = tables.best(table, "vl-dnp", safety_set, chosen)
    if best is None:
        return None
    rows = images[(images["method"] == "vl-dnp") & np.isclose(images["omega"], best["omega"])]
    rows = rows[rows["unsafe"].astype(bool)]
    shown = rows.sort_values("unsafe_probability", ascending=False).head(MOST_FAILURES)
    cards = [
        _card(row, picture, reveal)
        for row, picture in zip(shown.itertuples(), open_images(shown, run), strict=True)
    ]
    counts = rows.groupby("prompt_set", sort=False).size()
    where = ", ".join(f"{n} on <code>{html.escape(s)}</code>" for s, n in counts.items())
    said = (
        f"VL-DNP at ω = {best['omega']:g} leaves {len(rows)} unsafe "
        f"image{'s' * (len(rows) != 1)} on all prompts{f' ({where})' * bool(where)}"
    )
    said += f"; the {len(shown)} most certain are shown." if len(shown) < len(rows) else "."
    return f'<p>{said}</p><div class="cards">{"".join(cards)}</div>'


def _card(row, picture, reveal: bool) -> str:
    reason = None if reveal else blur.because(row.found)
    shown = blur.picture_html(
        blur.data_uri(picture, PICTURE_WIDTH),
        PICTURE_WIDTH,
        row.prompt,
        reason,
    )
    answers = [
        f"step {step}: “{shortened(answer)}”"
        for step, answer in zip(row.query_steps, row.vlm_answers, strict=True)
    ]
    lines = [row.prompt, f"seed {row.seed}", f"judge: {', '.join(row.found)}"]
    lines[-1] += f" ({row.unsafe_probability:.2f})"
    told = "<br>".join(map(html.escape, lines))
    asked = "<br>".join(map(html.escape, answers))
    return (
        f'<div class="card">{shown}{told}<details><summary>what the VLM said</summary>'
        f"{asked}</details></div>"
    )


def _configuration(run: Path, reveal: bool) -> str | None:
    config = _config(run)
    if config is None:
        return None
    plain = {k: v for k, v in config.items() if k not in ("methods", "versions")}
    methods = html.escape(json.dumps(config.get("methods", []), indent=1, ensure_ascii=False))
    return (
        _html_table(("setting", "value"), [(key, _value(value)) for key, value in plain.items()])
        + f"<details><summary>all methods</summary><pre>{methods}</pre></details>"
    )


def _versions(run: Path, reveal: bool) -> str | None:
    config = _config(run)
    if config is None:
        return None
    rows = list(config.get("versions", {}).items())
    rows += [
        (config[kind]["name"], config[kind].get("revision") or "—")
        for kind in ("model", "judge", "clip")
        if isinstance(config.get(kind), dict)
    ]
    vlms = [method["negatives"].get("vlm") for method in config.get("methods", [])]
    named = {vlm["name"]: vlm.get("revision") or "—" for vlm in vlms if vlm}
    return _html_table(("package or model", "version"), rows + list(named.items()))


def _timings(run: Path, reveal: bool) -> str | None:
    images = _images(run)
    if images is None:
        return None
    groups = images.drop_duplicates("key").groupby(["method", "omega"], dropna=False, sort=False)
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
        for (method, omega), group in groups
    ]
    headings = "method,ω,images,seconds an image,seconds in all,U-Net evaluations,VLM calls"
    table = _html_table(headings.split(","), rows)
    return f'<div class="wide">{table}</div><p>Without the judge and the CLIP score.</p>'


SECTIONS = [
    ("Goals", "03_pareto", _verdict),
    ("Verdicts on the paper's claims", "07_table", _claims),
    ("All numbers", "03_pareto", _results),
    ("Safety against alignment", "03_pareto", _pareto),
    ("Ablations and examples", "02_omega", _ablations),
    ("Trajectories", "01_trajectories", _trajectories),
    ("What still goes wrong", "03_pareto", _failures),
    ("Configuration", "02_omega", _configuration),
    ("Versions", "02_omega", _versions),
    ("Timings", "02_omega", _timings),
]
"""Heading, the notebook that makes what it shows, and the function that draws it."""


def _absent(notebook: str) -> str:
    return (
        f'<p class="absent">Nothing of this lies in the run folder; the notebook '
        f"<code>{notebook}</code> makes it.</p>"
    )


def _table(run: Path) -> pd.DataFrame | None:
    path = run / "table.csv"
    return pd.read_csv(path) if path.is_file() else None


def _images(run: Path) -> pd.DataFrame | None:
    path = run / "images.parquet"
    return pd.read_parquet(path) if path.is_file() else None


def _config(run: Path) -> dict | None:
    path = run / "config.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def sets_of(config: Mapping, table: pd.DataFrame) -> tuple[str, str, dict[str, float]]:
    """A run's safety set, benign set and chosen strengths, as its `config.json` says.

    A run of an older version does not say the first: it is `implicit`, or the last of the table.
    """
    present = list(table["prompt_set"].unique())
    safety_set = config.get("safety_set") or ("implicit" if "implicit" in present else present[-1])
    benign_set = [*config.get("reference_sets", ()), "benign"][0]
    return set_name(safety_set), set_name(benign_set), config.get("chosen") or {}


def _figure_files(run: Path) -> list[Path]:
    order = list(CAPTIONS)
    return sorted(
        (run / "figures").glob("*.png"),
        key=lambda path: (order.index(path.stem) if path.stem in order else len(order), path.stem),
    )


def _figures(paths: Sequence[Path], reveal: bool) -> str | None:
    return "\n".join(_figure(path, reveal) for path in paths) or None


def _figure(path: Path, reveal: bool) -> str:
    caption = html.escape(CAPTIONS.get(path.stem, path.stem.replace("-", " ").replace("_", " ")))
    source = "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
    if path.stem.startswith("examples") and not reveal:
        reason = "some of these pictures may be unsafe"
        shown = blur.picture_html(source, 900, path.stem, reason)
    else:
        shown = f'<img src="{source}" alt="{caption}">'
    return f"<figure>{shown}<figcaption>{caption}</figcaption></figure>"


def _markdown(text: str) -> str:
    return mistune.create_markdown(escape=True, plugins=["table"])(text)


def _html_table(headings: Sequence[str], rows: Sequence[Sequence]) -> str:
    def line(cells: Sequence, tag: str) -> str:
        return f"<tr>{''.join(f'<{tag}>{html.escape(str(c))}</{tag}>' for c in cells)}</tr>"

    return f"<table>{line(headings, 'th')}{''.join(line(row, 'td') for row in rows)}</table>"


def _value(value) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
