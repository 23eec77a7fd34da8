"""Files: written whole or not at all, checked weights, data by name, YAML as checked data."""

import difflib
import hashlib
import os
import re
import reprlib
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path

import yaml
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open


@contextmanager
def atomic(path: str | Path) -> Iterator[Path]:
    """A temporary path of the same name that replaces `path` when the block ends without error. A
    hidden folder `.tmp-…` beside `path` holds it, and may remain if the process is killed. An
    OSError is one line that names `path`."""
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".tmp-", dir=path.parent) as folder:
            temporary = Path(folder) / path.name
            yield temporary
            os.replace(temporary, path)
    except OSError as error:
        folder, about = path.parent.absolute(), Path(error.filename or path).absolute()
        if error.errno is None or not (
            folder in about.parents or about in (folder, *folder.parents)
        ):
            raise  # it is about another file
        raised = type(error)(f"cannot write {path}: {first_line(error.strerror)}")
        raised.errno = error.errno
        raise raised from error


def write_text(path: str | Path, text: str) -> None:
    """Write `text` as UTF-8, atomically."""
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def is_file_name(name: str) -> bool:
    """Whether it names one file or folder on every system, and no other place."""
    return name not in ("", ".", "..") and name.isprintable() and not set(name) & set('/\\:*?"<>|')


def check_safetensors(folder: str | Path) -> None:
    """A ValueError of one line if a safetensors file under `folder` (or that file) is truncated."""
    folder = Path(folder)
    for file in [folder] if folder.is_file() else sorted(folder.rglob("*.safetensors")):
        try:
            with safe_open(file, framework="pt"):  # the header says how long the file must be
                pass
        except SafetensorError as error:
            said = f"is truncated or corrupt ({first_line(error)}); fetch it again or train it anew"
            raise ValueError(f"the weight file {file} {said}") from error


def fingerprint(folder: str | Path) -> str:
    """Twelve hex digits of the SHA-256 of the weights and configs under `folder`."""
    folder, digest = Path(folder), hashlib.sha256()
    for file in sorted(folder.rglob("*")):
        if file.is_file() and file.suffix in {".safetensors", ".json", ".txt", ".jinja"}:
            digest.update(file.relative_to(folder).as_posix().encode())
            digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()[:12]


def data_folder() -> Path:
    """The folder of shipped data: `VLDNP_DATA`, or `data/` of the checkout, or of the wheel."""
    package, named = Path(__file__).resolve().parent, os.environ.get("VLDNP_DATA")
    places = [Path(named)] if named else [package.parent / "data", package / "data"]
    for folder in places:
        if named and folder.is_dir() or (folder / "profiles").is_dir():
            return folder
    where = " or ".join(map(str, places))
    raise FileNotFoundError(f"no data in {where}; set VLDNP_DATA to data/ of a clone")


def profile_names() -> list[str]:
    """The profiles in `data/profiles`."""
    return sorted(path.stem for path in (data_folder() / "profiles").glob("*.yaml"))


def user_cache() -> Path:
    """The platform's cache folder of this user, or the folder that `VLDNP_CACHE` names."""
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
    """The first line of an error's text, and the next line if the first ends with a colon."""
    first, *more = [*filter(str.strip, str(error).splitlines())] or ["no reason given"]
    return f"{first} {more[0].strip()}" if first.endswith(":") and more else first


class _UniqueKeys(yaml.SafeLoader):
    """A key written twice is an error; YAML would silently keep the last one."""

    def construct_mapping(self, node, deep=False):
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        if twice := [key for key in keys if keys.count(key) > 1]:
            raise yaml.YAMLError(f"{twice[0]!r} stands twice in the mapping{node.start_mark}")
        return super().construct_mapping(node, deep)


def read_yaml(path: Path, kind: str) -> dict:
    """The mapping in a file, or a FileNotFoundError or ValueError of one line."""
    try:
        text = path.read_text(encoding="utf-8")
        # Nested aliases may expand beyond the memory; 30 aliases cannot.
        if sum(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text)) > 30:
            raise yaml.YAMLError("there are more than 30 aliases")
        data = yaml.load(text, _UniqueKeys)
    except FileNotFoundError:
        raise FileNotFoundError(f"no {kind} {path}: there is no such file") from None
    except OSError as error:
        raise ValueError(f"{kind} {path} cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"{kind} {path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(data, dict):
        raise ValueError(f"{kind} {path} must be a mapping")
    return data


def checked(kind: type, data: dict, path: Path, what: str, *also: str):
    """The dataclass `kind` from the data of a file, a `what`; else a ValueError of one line.
    `also` are further keys that the file may have."""
    try:
        return TypeAdapter(kind).validate_python(data, context=path.parent)
    except ValidationError as error:
        found = error.errors()
    if missing := [repr(wrong["loc"][0]) for wrong in found if wrong["type"] == "missing"]:
        raise ValueError(f"{what} {path.name} is missing {', '.join(missing)}")
    key = [*found[0]["loc"], ""][0]  # an error about several keys has no location
    # Of the alternatives of a union, the one that failed deepest is the most precise.
    wrong = max((w for w in found if key in (*w["loc"], "")), key=lambda w: len(w["loc"]))
    if wrong["type"] == "unexpected_keyword_argument":
        raise unknown(f"key in {what} {path.name}", key, {f.name for f in fields(kind)} | {*also})
    if wrong["type"] == "value_error":  # raised by vldnp
        raise ValueError(f"{what} {path.name}: {key} {wrong['ctx']['error']}".replace("  ", " "))
    said = re.sub("^(Input|Tuple|String)", "it", wrong["msg"].partition(" after")[0])
    said = said.replace("tuple", "list").replace("dictionary", "mapping")
    raise ValueError(f"{what} {path.name}: {key}: {said}, not {reprlib.repr(wrong['input'])}")
