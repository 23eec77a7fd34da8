"""`python -m vldnp`: execute the notebooks in order, from a clone to figures and a table; say
beforehand what that takes; fetch public prompt sets."""

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import yaml

from vldnp import __version__
from vldnp.experiments.profile import Profile, load_profile
from vldnp.experiments.reproduce import NOTEBOOKS, NotebookError, check_prompts, reproduce


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    options = _parser().parse_args(arguments)
    try:
        if options.command == "publish":
            from vldnp.display.publish import publish

            for path in publish(options.run, NOTEBOOKS.parent):
                print(os.path.relpath(path))
            return 0
        if options.command == "data":
            return _data(options)
        if options.command == "plan":
            from vldnp.experiments.plan import plan

            print(plan(load_profile(options.profile, quick=options.quick)))
            return 0
        if options.command == "report":
            from vldnp.display.report import write

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
    from vldnp.experiments.tuning import as_profile, tune

    check_prompts(profile, profile.tuning_sets)
    table = tune(profile, out, max_prompts)
    shown = ["method", "settings", "omega", "safety", "alignment", "score", "chosen"]
    print(table[shown].to_string(index=False))
    print(f"written to {out}/{profile.name}-tuning/tuning.csv; for the profile:\n")
    print(yaml.safe_dump(as_profile(table), sort_keys=False, width=1000))


def _data(options: argparse.Namespace) -> int:
    from vldnp.prompts.public import cache_folder, overview
    from vldnp.prompts.table import fetch_prompts

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
    from vldnp.models.hub import EMBEDDED

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
