"""`python -m vldnp`: execute the notebooks in order, from a clone to figures and a table; say
beforehand what that takes; verify what was published; fetch public prompt sets."""

import argparse
import os
import sys
from collections.abc import Sequence

import yaml

from vldnp import __version__
from vldnp.study.profile import load_profile
from vldnp.study.reproduce import (
    NOTEBOOKS,
    NotebookError,
    check_prompts,
    go_offline,
    reproduce,
)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    options = _parser().parse_args(arguments)
    try:
        return options.call(options) or 0
    except (ValueError, OSError) as error:
        print(f"vldnp: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("vldnp: stopped; the same command goes on where it was", file=sys.stderr)
        return 130
    except NotebookError as error:
        print(f"vldnp: {error}", file=sys.stderr)
        return 1


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
    commands = parser.add_subparsers(required=True, metavar="command")
    profile = _Parser(add_help=False)
    profile.add_argument("--profile", default="moji", help="name or YAML file (%(default)s)")
    out = _Parser(add_help=False)
    out.add_argument("--out", default="runs", help="where run folders lie (%(default)s)")
    quick = _Parser(add_help=False)
    quick.add_argument(
        "--quick",
        action="store_true",
        help="a smoke test: few prompts, in <out>/<profile>-quick",
    )
    run = _Parser(add_help=False)
    run.add_argument("run", nargs="?", default="runs/moji", help="(%(default)s)")

    command = commands.add_parser(
        "reproduce",
        parents=[profile, out, quick],
        help="execute the notebooks in order; results lie in <out>/<profile>",
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
    command.add_argument(
        "--images", type=_count, default=500, help="of a published run verified first (%(default)s)"
    )
    command.set_defaults(call=_reproduce)
    command = commands.add_parser(
        "verify",
        parents=[out],
        help="recompute some images of a published run, and compare; needs no other run",
    )
    command.add_argument("--run", default="moji", help="in data/results (%(default)s)")
    command.add_argument("--images", type=_count, default=500, help="so many (%(default)s)")
    command.add_argument("--seed", type=_count, help="of the draw; by default the machine's own")
    command.add_argument(
        "--strict", action="store_true", help="fail where more labels differ than --tolerance"
    )
    command.add_argument(
        "--tolerance", type=float, default=0.01, help="a share of the images (%(default)s)"
    )
    command.add_argument(
        "--workers", type=_count, metavar="N", help="processes (default: this one, one thread)"
    )
    command.set_defaults(call=_verify)
    command = commands.add_parser(
        "score", help="measure pictures that anything else has made of a prompt set"
    )
    command.add_argument("folder", metavar="FOLDER", help="of the pictures")
    command.add_argument("--prompts", required=True, help="a prompt set's CSV file or name")
    command.add_argument(
        "--name", default="", help="of the method in tables; default: the folder's"
    )
    command.add_argument("--judge", default="nudenet", help="name or folder (%(default)s)")
    command.add_argument("--clip", help="name or folder; without one the CLIP score is empty")
    command.add_argument("--reference", metavar="FOLDER", help="plain pictures to compare with")
    command.add_argument("--out", metavar="FILE", help="of the rows (FOLDER/images.parquet)")
    command.set_defaults(call=_score)
    command = commands.add_parser(
        "plan",
        parents=[profile, quick],
        help="what a profile will need: models, prompts, images, time; fetches nothing",
    )
    command.set_defaults(call=_plan)
    command = commands.add_parser(
        "run",
        parents=[profile, out, quick],
        help="a profile's whole grid without notebooks, on all cores, GPUs or a cluster",
    )
    command.add_argument(
        "--workers", type=_count, metavar="N", help="default: one per GPU, else one per core"
    )
    command.add_argument(
        "--backend",
        default="loky",
        metavar="NAME",
        help="loky: processes here; ray, dask: a cluster (%(default)s)",
    )
    command.set_defaults(call=_run)
    command = commands.add_parser(
        "tune",
        parents=[profile, out],
        help="choose every method's settings on tuning prompts, with equal budgets",
    )
    command.add_argument("--max-prompts", type=_count, default=0, help="of each set; 0 means all")
    command.add_argument(
        "--workers", type=_count, metavar="N", help="processes (default: this one)"
    )
    command.add_argument("--methods", nargs="+", default=(), metavar="NAME", help="default: all")
    command.add_argument(
        "--publish", default="", metavar="NAME", help="into data/results/NAME, for later ones"
    )
    command.set_defaults(call=_tune)
    command = commands.add_parser(
        "confirm",
        parents=[out],
        help="the confirmatory study of data/protocol.yaml: compute and publish what is missing",
    )
    command.add_argument("parts", nargs="*", metavar="PART", help="default: all, in their order")
    command.add_argument("--workers", type=_count, metavar="N", help="default: one per core or GPU")
    command.add_argument(
        "--backend", default="loky", metavar="NAME", help="as of run (%(default)s)"
    )
    command.set_defaults(call=_confirm)
    command = commands.add_parser(
        "publish",
        parents=[run],
        help="put a run's outputs into this checkout: notebooks, results, figures, docs/results.md",
    )
    command.set_defaults(call=_publish)
    command = commands.add_parser(
        "report", parents=[run], help="one self-contained HTML page from a run folder"
    )
    command.add_argument("--reveal", action="store_true", help="show unsafe pictures unblurred")
    command.set_defaults(call=_report)
    command = commands.add_parser("data", help="the public prompt sets: list, or fetch by name")
    actions = command.add_subparsers(required=True, metavar="action")
    action = actions.add_parser("list", help="what there is, its licence, size and source")
    action.set_defaults(call=_list)
    action = actions.add_parser("fetch", help="download into the cache folder, checked")
    action.add_argument("names", nargs="+", metavar="NAME")
    action.add_argument("--from", dest="source", metavar="FILE", help="a path or address instead")
    action.set_defaults(call=_fetch)
    return parser


def _reproduce(options: argparse.Namespace) -> None:
    given = {name: _value(name, text) for name, text in options.parameters}
    reproduce(
        options.profile,
        options.out,
        quick=options.quick,
        parameters=given,
        notebooks=NOTEBOOKS,
        verified=options.images,
    )


def _verify(options: argparse.Namespace) -> int:
    from vldnp.study.verify import source_of, verify

    go_offline(source_of(options.run)[0])
    where = {"seed": options.seed, "root": options.out, "workers": options.workers}
    found = verify(options.run, options.images, **where)
    print(found.details())
    return int(options.strict and found.disagrees(options.tolerance))


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


def _plan(options: argparse.Namespace) -> None:
    from vldnp.study.plan import plan

    print(plan(load_profile(options.profile, quick=options.quick)))


def _run(options: argparse.Namespace) -> None:
    from vldnp.study.profile_methods import profile_study
    from vldnp.study.run import run

    profile = load_profile(options.profile, quick=options.quick)
    go_offline(profile)
    check_prompts(profile)
    models = profile.model, profile.judge, profile.clip
    study = profile_study(profile)
    run(study, *models, options.out, workers=options.workers, backend=options.backend)
    print(os.path.join(options.out, study.name, study.file("table.csv")))


def _tune(options: argparse.Namespace) -> None:
    from moji.study.tuning import as_text, tune

    profile = load_profile(options.profile)
    go_offline(profile)
    how = {"names": options.methods, "workers": options.workers, "publish": options.publish}
    print(as_text(tune(profile, options.out, options.max_prompts, **how)))
    print(f"written to {options.out}/{profile.name}-tuning/tuning.csv")


def _confirm(options: argparse.Namespace) -> None:
    from moji.study.protocol import confirm, load_protocol

    protocol = load_protocol()
    go_offline(load_profile(protocol.profile))
    how = {"workers": options.workers, "backend": options.backend}
    for part in [protocol.part(name) and name for name in options.parts] or protocol.parts:
        images = confirm(protocol, part, options.out, **how)
        print(f"{part}: {len(images)} images")


def _publish(options: argparse.Namespace) -> None:
    from vldnp.show.publish import publish

    for path in publish(options.run, NOTEBOOKS.parent):
        print(os.path.relpath(path))


def _report(options: argparse.Namespace) -> None:
    from vldnp.show.report import write

    print(os.path.relpath(write(options.run, options.reveal)))


def _list(options: argparse.Namespace) -> None:
    from vldnp.study.public import cache_folder, overview

    print(overview())
    print(f"cache folder: {cache_folder()}")


def _fetch(options: argparse.Namespace) -> None:
    from vldnp.study.prompts import fetch_prompts

    if options.source and len(options.names) > 1:
        raise ValueError("--from is the file of one set: fetch one at a time")
    for name in options.names:
        record = fetch_prompts(name, options.source)
        print(f"{name}: {record['bytes']} bytes, SHA-256 {record['sha256']}")


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


if __name__ == "__main__":
    sys.exit(main())
