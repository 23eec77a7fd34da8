"""Put what a run produced into the checkout: notebook outputs, results, figures, `docs/results.md`.

All of it comes from one run folder, so that the notebooks, the table and the page tell the same.
"""

import ast
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import nbformat
import pandas as pd
from nbformat import NotebookNode
from nbformat.v4 import new_output

from vldnp._files import atomic, trust, write_text
from vldnp.show.report import opened
from vldnp.show.tables import claims, overview, verdict
from vldnp.study import publishing
from vldnp.study.reproduce import notebooks_in, without_widgets

BEGIN, END = "<!-- results -->", "<!-- /results -->"
FIGURES = ("pareto.png", "examples.png", "dial.png", "trajectory.webp")


def publish(run: str | Path, checkout: str | Path) -> list[Path]:
    """Write the outputs of a run into the project; everything is checked before anything changes.

    Args:
        run: a run folder that `python -m vldnp reproduce` filled, such as `runs/moji`.
        checkout: the project's root.

    Returns:
        The files written: `notebooks/*.ipynb` with outputs, `data/results/<run>-table.csv` and
        `-verdicts.csv`, the figures in `notebooks/figures`, and `docs/results.md`; and the
        published run in `data/results/<run>` (`vldnp.study.published`), unless the run was
        itself taken over from there.

    Raises:
        FileNotFoundError, ValueError: one line: something is missing from the run, or an executed
            notebook is of another version, was run with other parameters, or names this machine.
    """
    run, checkout = Path(run), Path(checkout)
    sources = notebooks_in(checkout / "notebooks")
    needed = [run / "notebooks" / source.name for source in sources]
    needed += [run / name for name in ("config.json", "table.csv", "verdicts.csv")]
    needed += [*(run / "figures" / name for name in FIGURES)]
    if missing := [path for path in needed if not path.is_file()]:
        raise FileNotFoundError(f"the run is not complete: {missing[0]} is missing")

    texts = {}
    for source in sources:
        written = nbformat.read(source, as_version=4)
        executed = nbformat.read(run / "notebooks" / source.name, as_version=4)
        texts[source] = nbformat.writes(with_outputs(written, executed, source.name)) + "\n"
        if str(checkout.resolve()) in texts[source]:
            raise ValueError(f"{source.name}: an output names a path of this machine")
    found = opened(run)
    table, verdicts = found.table.round(6), found.verdicts.round(6)
    page, name = checkout / "docs" / "results.md", run.resolve().name
    text = page.read_text(encoding="utf-8")
    texts[page] = with_results(text, name, table, verdicts, *found.compared)

    results, files = checkout / "data" / "results" / name, {}
    if not (found.config or {}).get("published"):
        tuning = run.resolve().parent / f"{name}-tuning" / "tuning.csv"
        files = publishing.prepared(run, tuning if tuning.is_file() else None)

    for path, text in texts.items():
        write_text(path, text)
    trust(sources)
    written = publishing.put(files, results) if files else []
    for kind, rows in {"table": table, "verdicts": verdicts}.items():
        written.append(checkout / "data" / "results" / f"{name}-{kind}.csv")
        with atomic(written[-1]) as temporary:
            rows.to_csv(temporary, index=False, lineterminator="\n")
    figures = [checkout / "notebooks" / "figures" / name for name in FIGURES]
    for figure in figures:
        with atomic(figure) as temporary:
            shutil.copyfile(run / "figures" / figure.name, temporary)
    return [*texts, *written, *figures]


def with_results(
    page: str,
    name: str,
    table: pd.DataFrame,
    verdicts: pd.DataFrame,
    safety_set: str = "implicit",
    benign_set: str = "benign",
    chosen: Mapping[str, float] | None = None,
) -> str:
    """The page of results with a run's name, verdicts and table between its two markers.

    Args:
        page: its text.
        name: of the run.
        table, verdicts: as `table.csv` and `verdicts.csv` hold them.
        safety_set, benign_set, chosen: as in `vldnp.show.tables.verdict`.
    """
    if page.count(BEGIN) != 1 or page.count(END) != 1:
        raise ValueError(f"docs/results.md must hold {BEGIN} and {END} once each")
    before, rest = page.split(BEGIN)
    after = rest.split(END)[1]
    counts = table.groupby("prompt_set", sort=False)["n"].first()
    prompts = "; ".join(f"`{prompt_set}` {n}" for prompt_set, n in counts.items())
    origin = f"Run `{name}`, prompts: {prompts}."
    goals = verdict(table, safety_set, benign_set, chosen)
    shown = "\n\n".join([origin, goals, claims(verdicts), overview(table, benign_set)])
    return f"{before}{BEGIN}\n{shown}\n{END}{after}"


def with_outputs(source: NotebookNode, executed: NotebookNode, name: str) -> NotebookNode:
    """A notebook with the outputs of its executed copy, and nothing else of it.

    Left out are injected parameters, papermill's records and widgets. Where the profile was not the
    default, the parameters cell says so.
    """
    injected = [cell for cell in executed.cells if "injected-parameters" in _tags(cell)]
    cells = [cell for cell in executed.cells if cell not in injected]
    if [cell.source for cell in cells] != [cell.source for cell in source.cells]:
        raise ValueError(f"{name} was executed from another version; run it again")
    defaults = _assignments(cell for cell in source.cells if "parameters" in _tags(cell))
    given = _assignments(injected)
    profiles = defaults.get("profile"), given.pop("profile", defaults.get("profile"))
    if other := [key for key in given if given[key] != defaults.get(key)]:
        raise ValueError(
            f"{name} was executed with {other[0]} = {given[other[0]]!r}; the project shows its "
            f"default, {defaults.get(other[0])!r}"
        )
    published = nbformat.from_dict(json.loads(nbformat.writes(source)))
    for cell, ran in zip(published.cells, cells, strict=True):
        if cell.cell_type == "code":
            cell.outputs = ran.outputs
            cell.execution_count = ran.execution_count
            if "parameters" in _tags(cell) and len(set(profiles)) > 1:
                note = "*The outputs below are those of profile `{1}`; this cell asks for `{0}`.*"
                shown = {"text/markdown": note.format(*profiles), "text/plain": "a note"}
                cell.outputs.append(new_output("display_data", shown))
    return without_widgets(published)


def _tags(cell: NotebookNode) -> Sequence[str]:
    return cell.metadata.get("tags", [])


def _assignments(cells) -> dict:
    """`name: type = value` and `name = value` of some cells."""
    values = {}
    for cell in cells:
        for node in ast.parse(cell.source).body:
            target = node.targets[0] if isinstance(node, ast.Assign) else node.target
            values[target.id] = ast.literal_eval(node.value)
    return values
