"""`python -m vldnp`: execute the notebooks in order, from a clone to figures and a table; say
beforehand what that takes; fetch public prompt sets."""

import argparse
import json
import os
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import yaml

from vldnp import __version__
from vldnp.files import trust, unknown
from vldnp.profiles import Profile, load_profile

NOTEBOOKS = Path(__file__).resolve().parents[1] / "notebooks"


PROMPT_SETS = ("safety_set", "benign_set", "cost_prompts")
"""The notebook parameters that name a prompt set."""


class NotebookError(RuntimeError):
    """A notebook that did not run to its end."""


def reproduce(
    profile: str = "embedded",
    out: str | Path = "runs",
    *,
    quick: bool = False,
    parameters: dict | None = None,
    notebooks: str | Path | None = None,
) -> list[Path]:
    """Execute `notebooks/0*.ipynb` in order with papermill.

    Each notebook gets those of `profile`, `out`, `quick`, the profile's `notebook_parameters` and
    `parameters` that its cell tagged `parameters` declares.

    Args:
        profile: a name in `data/profiles`, or a YAML file.
        out: where run folders lie; executed copies go to `out/<profile>/notebooks`.
        quick: fewer prompts, to see whether everything works; in `out/<profile>-quick`.
        parameters: further notebook parameters, which go before the profile's.
        notebooks: the folder of the notebooks; default is the checkout's.

    Returns:
        The executed notebooks; this user's JupyterLab trusts them.

    Raises:
        ValueError, FileNotFoundError: one line, e.g. for a parameter that no notebook declares.
        NotebookError: a notebook failed; one line says which and why.
    """
    # papermill and its kernel machinery are slow to import, and only this needs them.
    import papermill
    import zmq
    from traitlets.config import Config

    # Without encryption a kernel warns that its messages could be read on this machine.
    encryption = {"transport_encryption": "auto" if zmq.has("curve") else "disabled"}
    notebooks = NOTEBOOKS if notebooks is None else notebooks
    settings = load_profile(profile, quick=quick)
    name = settings.name
    sources = sorted(Path(notebooks).glob("0*.ipynb"))
    if not sources:
        raise FileNotFoundError(f"no notebooks in {notebooks}: files named 0*.ipynb are executed")
    declared = {source: set(papermill.inspect_notebook(source)) for source in sources}
    known = set().union(*declared.values())
    for parameter in parameters or {}:
        if parameter not in known:
            raise unknown("notebook parameter", parameter, known)
    given = settings.notebook_parameters | (parameters or {})
    _check_prompts(settings, (given[key] for key in PROMPT_SETS if key in given))

    # Notebooks run in their own folder and get paths as seen from there; relative ones, so that
    # an executed copy says nothing of the machine it was executed on.
    def from_notebooks(path: str | Path) -> str:
        return os.path.relpath(path, notebooks)

    own = {"profile": profile, "out": from_notebooks(out), "quick": quick}
    if Path(profile).is_file():
        own["profile"] = from_notebooks(profile)
    given |= own
    executed = []
    for number, source in enumerate(sources, start=1):
        target = Path(out) / name / "notebooks" / source.name
        target.parent.mkdir(parents=True, exist_ok=True)
        print(f"[{number}/{len(sources)}] {source.name}", file=sys.stderr, flush=True)
        with _watched(Path(out) / name), _errors_in_one_line(source, target):
            papermill.execute_notebook(
                os.path.relpath(source),
                os.path.relpath(target),
                parameters={key: given[key] for key in given if key in declared[source]},
                kernel_name="python3",
                cwd=source.parent,
                progress_bar=True,
                config=Config(KernelManager=encryption),
            )
        trust([target])
        executed.append(target)
    return executed


def _check_prompts(profile: Profile, further: Iterable[str] = ()) -> None:
    """Open every prompt set: a misspelled one is to fail before the first image is made."""
    from vldnp.prompts import load_prompts

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


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    options = _parser().parse_args(arguments)
    try:
        if options.command == "publish":
            from vldnp.publish import publish

            for path in publish(options.run, NOTEBOOKS.parent):
                print(os.path.relpath(path))
            return 0
        if options.command == "data":
            return _data(options)
        if options.command == "plan":
            from vldnp.plan import plan

            print(plan(load_profile(options.profile, quick=options.quick)))
            return 0
        if options.command == "report":
            from vldnp.report import write

            print(os.path.relpath(write(options.run, options.reveal)))
            return 0
        profile = load_profile(options.profile, quick=getattr(options, "quick", False))
        _prepare_kernels(profile)
        if options.command == "tune":
            _tune(profile, options.out, options.max_prompts)
            return 0
        started = time.monotonic()
        executed = reproduce(
            options.profile,
            options.out,
            quick=options.quick,
            parameters={name: _value(name, text) for name, text in options.parameters},
        )
        _report(executed, Path(options.out) / profile.name, started)
    except (ValueError, OSError) as error:
        print(f"vldnp: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("vldnp: stopped; the same command goes on where it was", file=sys.stderr)
        return 130
    except NotebookError as error:
        print(f"vldnp: {error}", file=sys.stderr)
        return 1
    return 0


class _Parser(argparse.ArgumentParser):
    """What is wrong in one line, like all other errors, and not under a page of usage."""

    def error(self, message: str):
        self.exit(2, f"vldnp: {message}; see {self.prog} --help\n")


def _count(text: str) -> int:
    """A whole number, 0 or more."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"must be a whole number, 0 or more, not {text!r}")
    return int(text)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="python -m vldnp", description=__doc__)
    parser.add_argument("--version", action="version", version=f"vldnp {__version__}")
    commands = parser.add_subparsers(required=True, dest="command", metavar="command")
    command = commands.add_parser(
        "reproduce", help="execute the notebooks in order; results lie in <out>/<profile>"
    )
    command.add_argument("--profile", default="embedded", help="name or YAML file (%(default)s)")
    command.add_argument("--out", default="runs", help="where run folders lie (%(default)s)")
    command.add_argument(
        "--quick",
        action="store_true",
        help="a smoke test: few prompts, in <out>/<profile>-quick",
    )
    command.add_argument(
        "-p",
        dest="parameters",
        action="append",
        nargs=2,
        default=[],
        metavar=("NAME", "VALUE"),
        help="a further notebook parameter; may be repeated",
    )
    command = commands.add_parser(
        "plan", help="what a profile will need: models, prompts, images, time; fetches nothing"
    )
    command.add_argument("--profile", default="embedded", help="name or YAML file (%(default)s)")
    command.add_argument("--quick", action="store_true", help="as for reproduce")
    command = commands.add_parser(
        "tune", help="choose every method's settings on tuning prompts, with equal budgets"
    )
    command.add_argument("--profile", default="embedded", help="name or YAML file (%(default)s)")
    command.add_argument("--out", default="runs", help="where run folders lie (%(default)s)")
    command.add_argument("--max-prompts", type=_count, default=0, help="of each set; 0 means all")
    command = commands.add_parser(
        "publish",
        help="put a run's outputs into this checkout: notebooks, results table, figures, README",
    )
    command.add_argument("run", nargs="?", default="runs/embedded", help="(%(default)s)")
    command = commands.add_parser("data", help="the public prompt sets: list, or fetch by name")
    actions = command.add_subparsers(required=True, dest="action", metavar="action")
    actions.add_parser("list", help="what there is, its licence, size and source")
    action = actions.add_parser("fetch", help="download into the cache folder, checked")
    action.add_argument("names", nargs="+", metavar="NAME")
    action.add_argument("--from", dest="source", metavar="FILE", help="a path or address instead")
    command = commands.add_parser("report", help="one self-contained HTML page from a run folder")
    command.add_argument("run", nargs="?", default="runs/embedded", help="(%(default)s)")
    command.add_argument("--reveal", action="store_true", help="show unsafe pictures unblurred")
    return parser


def _tune(profile: Profile, out: str, max_prompts: int) -> None:
    from vldnp.tuning import as_profile, tune

    _check_prompts(profile, profile.tuning_sets)
    table = tune(profile, out, max_prompts)
    shown = ["method", "settings", "omega", "safety", "alignment", "score", "chosen"]
    print(table[shown].to_string(index=False))
    print(f"written to {out}/{profile.name}-tuning/tuning.csv; for the profile:\n")
    print(yaml.safe_dump(as_profile(table), sort_keys=False, width=1000))


def _data(options: argparse.Namespace) -> int:
    from vldnp.datasets import cache_folder, overview
    from vldnp.prompts import fetch_prompts

    if options.action == "list":
        print(overview())
        print(f"cache folder: {cache_folder()}")
        return 0
    if options.source and len(options.names) > 1:
        raise ValueError("--from is the file of one set: fetch one at a time")
    for name in options.names:
        record = fetch_prompts(name, options.source)
        print(f"{name}: {record['bytes']} bytes, SHA-256 {record['sha256']}")
    return 0


def _value(name: str, text: str):
    """A parameter's value as YAML reads it: `3` is a number, `[1, 2]` a list, `a cat` a text."""
    if name in ("profile", "out", "quick"):
        raise ValueError(f"give {name!r} as --{name}, not with -p")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"the value {text!r} of parameter {name!r} is no YAML") from error
    listed = value if isinstance(value, list) else [value]
    if any(isinstance(n, int | float) and n < 0 for n in listed):
        raise ValueError(f"parameter {name!r} must be 0 or more, not {text}")
    return value


def _prepare_kernels(profile: Profile) -> None:
    """Settings that the notebooks' kernels inherit."""
    from vldnp.zoo import EMBEDDED

    if all(getattr(profile, kind) in names for kind, names in EMBEDDED.items()):
        os.environ.setdefault("HF_HUB_OFFLINE", "1")  # all models are here
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def _report(executed: Sequence[Path], run: Path, started: float) -> None:
    print(f"done in {(time.monotonic() - started) / 60:.1f} minutes")
    for what, paths in (
        ("table", [run / "table.csv"]),
        ("figures", sorted((run / "figures").glob("*.png"))),
        ("executed notebooks", executed),
    ):
        print(f"{what}:")
        for path in paths:
            missing = "" if path.exists() else "  (was not written)"
            print(f"  {os.path.relpath(path)}{missing}")


if __name__ == "__main__":
    sys.exit(main())
