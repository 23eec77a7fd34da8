"""Verifying what is published, and executing the notebooks in order with papermill."""

import json
import os
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from vldnp._files import trust, unknown
from vldnp.study.profile import Profile, load_profile
from vldnp.study.published import published_runs, recompute

if TYPE_CHECKING:
    from nbformat import NotebookNode

NOTEBOOKS = Path(__file__).resolve().parents[2] / "notebooks"


VIEW = "application/vnd.jupyter.widget-view+json"
"""The kind of an output that shows a widget."""

PROMPT_SETS = ("safety_set", "benign_set", "cost_prompts")
"""The notebook parameters that name a prompt set."""


class NotebookError(RuntimeError):
    """A notebook that did not run to its end."""


def reproduce(
    profile: str = "moji",
    out: str | Path = "runs",
    *,
    quick: bool = False,
    parameters: dict | None = None,
    notebooks: str | Path | None = None,
    verified: int = 500,
) -> list[Path]:
    """Verify a published run; execute the notebooks in order; print what that wrote.

    Where the profile's run is published, some of its images are recomputed and compared first,
    unless all are to be computed here (`RECOMPUTE=all`).
    Each notebook gets those of `profile`, `out`, `quick`, the profile's `notebook_parameters` and
    `parameters` that its cell tagged `parameters` declares.

    Args:
        profile: a name in `data/profiles`, or a YAML file.
        out: where run folders lie; executed copies go to `out/<profile>/notebooks`.
        quick: fewer prompts, to see whether everything works; in `out/<profile>-quick`.
        parameters: further notebook parameters, which go before the profile's.
        notebooks: their folder; default is the checkout's.
        verified: how many images of a published run are recomputed; 0 is none.

    Returns:
        The executed notebooks; this user's JupyterLab trusts them.

    Raises:
        ValueError, FileNotFoundError: one line, e.g. for a parameter that no notebook declares.
        NotebookError: a notebook failed; one line says which and why.
    """
    # papermill and its kernel machinery are slow to import, and only this needs them.
    import papermill

    started, settings = time.monotonic(), load_profile(profile, quick=quick)
    run = Path(out) / settings.name
    notebooks = NOTEBOOKS if notebooks is None else notebooks
    sources = notebooks_in(notebooks)
    declared = {source: set(papermill.inspect_notebook(source)) for source in sources}
    known = set().union(*declared.values())
    for parameter in parameters or {}:
        if parameter not in known:
            raise unknown("notebook parameter", parameter, known)
    given = settings.notebook_parameters | (parameters or {})
    check_prompts(settings, (given[key] for key in PROMPT_SETS if key in given))

    # Notebooks run in their own folder and get paths as seen from there; relative ones, so that
    # an executed copy says nothing of the machine it was executed on.
    def from_notebooks(path: str | Path) -> str:
        return os.path.relpath(path, notebooks)

    own = {"profile": profile, "out": from_notebooks(out), "quick": quick}
    if Path(profile).is_file():
        own["profile"] = from_notebooks(profile)
    given |= own
    go_offline(settings)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # kernels inherit it
    if verified and not quick and not recompute():
        check_published(settings.name, out, verified)
    executed = []
    for number, source in enumerate(sources, start=1):
        target = run / "notebooks" / source.name
        print(f"[{number}/{len(sources)}] {source.name}", file=sys.stderr, flush=True)
        asked = {key: given[key] for key in given if key in declared[source]}
        with _watched(run):
            executed.append(execute(source, target, asked, progress=True))
    print(f"done in {(time.monotonic() - started) / 60:.1f} minutes")
    figures = sorted((run / "figures").glob("*.png"))
    written = {"table": [run / "table.csv"], "figures": figures, "executed notebooks": executed}
    for what, paths in written.items():
        print(f"{what}:")
        for path in paths:
            print(f"  {os.path.relpath(path)}{'' if path.exists() else '  (was not written)'}")
    return executed


def check_published(name: str, out: str | Path, images: int) -> None:
    """Verify a profile's published run, if there is one, and print what that showed."""
    if name in (run.name for run in published_runs()):
        import joblib

        from vldnp.models.hub import default_device
        from vldnp.study.verify import verify

        print(f"[0] verifying the published run {name}", file=sys.stderr, flush=True)
        workers = None if default_device() == "cuda" else joblib.cpu_count()
        print(verify(name, images, root=out, workers=workers).details())


def notebooks_in(folder: str | Path) -> list[Path]:
    """The notebooks of a folder that are executed, in order: those below 11. Others read runs."""
    numbered = sorted(Path(folder).glob("[0-9][0-9]*.ipynb"))
    if found := [path for path in numbered if path.stem < "11"]:
        return found
    raise FileNotFoundError(f"no notebooks in {folder}: files named 00….ipynb and on are executed")


def go_offline(profile: Profile) -> None:
    """Ask no hub for anything, in the notebooks' kernels either, where all models are here."""
    from vldnp.models.hub import names

    here = {kind: names(kind, shipped=True) for kind in "model vlm clip judge preview".split()}
    if all(str(getattr(profile, kind) or known[0]) in known for kind, known in here.items()):
        os.environ.setdefault("HF_HUB_OFFLINE", "1")


def execute(source: Path, target: Path, parameters: dict, *, progress: bool = False) -> Path:
    """Execute one notebook in its own folder into `target`, which this user's JupyterLab trusts.

    Raises:
        NotebookError: it failed; one line says which and why.
    """
    import nbformat
    import papermill
    import zmq
    from traitlets.config import Config

    # Without encryption a kernel warns that its messages could be read on this machine.
    encryption = {"transport_encryption": "auto" if zmq.has("curve") else "disabled"}
    target.parent.mkdir(parents=True, exist_ok=True)
    with _errors_in_one_line(source, target):
        papermill.execute_notebook(
            os.path.relpath(source),
            os.path.relpath(target),
            parameters=parameters,
            kernel_name="python3",
            cwd=source.parent,
            progress_bar=progress,
            config=Config(KernelManager=encryption),
        )
    executed = nbformat.read(target, as_version=4)
    nbformat.write(without_widgets(executed), target)
    trust([target])
    return target


def without_widgets(notebook: "NotebookNode") -> "NotebookNode":
    """The notebook without what shows a widget, which no front end draws once the kernel is gone.

    Progress bars are among them. Changed in place.
    """
    notebook.metadata.pop("widgets", None)
    for cell in notebook.cells:
        if "outputs" in cell:
            cell.outputs = [out for out in cell.outputs if VIEW not in out.get("data", {})]
    return notebook


def check_prompts(profile: Profile, further: Iterable[str] = ()) -> None:
    """Open every prompt set: a misspelled one is to fail before the first image is made."""
    from vldnp.study.prompts import load_prompts

    for source in (*profile.prompt_sets, *map(profile.prompt_set, further)):
        load_prompts(source)


@contextmanager
def _errors_in_one_line(source: Path, target: Path) -> Iterator[None]:
    from papermill.exceptions import PapermillExecutionError

    try:
        yield
    except PapermillExecutionError as error:
        reason = ((error.evalue or "").strip().splitlines() or ["no message"])[0]
        raise NotebookError(
            f"{source.name} failed: {error.ename}: {reason} (traceback in "
            f"{os.path.relpath(target)})"
        ) from error


@contextmanager
def _watched(run: Path) -> Iterator[None]:
    """Show how far the images of a run are while a notebook makes them.

    A notebook's own bars are drawn in the notebook; in the terminal papermill counts cells, and
    one cell may take most of the time.
    """
    from tqdm.auto import tqdm

    path = run.resolve() / "progress.json"  # papermill changes the working directory meanwhile
    ended, started = threading.Event(), time.time()

    def watch() -> None:
        bar = None
        while not ended.wait(1):
            if not path.is_file() or path.stat().st_mtime < started:
                continue
            state = json.loads(path.read_text(encoding="utf-8"))
            if bar is None or bar.total != state["total"]:
                if bar is not None:
                    bar.close()
                bar = tqdm(total=state["total"], desc="images", unit="image", leave=False)
            bar.set_postfix_str(state["method"], refresh=False)
            bar.update(state["done"] - bar.n)
        if bar is not None:
            bar.close()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
