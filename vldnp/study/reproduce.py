"""Verifying what is published, and executing the notebooks in order with papermill."""

import os
import sqlite3
import sys
import time
from contextlib import suppress
from pathlib import Path

from vldnp._files import atomic, unknown, write_text

NOTEBOOKS = Path(__file__).resolve().parents[2] / "notebooks"
VIEW = "application/vnd.jupyter.widget-view+json"
"""The kind of an output that shows a widget."""


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
    """Verify a published run; execute the notebooks in order; print what that wrote.

    Args:
        profile: a name in `data/profiles`, or a YAML file.
        out: where run folders lie; executed copies go to `out/<profile>/notebooks`.
        quick: fewer prompts, to see whether everything works; in `out/<profile>-quick`.
        parameters: notebook parameters, which go before the profile's.
        notebooks: their folder; files named 00….ipynb and on are executed.
        verified: how many images of a published run are recomputed; none with `RECOMPUTE=all`.

    Raises:
        ValueError, FileNotFoundError: one line, e.g. for a parameter that no notebook declares.
        NotebookError: a notebook failed; one line says which cell and why.
    """
    import papermill  # slow to import, as torch
    import torch

    from vldnp.study import published, verify
    from vldnp.study.parameters import parameters as check
    from vldnp.study.profile import load_profile
    from vldnp.study.prompts import load_prompts

    started, settings = time.monotonic(), load_profile(profile, quick=quick)
    run, sources = Path(out) / settings.name, notebooks_in(notebooks)
    declared = {source: set(papermill.inspect_notebook(source)) for source in sources}
    known = set().union(*declared.values())
    if strange := [name for name in parameters or {} if name not in known]:
        raise unknown("notebook parameter", strange[0], known)
    given = settings.notebooks | (parameters or {})
    check(settings, **given)
    for source in settings.prompt_sets:  # a misspelled one fails before the first image
        load_prompts(source)
    # Paths as seen from the notebooks, so that executed copies do not name this machine's folders.
    given |= {"out": os.path.relpath(out, notebooks), "quick": quick, "profile": profile}
    if Path(profile).is_file():
        given["profile"] = os.path.relpath(profile, notebooks)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # kernels inherit it
    if verified and not quick and not published.recompute():
        if settings.name in published.published_runs():
            print(f"[0] verifying the published run {settings.name}", file=sys.stderr, flush=True)
            workers = None if torch.cuda.is_available() else os.cpu_count()
            print(verify.verify(settings.name, verified, root=out, workers=workers).details())
    executed = []
    for number, source in enumerate(sources, start=1):
        print(f"[{number}/{len(sources)}] {source.name}", file=sys.stderr, flush=True)
        asked = {name: given[name] for name in given if name in declared[source]}
        executed.append(execute(source, run / "notebooks" / source.name, asked, progress=True))
    print(f"done in {(time.monotonic() - started) / 60:.1f} minutes")
    for path in [run / "table.csv", *sorted((run / "figures").glob("*.png")), *executed]:
        print(f"  {os.path.relpath(path)}{'' if path.exists() else '  (was not written)'}")
    return executed


def notebooks_in(folder: str | Path) -> list[Path]:
    """The notebooks of a folder that are executed, in order: those below 11. Others read runs."""
    numbered = sorted(Path(folder).glob("[0-9][0-9]*.ipynb"))
    if found := [path for path in numbered if path.stem < "11"]:
        return found
    raise FileNotFoundError(f"no notebooks in {folder}: files named 00….ipynb and on are executed")


def execute(source: Path, target: Path, parameters: dict, *, progress: bool = False) -> Path:
    """Execute one notebook in its own folder into `target`, which this user's JupyterLab trusts.

    Raises:
        NotebookError: it failed; one line says which cell and why.
    """
    import nbformat
    import papermill
    import zmq
    from papermill.exceptions import PapermillExecutionError
    from traitlets.config import Config

    # Without encryption a kernel warns that its messages could be read on this machine.
    encryption = {"transport_encryption": "auto" if zmq.has("curve") else "disabled"}
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        papermill.execute_notebook(
            os.path.relpath(source),
            os.path.relpath(target),
            parameters=parameters,
            kernel_name="python3",
            cwd=source.parent,
            progress_bar=progress,
            config=Config(KernelManager=encryption),
        )
    except PapermillExecutionError as error:
        reason = ((error.evalue or "").strip().splitlines() or ["no message"])[0]
        raise NotebookError(
            f"{source.name} failed in cell {error.exec_count}: {error.ename}: {reason} (traceback "
            f"in {os.path.relpath(target)})"
        ) from error
    with atomic(target) as temporary:
        nbformat.write(without_widgets(nbformat.read(target, as_version=4)), temporary)
    trust(target)
    return target


def report(run: str | Path, reveal: bool = False) -> Path:
    """A run folder as one self-contained page: its `report.html`, from the notebook 12_report."""
    from nbconvert import HTMLExporter

    run, source = Path(run), NOTEBOOKS / "12_report.ipynb"
    if not (run / "config.json").is_file():
        raise FileNotFoundError(f"{run} is no run folder: there is no config.json")
    given = {"run": os.path.relpath(run, source.parent), "reveal": reveal}
    executed = execute(source, run / "notebooks" / source.name, given)
    page, _ = HTMLExporter(exclude_input=True, embed_images=True).from_filename(str(executed))
    write_text(run / "report.html", page)
    return run / "report.html"


def without_widgets(notebook):
    """The notebook without what shows a widget, which needs a kernel; changed in place."""
    notebook.metadata.pop("widgets", None)
    for cell in notebook.cells:
        if "outputs" in cell:
            cell.outputs = [out for out in cell.outputs if VIEW not in out.get("data", {})]
    return notebook


def trust(path: Path) -> None:
    """Sign a notebook that was executed here, as JupyterLab does, so that it shows all outputs."""
    import nbformat
    from jupyter_core.paths import jupyter_data_dir
    from nbformat.sign import NotebookNotary

    with suppress(OSError, sqlite3.Error):  # Jupyter's own folder cannot be written to
        Path(jupyter_data_dir()).mkdir(parents=True, exist_ok=True)
        with NotebookNotary(data_dir=jupyter_data_dir()) as notary:
            notary.sign(nbformat.read(path, as_version=4))
