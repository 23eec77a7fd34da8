"""Execute the notebooks in order; run a profile's grid; measure images of anything else; fetch
public prompt sets."""

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import replace

import yaml

from vldnp import __version__
from vldnp.study.reproduce import NOTEBOOKS, NotebookError, reproduce


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
    from vldnp.models.hub import whereabouts
    from vldnp.study import run
    from vldnp.study.profile import load_profile, profile_study
    from vldnp.study.prompts import load_prompts

    profile = load_profile(options.profile, quick=options.quick)
    models = {kind: getattr(profile, kind) for kind in ("model", "vlm", "judge", "clip")}
    if options.dry_run:
        study = profile_study(replace(profile, vlm=_unopened))
        takes = run.expected(study)
        print(takes.to_string(index=False))
        images, evaluations, calls = takes.iloc[:, 2:].sum()
        print(f"{images:,} images, {evaluations:,} network evaluations, {calls:,} VLM calls")
        for kind, name in models.items():
            place, here = whereabouts(kind, name)
            place = os.path.relpath(place) if os.path.isdir(place) else place
            print(f"{kind} {name}: {place}{'' if here else ' (to be fetched)'}")
        for source in study.prompt_sets:
            try:
                study.prompts(source)
            except FileNotFoundError as error:
                print(error)
        return
    for source in profile.prompt_sets:  # a misspelled one fails before models are opened
        load_prompts(source)
    study = profile_study(profile)
    how = {"workers": options.workers, "backend": options.backend}
    run.run(study, *(models[kind] for kind in ("model", "judge", "clip")), options.out, **how)
    print(os.path.join(options.out, study.name, "table.csv"))


def _unopened(images, question):
    """Stands for a VLM where nothing is generated."""


_unopened.name, _unopened.revision = "not opened", "1"


def _score(options: argparse.Namespace) -> None:
    from vldnp.show.tables import results
    from vldnp.study.score import save, score

    given = {"name": options.name, "reference": options.reference}
    found = score(options.folder, options.prompts, options.judge, options.clip, **given)
    print(results(found.table).to_string())
    if found.differences is not None:
        print(f"\nless the reference's\n{found.differences.to_string(index=False)}")
    for line in (*found.notes, f"rows: {save(found, options.out or options.folder)}"):
        print(f"\n{line}")


def _report(options: argparse.Namespace) -> None:
    from vldnp.study.reproduce import report

    print(os.path.relpath(report(options.run, options.reveal)))


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


if __name__ == "__main__":
    sys.exit(main())
