"""Verifying what is published, and executing the notebooks in order with papermill."""

import os
import sys
from pathlib import Path

from vldnp._files import atomic, first_line, unknown

NOTEBOOKS = Path(__file__).resolve().parents[2] / "notebooks"


class NotebookError(RuntimeError):
    """A notebook that did not run to its end."""


def reproduce(
    profile="moji", out="runs", *, quick=False, parameters=None, notebooks=NOTEBOOKS, verified=512
) -> list[Path]:
    """Verify a published run, execute the notebooks 00 … 09, and print which files there are then.

    Executed copies go to `out/<profile>/notebooks`. `parameters` of notebooks go before the
    profile's; `verified` images are recomputed, none if `quick` or with RECOMPUTE=all.
    """
    import papermill  # slow to import, as torch
    import torch

    from vldnp.study import profile as profiles
    from vldnp.study import published
    from vldnp.study.prompts import load_prompts

    own, sources = profiles.load_profile(profile, quick=quick), sorted(notebooks.glob("0*.ipynb"))
    run, given = Path(out) / own.name, own.notebooks | (parameters or {})
    if not sources:
        raise FileNotFoundError(f"no notebooks in {notebooks}, which are 00….ipynb to 09….ipynb")
    declared = {source: set(papermill.inspect_notebook(source)) for source in sources}
    if strange := set(parameters or {}).difference(known := set().union(*declared.values())):
        raise unknown("notebook parameter", min(strange), known)
    profiles.parameters(own, **given)
    for source in own.prompt_sets:
        load_prompts(source)
    # Paths as seen from the notebooks, so that copies name no machine's folder.
    seen = {"out": run.parent, "run": run}
    seen |= {"profile": profile} if Path(profile).is_file() else {}
    seen = {name: os.path.relpath(path, notebooks) for name, path in seen.items()}
    given = {"profile": profile, **seen, "quick": quick, **given}
    if verified > 0 and not (quick or published.recompute()):
        if own.name in published.published_runs():
            made = profiles.profile_methods(own), own.model, own.judge, own.clip
            workers = None if torch.cuda.is_available() else os.cpu_count()
            print(published.verify(own.name, *made, images=verified, workers=workers))
    executed = []
    for source in sources:
        print(source.name, file=sys.stderr, flush=True)
        asked = {name: value for name, value in given.items() if name in declared[source]}
        executed.append(execute(source, run / "notebooks" / source.name, asked))
    for path in [*sorted(run.glob("*.*")), *executed]:
        print(f"  {os.path.relpath(path)}")
    return executed


def execute(source: Path, target: Path, parameters: dict) -> Path:
    """Execute one notebook in its own folder into `target`; widgets, which need a kernel, go."""
    import nbformat
    import papermill

    how = {"parameters": parameters, "kernel_name": "python3", "cwd": source.parent}
    view, failed = "application/vnd.jupyter.widget-view+json", None
    with atomic(target) as temporary:
        paths = [os.path.relpath(path) for path in (source, temporary)]
        try:
            papermill.execute_notebook(*paths, progress_bar=False, **how)
        except papermill.PapermillExecutionError as error:
            failed = error
        notebook = nbformat.read(temporary, 4)
        notebook.metadata.pop("widgets", None)
        notebook.metadata.pop("papermill", None)  # it names the temporary path
        for cell in notebook.cells:
            if "outputs" in cell:
                cell.outputs = [out for out in cell.outputs if view not in out.get("data", {})]
        nbformat.write(notebook, temporary)
    if failed:
        reason = f"{failed.ename}: {first_line(failed.evalue or '')}"
        reason = f"cell {failed.exec_count}: {reason} (traceback in {os.path.relpath(target)})"
        raise NotebookError(f"{source.name} failed in {reason}") from failed
    return target
