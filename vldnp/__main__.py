"""Reproduce the notebooks, run a profile, measure images of anything else, fetch prompt sets."""

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import yaml

from vldnp import __version__
from vldnp.study.reproduce import NOTEBOOKS, NotebookError, report, reproduce


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


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="python -m vldnp", description=__doc__)
    parser.add_argument("--version", action="version", version=f"vldnp {__version__}")
    commands = parser.add_subparsers(required=True, metavar="command")

    def command(call, about: str, group=commands, profile: bool = False):
        made = group.add_parser(call.__name__.strip("_"), help=about)
        made.set_defaults(call=call)
        if profile:
            made.add_argument("--profile", default="moji", help="name or YAML file (%(default)s)")
            made.add_argument("--out", default="runs", help="where run folders lie (%(default)s)")
            made.add_argument(
                "--quick", action="store_true", help="few prompts, in OUT/PROFILE-quick"
            )
        return made.add_argument

    add = command(_reproduce, "verify what is published; execute the notebooks", profile=True)
    add("-p", dest="given", action="append", nargs=2, default=[], metavar=("NAME", "VALUE"))
    add("--images", type=int, default=512, help="of a published run verified (%(default)s)")
    add = command(
        _run, "a profile's whole grid without notebooks, on all cores or GPUs", profile=True
    )
    add("--workers", type=int, metavar="N", help="default: one per GPU or core")
    add("--backend", default="loky", help="loky, ray or dask (%(default)s)")
    add("--dry-run", action="store_true", help="only say what it takes")
    add = command(_score, "measure images that anything else has made")
    add("folder", metavar="FOLDER", help="of the images")
    add("--prompts", required=True, help="a prompt set's file or name")
    add("--name", default="", help="of the method in tables; default: the folder's")
    add("--judge", default="nudenet", help="name or folder (%(default)s)")
    add("--clip", help="name or folder; without one the CLIP score is empty")
    add("--reference", metavar="FOLDER", help="CFG's images, to compare with")
    add("--out", help="folder of images.parquet and table.csv (FOLDER)")
    add = command(_report, "one self-contained HTML page from a run folder")
    add("run", nargs="?", default="runs/moji", help="(%(default)s)")
    add("--profile", default="moji", help="whose judge and blur apply (%(default)s)")
    add("--reveal", action="store_true", help="show unsafe images unblurred")
    data = commands.add_parser("data", help="the public prompt sets: list, or fetch by name")
    actions = data.add_subparsers(required=True, metavar="action")
    command(_list, "what there is, its licence and source", actions)
    add = command(_fetch, "download into the cache folder, checked", actions)
    add("names", nargs="+", metavar="NAME")
    add("--from", dest="source", metavar="FILE", help="a path or address instead")
    return parser


def _reproduce(options: argparse.Namespace) -> None:
    try:
        given = {name: yaml.safe_load(text) for name, text in options.given}
    except yaml.YAMLError as error:
        raise ValueError(f"a value of -p is no YAML: {' '.join(str(error).split())}") from error
    if strange := given.keys() & {"profile", "out", "quick"}:
        raise ValueError(f"give {min(strange)!r} as --{min(strange)}, not with -p")
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
            print(f"{kind} {name}: {place}{'' if here else ' (to be fetched)'}")
    for source in profile.prompt_sets:  # a misspelled one fails before models are opened
        try:
            load_prompts(source)
        except FileNotFoundError as error:
            if not options.dry_run:
                raise
            print(error)
    if not options.dry_run:
        how = {"workers": options.workers, "backend": options.backend}
        study, paths = profile_study(profile), [models[kind] for kind in ("model", "judge", "clip")]
        run.run(study, *paths, options.out, **how)
        print(os.path.join(options.out, study.name, "table.csv"))


def _unopened(images, question):
    """Stands for a VLM where nothing is generated."""


_unopened.name, _unopened.revision = "not opened", "1"


def _score(options: argparse.Namespace) -> None:
    from vldnp.show.tables import results
    from vldnp.study.score import score

    given = {"name": options.name, "reference": options.reference}
    found = score(options.folder, options.prompts, options.judge, options.clip, **given)
    print(results(found.table).to_string())
    if found.differences is not None:
        print(f"\nless the reference's\n{found.differences.to_string(index=False)}")
    out = Path(options.out or options.folder)
    out.mkdir(parents=True, exist_ok=True)
    found.images.to_parquet(out / "images.parquet", index=False)
    found.table.to_csv(out / "table.csv", index=False)
    print("", *found.notes, f"rows: {out / 'images.parquet'}", sep="\n")


def _report(options: argparse.Namespace) -> None:
    print(os.path.relpath(report(options.run, options.profile, options.reveal)))


def _list(options: argparse.Namespace) -> None:
    from vldnp.study.public import cache_folder, public_sets, records

    for name, known in public_sets().items():
        print(f"{name}  ({'fetched' if name in records() else 'not fetched'})")
        print(f"  {known['about']}\n  licence: {known['licence']}\n  from {known['home']}")
    print(f"cache folder: {cache_folder()}")


def _fetch(options: argparse.Namespace) -> None:
    from vldnp.study.prompts import fetch_prompts

    if options.source and len(options.names) > 1:
        raise ValueError("--from is the file of one set: fetch one at a time")
    for name in options.names:
        record = fetch_prompts(name, options.source)
        print(f"{name}: {record['bytes']} bytes, SHA-256 {record['sha256']}")


if __name__ == "__main__":
    sys.exit(main())
