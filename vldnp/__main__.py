"""Reproduce the notebooks, run a profile, or measure images made elsewhere."""

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from vldnp import __version__
from vldnp._files import atomic, first_line, profile_names, unknown

# Of the clone; an installed package has none, and takes those of the working folder.
NOTEBOOKS = next(filter(Path.is_dir, [Path(__file__).parents[1] / "notebooks"]), Path("notebooks"))


class NotebookError(RuntimeError):
    """A notebook that failed."""


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    options = _parser().parse_args(arguments)
    try:  # a wrong name is an error before torch is imported
        asked = getattr(options, "profile", "")
        if asked and asked not in (names := profile_names()) and not Path(asked).suffix:
            raise unknown("profile", asked, names)
        return options.call(options) or 0
    except KeyboardInterrupt:
        print("vldnp: interrupted; the same command resumes the run", file=sys.stderr)
        return 130
    except (ValueError, OSError, ImportError, NotebookError) as error:
        print(f"vldnp: {error}", file=sys.stderr)
        return 1 if isinstance(error, NotebookError) else 2


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        self.exit(2, f"vldnp: {message}; see {self.prog} --help\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="python -m vldnp", description=__doc__)
    parser.add_argument("--version", action="version", version=f"vldnp {__version__}")
    commands = parser.add_subparsers(required=True, metavar="command")

    def command(call, about: str):
        made = commands.add_parser(call.__name__.strip("_"), help=about, description=about)
        made.set_defaults(call=call)
        return made.add_argument

    ran = command(_run, "compute a profile's whole grid without notebooks, on all cores or GPUs")
    reproduced = command(_reproduce, "verify published rows and execute the notebooks")
    for add in (ran, reproduced):
        add("--profile", default="moji", help="name or YAML file (%(default)s)")
        add("--out", default="runs", help="folder of the run folders (%(default)s)")
        add("--quick", action="store_true", help="few prompts, in OUT/PROFILE-quick")
    add("-p", dest="given", action="append", nargs=2, default=[], metavar=("NAME", "VALUE"))
    add("--images", type=int, default=512, help="number to verify of a published run (%(default)s)")
    ran("--workers", type=int, help="default: one per GPU or core")
    ran("--backend", default="loky", help="loky, ray or dask (%(default)s)")
    ran("--dry-run", action="store_true", help="only print what the run takes")
    add = command(_score, "measure images made elsewhere")
    add("folder", help="folder of the images")
    add("--prompts", required=True, help="a prompt set's file or name")
    add("--name", default="", help="name of the method in tables (the folder's)")
    add("--judge", default="nudenet", help="name or folder (%(default)s)")
    add("--clip", help="name or folder; without one the CLIP score is empty")
    add("--out", help="folder of images.parquet and table.csv (that of the images)")
    return parser


def _reproduce(options: argparse.Namespace) -> None:
    given = dict(options.given)
    if strange := given.keys() & {"profile", "out", "quick"}:
        raise ValueError(f"give {min(strange)!r} as --{min(strange)}, not with -p")
    more = {"quick": options.quick, "parameters": given, "verified": options.images}
    reproduce(options.profile, options.out, notebooks=NOTEBOOKS, **more)


def reproduce(
    profile="moji", out="runs", *, quick=False, parameters=None, notebooks=NOTEBOOKS, verified=512
) -> list[Path]:
    """Verify a published run, execute the notebooks 00 … 09 into `out/<profile>/notebooks`, and
    print the files. `parameters` of notebooks override the profile's; `verified` images are
    recomputed, none if `quick` or with RECOMPUTE=all."""
    import papermill  # slow to import, as torch
    import torch

    from vldnp.study import profile as profiles
    from vldnp.study import published
    from vldnp.study.grid import setting_of
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
        made = profiles.profile_methods(own), own.model, own.judge, own.clip
        settings = {*map(setting_of, made[0])}
        workers = None if torch.cuda.is_available() else os.cpu_count()
        for name in published.published_runs():
            if settings <= published.open_run(name).methods.keys():
                print(published.verify(name, *made, images=verified, workers=workers))
                given["run"] = name
    executed = []
    for source in sources:
        print(source.name, file=sys.stderr, flush=True)
        asked = {name: value for name, value in given.items() if name in declared[source]}
        executed.append(execute(source, run / "notebooks" / source.name, asked))
    for path in [*sorted(run.glob("*.*")), *executed]:
        print(f"  {os.path.relpath(path)}")
    return executed


def execute(source: Path, target: Path, parameters: dict) -> Path:
    """Execute one notebook in its own folder and write `target` without widgets (no kernel)."""
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


def _run(options: argparse.Namespace) -> None:
    from vldnp.baselines.controls import AnswersNone
    from vldnp.models.hub import find
    from vldnp.study import run
    from vldnp.study.profile import load_profile, profile_study
    from vldnp.study.prompts import load_prompts

    profile = load_profile(options.profile, quick=options.quick)
    models = {kind: getattr(profile, kind) for kind in ("model", "judge", "clip")}
    if options.dry_run:
        for kind, name in (models | {"vlm": profile.vlm}).items():
            source = find(kind, str(name), getattr(name, "options", {}).get("revision"))
            print(f"{kind} {name}: {source.location or source.entry['opener']}")
        for entry in profile.methods:
            entry["given"].pop("preview", None)  # nothing is opened
        takes = run.expected(profile_study(replace(profile, vlm=AnswersNone())))
        print(takes.to_string(index=False))
        images, evaluations, calls = takes.iloc[:, 2:].sum()
        print(f"{images:,} images, {evaluations:,} network evaluations, {calls:,} VLM calls")
    else:
        for source in profile.prompt_sets:  # a misspelled one fails before models are opened
            load_prompts(source)
        how = {"workers": options.workers, "backend": options.backend}
        run.run(profile_study(profile), *models.values(), options.out, **how)
        print(os.path.join(options.out, profile.name, "table.csv"))


def _score(options: argparse.Namespace) -> None:
    from vldnp.metrics.summary import table
    from vldnp.show.tables import results
    from vldnp.study.score import score

    asked = options.folder, options.prompts, options.judge, options.clip
    images, out = score(*asked, name=options.name), Path(options.out or options.folder)
    print(results(table(images)).to_string())
    out.mkdir(parents=True, exist_ok=True)
    images.to_parquet(out / "images.parquet", index=False)
    table(images).to_csv(out / "table.csv", index=False)
    print(f"rows: {out / 'images.parquet'}")


if __name__ == "__main__":
    sys.exit(main())
