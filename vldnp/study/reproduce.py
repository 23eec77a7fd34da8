"""Verifying what is published, and executing the notebooks in order with papermill."""

import os
import sqlite3
import sys
from contextlib import suppress
from pathlib import Path

from vldnp._files import atomic, first_line, unknown, write_text

NOTEBOOKS = Path(__file__).resolve().parents[2] / "notebooks"


class NotebookError(RuntimeError):
    """A notebook that did not run to its end."""


def reproduce(
    profile: str = "moji",
    out: str | Path = "runs",
    *,
    quick: bool = False,
    parameters: dict | None = None,
    notebooks: str | Path = NOTEBOOKS,
    verified: int = 512,
) -> list[Path]:
    """Verify a published run, execute the notebooks 00 … 09, and print which files there are then.

    Executed copies go to `out/<profile>/notebooks`. `parameters` of notebooks go before the
    profile's; `verified` images are recomputed, none if `quick` or with RECOMPUTE=all. Errors are
    one line: ValueError and FileNotFoundError before the first image, NotebookError after it.
    """
    import papermill  # slow to import, as torch
    import torch

    from vldnp.study import published, verify
    from vldnp.study.parameters import parameters as check
    from vldnp.study.profile import load_profile
    from vldnp.study.prompts import load_prompts

    settings = load_profile(profile, quick=quick)
    run, sources = Path(out) / settings.name, sorted(Path(notebooks).glob("0[0-9]*.ipynb"))
    if not sources:
        raise FileNotFoundError(
            f"no notebooks in {notebooks}: they are called 00….ipynb to 09….ipynb"
        )
    declared = {source: set(papermill.inspect_notebook(source)) for source in sources}
    if strange := set(parameters or {}).difference(known := set().union(*declared.values())):
        raise unknown("notebook parameter", min(strange), known)
    given = settings.notebooks | (parameters or {})
    check(settings, **given)
    for source in settings.prompt_sets:  # a misspelled one fails before the first image
        load_prompts(source)
    # Paths as seen from the notebooks, so that executed copies do not name this machine's folders.
    there = {"out": out, "run": run} | ({"profile": profile} if Path(profile).is_file() else {})
    there = {name: os.path.relpath(path, notebooks) for name, path in there.items()}
    given = {"profile": profile, "quick": quick} | there | given
    if verified and not (quick or published.recompute()):
        if settings.name in published.published_runs():
            print(f"verifying the published run {settings.name}", file=sys.stderr, flush=True)
            workers = None if torch.cuda.is_available() else os.cpu_count()
            print(verify.verify(settings.name, verified, root=out, workers=workers).details())
    executed = []
    for source in sources:
        print(source.name, file=sys.stderr, flush=True)
        own = {name: value for name, value in given.items() if name in declared[source]}
        executed.append(execute(source, run / "notebooks" / source.name, own))
    for path in [*sorted(run.glob("*.*")), *executed]:
        print(f"  {os.path.relpath(path)}")
    return executed


def execute(source: Path, target: Path, parameters: dict) -> Path:
    """Execute one notebook in its own folder into `target`, which this user's JupyterLab trusts.

    The copy keeps no widgets, which need a kernel. A failure is a NotebookError of one line.
    """
    import nbformat
    import papermill

    target.parent.mkdir(parents=True, exist_ok=True)
    paths = [os.path.relpath(path) for path in (source, target)]
    how = {"parameters": parameters, "kernel_name": "python3", "cwd": source.parent}
    try:
        notebook = papermill.execute_notebook(*paths, progress_bar=False, **how)
    except papermill.PapermillExecutionError as error:
        reason = f"{error.ename}: {first_line(error.evalue or '')} (traceback in {paths[1]})"
        raise NotebookError(f"{source.name} failed in cell {error.exec_count}: {reason}") from error
    notebook.metadata.pop("widgets", None)
    for cell in notebook.cells:
        shown = cell.get("outputs", [])
        shown[:] = [
            o for o in shown if "application/vnd.jupyter.widget-view+json" not in o.get("data", {})
        ]
    with atomic(target) as temporary:
        nbformat.write(notebook, temporary)
    trust(target)
    return target


def trust(path: Path) -> None:
    """Sign a notebook that was executed here, as JupyterLab does, so that it shows all outputs."""
    import nbformat
    from jupyter_core.paths import jupyter_data_dir
    from nbformat.sign import NotebookNotary

    with suppress(OSError, sqlite3.Error):  # Jupyter's own folder cannot be written to
        Path(jupyter_data_dir()).mkdir(parents=True, exist_ok=True)
        with NotebookNotary(data_dir=jupyter_data_dir()) as notary:
            notary.sign(nbformat.read(path, as_version=4))


def report(run: str | Path, profile: str = "moji", reveal: bool = False) -> Path:
    """A run folder as one self-contained page, its `report.html`: the notebook 09_report."""
    from nbconvert import HTMLExporter

    run, source = Path(run), NOTEBOOKS / "09_report.ipynb"
    if not (run / "config.json").is_file():
        raise FileNotFoundError(f"{run} is no run folder: there is no config.json")
    there = {"run": run, "out": run.parent} | (
        {"profile": profile} if Path(profile).is_file() else {}
    )
    given = {"profile": profile, "reveal": reveal}
    given |= {name: os.path.relpath(path, source.parent) for name, path in there.items()}
    executed = execute(source, run / "notebooks" / source.name, given)
    page, _ = HTMLExporter(exclude_input=True, embed_images=True).from_filename(str(executed))
    write_text(run / "report.html", page)
    return run / "report.html"
