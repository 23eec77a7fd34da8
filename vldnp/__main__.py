"""Execute the notebooks in order; run a profile's grid; measure images of anything else; fetch
public prompt sets."""

import argparse
import json
import os
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import yaml

from vldnp import __version__
from vldnp._files import atomic, unknown

NOTEBOOKS = Path(__file__).resolve().parents[1] / "notebooks"
VIEW = "application/vnd.jupyter.widget-view+json"


class NotebookError(RuntimeError):
    """A notebook that did not run to its end."""


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    options = _parser().parse_args(arguments)
    try:
        return options.call(options) or 0
    except KeyboardInterrupt:
        print("vldnp: stopped; the same command goes on where it was", file=sys.stderr)
        return 130
    except (ValueError, OSError, NotebookError) as error:
        print(f"vldnp: {error}", file=sys.stderr)
        return 1 if isinstance(error, NotebookError) else 2


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        self.exit(2, f"vldnp: {message}; see {self.prog} --help\n")


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"must be a whole number, 0 or more, not {text!r}")
    return int(text)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="python -m vldnp", description=__doc__)
    parser.add_argument("--version", action="version", version=f"vldnp {__version__}")
    commands = parser.add_subparsers(required=True, metavar="command")

    def command(name: str, call, about: str, group=commands) -> argparse.ArgumentParser:
        made = group.add_parser(name, help=about)
        made.set_defaults(call=call)
        return made

    reproduced = command("reproduce", _reproduce, "verify what is published; execute the notebooks")
    ran = command("run", _run, "a profile's whole grid without notebooks, on all cores or GPUs")
    for one in (reproduced, ran):
        one.add_argument("--profile", default="moji", help="name or YAML file (%(default)s)")
        one.add_argument("--out", default="runs", help="where run folders lie (%(default)s)")
        one.add_argument("--quick", action="store_true", help="few prompts, in OUT/PROFILE-quick")
    add = reproduced.add_argument
    add("-p", dest="given", action="append", nargs=2, default=[], metavar=("NAME", "VALUE"))
    add("--images", type=_count, default=512, help="of a published run verified (%(default)s)")
    ran.add_argument("--workers", type=_count, metavar="N", help="default: one per GPU or core")
    ran.add_argument("--backend", default="loky", help="loky, ray or dask (%(default)s)")
    ran.add_argument("--dry-run", action="store_true", help="only say what it takes")
    add = command("score", _score, "measure images that anything else has made").add_argument
    add("folder", metavar="FOLDER", help="of the images")
    add("--prompts", required=True, help="a prompt set's file or name")
    add("--name", default="", help="of the method in tables; default: the folder's")
    add("--judge", default="nudenet", help="name or folder (%(default)s)")
    add("--clip", help="name or folder; without one the CLIP score is empty")
    add("--reference", metavar="FOLDER", help="CFG's images, to compare with")
    add("--out", metavar="FILE", help="of the rows (FOLDER/images.parquet)")
    add = command("report", _report, "one self-contained HTML page from a run folder").add_argument
    add("run", nargs="?", default="runs/moji", help="(%(default)s)")
    add("--reveal", action="store_true", help="show unsafe images unblurred")
    data = commands.add_parser("data", help="the public prompt sets: list, or fetch by name")
    actions = data.add_subparsers(required=True, metavar="action")
    command("list", _list, "what there is, its licence and source", actions)
    add = command("fetch", _fetch, "download into the cache folder, checked", actions).add_argument
    add("names", nargs="+", metavar="NAME")
    add("--from", dest="source", metavar="FILE", help="a path or address instead")
    return parser


def _reproduce(options: argparse.Namespace) -> None:
    given = {}
    for name, text in options.given:
        if name in ("profile", "out", "quick"):
            raise ValueError(f"give {name!r} as --{name}, not with -p")
        try:
            given[name] = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ValueError(f"the value {text!r} of parameter {name!r} is no YAML") from error
    more = {"quick": options.quick, "parameters": given, "verified": options.images}
    reproduce(options.profile, options.out, notebooks=NOTEBOOKS, **more)


def _run(options: argparse.Namespace) -> None:
    from vldnp.study.profile import load_profile, profile_study
    from vldnp.study.run import expected, run

    profile = load_profile(options.profile, quick=options.quick)
    study = profile_study(profile)
    if options.dry_run:
        print(expected(profile, study))
        return
    models = profile.model, profile.judge, profile.clip
    run(study, *models, options.out, workers=options.workers, backend=options.backend)
    print(os.path.join(options.out, study.name, "table.csv"))


def _score(options: argparse.Namespace) -> None:
    from vldnp.show.tables import against_reference, results
    from vldnp.study.score import save, score

    given = {"name": options.name, "reference": options.reference}
    found = score(options.folder, options.prompts, options.judge, options.clip, **given)
    print(results(found.table))
    if found.differences is not None:
        print(f"\n{against_reference(found.differences)}")
    for line in (*found.notes, f"rows: {save(found, options.out or options.folder)}"):
        print(f"\n{line}")


def _report(options: argparse.Namespace) -> None:
    from vldnp.show.report import write

    print(os.path.relpath(write(options.run, options.reveal)))


def _list(options: argparse.Namespace) -> None:
    from vldnp.study.public import overview

    print(overview())


def _fetch(options: argparse.Namespace) -> None:
    from vldnp.study.prompts import fetch_prompts

    if options.source and len(options.names) > 1:
        raise ValueError("--from is the file of one set: fetch one at a time")
    for name in options.names:
        record = fetch_prompts(name, options.source)
        print(f"{name}: {record['bytes']} bytes, SHA-256 {record['sha256']}")


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
    import papermill  # slow to import

    from vldnp.study import published
    from vldnp.study.profile import load_profile
    from vldnp.study.profile import parameters as checked
    from vldnp.study.prompts import load_prompts

    started, settings = time.monotonic(), load_profile(profile, quick=quick)
    run, sources = Path(out) / settings.name, notebooks_in(notebooks)
    declared = {source: set(papermill.inspect_notebook(source)) for source in sources}
    known = set().union(*declared.values())
    if strange := [name for name in parameters or {} if name not in known]:
        raise unknown("notebook parameter", strange[0], known)
    given = settings.notebooks | (parameters or {})
    checked(settings, **given)
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
            workers = {"workers": os.cpu_count()} if published.on_cpu() else {}
            print(published.verify(settings.name, verified, root=out, **workers).details())
    executed = []
    for number, source in enumerate(sources, start=1):
        print(f"[{number}/{len(sources)}] {source.name}", file=sys.stderr, flush=True)
        asked = {name: given[name] for name in given if name in declared[source]}
        with _watched(run):
            executed.append(execute(source, run / "notebooks" / source.name, asked, progress=True))
    print(f"done in {(time.monotonic() - started) / 60:.1f} minutes")
    for path in [run / "table.csv", *sorted((run / "figures").glob("*.png")), *executed]:
        print(f"  {os.path.relpath(path)}{'' if path.exists() else '  (was not written)'}")
    return executed


def notebooks_in(folder: str | Path) -> list[Path]:
    """The notebooks of a folder that are executed, in order."""
    if found := sorted(Path(folder).glob("[0-9][0-9]*.ipynb")):
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


def without_widgets(notebook):
    """The notebook without what shows a widget, which needs a kernel; changed in place."""
    notebook.metadata.pop("widgets", None)
    for cell in notebook.cells:
        if "outputs" in cell:
            cell.outputs = [out for out in cell.outputs if VIEW not in out.get("data", {})]
    return notebook


def trust(path: Path) -> None:
    """Sign a notebook that was executed here, as JupyterLab does, so that it shows all outputs."""
    import sqlite3

    import nbformat
    from jupyter_core.paths import jupyter_data_dir
    from nbformat.sign import NotebookNotary

    with suppress(OSError, sqlite3.Error):  # Jupyter's own folder cannot be written to
        Path(jupyter_data_dir()).mkdir(parents=True, exist_ok=True)
        with NotebookNotary(data_dir=jupyter_data_dir()) as notary:
            notary.sign(nbformat.read(path, as_version=4))


@contextmanager
def _watched(run: Path) -> Iterator[None]:
    """A bar of the images that a notebook makes: `progress.json` of the run folders of that name."""
    from tqdm.auto import tqdm

    ended, started, run = threading.Event(), time.time(), run.resolve()

    def watch() -> None:
        with tqdm(desc="images", unit="image", leave=False) as bar:
            while not ended.wait(1):
                for path in run.parent.glob(f"{run.name}*/progress.json"):
                    if path.stat().st_mtime >= started:
                        state = json.loads(path.read_text(encoding="utf-8"))
                        bar.total, bar.n = state["total"], state["done"]
                        bar.set_postfix_str(state["method"])

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


if __name__ == "__main__":
    sys.exit(main())
