"""Files that are whole or absent, and where they lie: atomic writes, checked weights, data."""

import difflib
import hashlib
import os
import platform
import shutil
import sqlite3
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError, safe_open

TEMPORARY = ".tmp-"
ABANDONED = 86400
"""A temporary folder of another machine counts as left behind after so many seconds."""


@contextmanager
def atomic(path: str | Path) -> Iterator[Path]:
    """A temporary path that takes the place of `path` when the block ends without an error.

    It has the same name, because writers choose their format by the suffix, in a hidden folder
    beside `path`, so that nobody who lists or globs the folder takes it for a result. After an
    error (or a kill) `path` is what it was before; what a kill leaves, `sweep` removes.

    Raises:
        OSError: one line that names `path`, e.g. where the disk is full or read-only.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        owner = f"{TEMPORARY}{machine()}-{os.getpid()}-"
        with tempfile.TemporaryDirectory(prefix=owner, dir=path.parent) as folder:
            temporary = Path(folder) / path.name
            yield temporary
            os.replace(temporary, path)
    except OSError as error:
        folder, about = path.parent.absolute(), Path(error.filename or path).absolute()
        ours = folder in about.parents or about in (folder, *folder.parents)
        if error.errno is None or not ours:
            raise  # it says something else, for example of a file that was to be copied
        raised = type(error)(f"cannot write {path}: {first_line(error.strerror)}")
        raised.errno = error.errno
        raise raised from error


def sweep(folder: str | Path) -> None:
    """Remove the temporary files that killed processes left anywhere under `folder`.

    Those of a process that still runs stay: another run may be writing into the same folder.
    """
    for place, names, _ in os.walk(folder):
        temporary = [name for name in names if name.startswith(TEMPORARY)]
        names[:] = [name for name in names if name not in temporary]  # they may go any moment
        for name in temporary:
            with suppress(OSError, ValueError):  # another sweep was faster, or it is nobody's
                if _is_left_behind(left := Path(place, name)):
                    shutil.rmtree(left)


def _is_left_behind(temporary: Path) -> bool:
    """Whether its process runs no more here, or it is too old to be anyone's."""
    owner, _, process = temporary.name.removeprefix(TEMPORARY).partition("-")
    if time.time() - temporary.stat().st_mtime > ABANDONED:
        return True
    return owner == machine() and not _runs(int(process.partition("-")[0]))


def machine() -> str:
    """Eight hex digits for this machine: on a shared disk, process ids alone are ambiguous."""
    return hashlib.sha256(platform.node().encode()).hexdigest()[:8]


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)  # sends nothing
    except ProcessLookupError:
        return False
    except PermissionError:  # it is another user's
        return True
    return True


def write_text(path: str | Path, text: str) -> None:
    """Write `text` as UTF-8, atomically."""
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def is_file_name(name: str) -> bool:
    """Whether it names one file or folder on every system, and no other place."""
    return name not in ("", ".", "..") and name.isprintable() and not set(name) & set('/\\:*?"<>|')


def trust(notebooks: Iterable[str | Path]) -> None:
    """Sign notebooks that were executed here, as JupyterLab does when it saves one.

    It then shows their outputs whole, with no kernel too; from those of others it takes scripts
    away, and with them the viewer's slider. Where Jupyter's own folder cannot be written to, they
    are treated like those of others.
    """
    import nbformat  # slow to import, and models need no notebooks
    from jupyter_core.paths import jupyter_data_dir
    from nbformat.sign import NotebookNotary

    folder = Path(jupyter_data_dir())
    with suppress(OSError, sqlite3.Error):
        folder.mkdir(parents=True, exist_ok=True)
        with NotebookNotary(data_dir=str(folder)) as notary:
            for notebook in notebooks:
                notary.sign(nbformat.read(notebook, as_version=4))


def check_safetensors(folder: str | Path) -> None:
    """Open the header of every safetensors file under `folder` (or of the one file given).

    The header says how long the file must be, so a truncated file is found without reading its
    weights.

    Raises:
        ValueError: one line that names the broken file.
    """
    folder = Path(folder)
    files = [folder] if folder.is_file() else sorted(folder.rglob("*.safetensors"))
    for file in files:
        try:
            with safe_open(file, framework="pt"):
                pass
        except SafetensorError as error:
            raise ValueError(
                f"the weight file {file} is truncated or corrupt ({first_line(error)}); "
                "fetch it again or train it anew"
            ) from error


def fingerprint(folder: str | Path) -> str:
    """Twelve hex digits of the SHA-256 of the weights and configs under `folder`.

    Readme files and images do not count, so that a better model card makes no new model.
    """
    folder = Path(folder)
    digest = hashlib.sha256()
    for file in sorted(folder.rglob("*")):
        if file.is_file() and file.suffix in {".safetensors", ".json", ".txt", ".jinja"}:
            digest.update(file.relative_to(folder).as_posix().encode())
            digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()[:12]


def data_folder() -> Path:
    """The folder of shipped data: models, prompt sets, concept sets, profiles.

    It is `data/` beside the package in a checkout (an editable install); the environment
    variable `VLDNP_DATA` names another.

    Raises:
        FileNotFoundError: one line, where there is none.
    """
    named = os.environ.get("VLDNP_DATA")
    folder = Path(named) if named else Path(__file__).resolve().parents[1] / "data"
    if not folder.is_dir():
        where = "VLDNP_DATA names" if named else "the checkout should hold"
        raise FileNotFoundError(
            f"no data folder: {where} {folder}, which does not exist; install vldnp from a clone "
            "with pip install -e, or set VLDNP_DATA to its data folder"
        )
    return folder


def user_cache() -> Path:
    """The user's cache folder, as the platform has it; `VLDNP_CACHE` names another.

    What was fetched or put there by hand never belongs to the project. It need not exist.
    """
    from platformdirs import user_cache_path

    named = os.environ.get("VLDNP_CACHE")
    return Path(named) if named else user_cache_path("vldnp")


def unknown(kind: str, name: str, known: Iterable[str]) -> ValueError:
    """The one-line error for a name that is not among the `known` ones, with the closest match."""
    known = sorted(known)
    close = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return ValueError(f"unknown {kind} {name!r}: {hint}known are {', '.join(known) or 'none'}")


def first_line(error: BaseException | str) -> str:
    """The first line of what an error says; libraries' errors have many."""
    return next((line for line in str(error).splitlines() if line.strip()), "no reason given")
