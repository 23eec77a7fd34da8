"""Public prompt sets: where they come from, and a checked copy of each in the user's cache folder.

A file is pinned by its SHA-256: the published one, else that of the first fetch, which is kept in
`fetched.json`. Nothing is fetched unasked or written into the project.
"""

import hashlib
import json
import re
import shutil
import urllib.request
from collections.abc import Callable
from pathlib import Path

import yaml

from vldnp._files import atomic, data_folder, first_line, unknown, user_cache, write_text

SUFFIXES = (".csv", ".tsv", ".parquet")
ADDRESS = re.compile(r"hub://([^/@]+/[^/@]+)/([^@]+)@([0-9a-f]{40})")
TIMEOUT = 60


def cache_folder() -> Path:
    """The user's cache folder for prompt sets; it need not exist."""
    return user_cache() / "prompts"


def public_sets() -> dict[str, dict]:
    """The public sets by name, as `data/prompts/public.yaml` describes them; none without it."""
    path = data_folder() / "prompts" / "public.yaml"
    return yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else {}


def fetched(name: str) -> Path:
    """The file of a public set that was fetched, unchanged since.

    Raises:
        FileNotFoundError, ValueError: one line; it was not fetched, or it was changed.
    """
    record = _records().get(name)
    if record is None or not (path := cache_folder() / record["file"]).is_file():
        raise FileNotFoundError(
            f"the prompt set {name!r} is not here yet; get it with: python -m vldnp data fetch "
            f"{name}"
        )
    if _sha256(path) != record["sha256"]:
        raise ValueError(f"{path} was changed since it was fetched; fetch {name!r} again")
    return path


def hub_file(address: str) -> Path:
    """A file of a data set on the hub, `hub://owner/name/file.csv@commit`, fetched where needed.

    Raises:
        ValueError: no such address or file, no access, no connection; one line.
    """
    found = ADDRESS.fullmatch(address)
    if found is None or Path(found[2]).suffix.lower() not in SUFFIXES:
        raise ValueError(
            f"{address!r} is no file of a hub's data set; write hub://owner/name/file@commit, with "
            "a .csv, .tsv or .parquet file and the commit's 40 digits"
        )
    return _from_hub(address, *found.groups())


def _from_hub(name: str, repository: str, file: str, revision: str | None) -> Path:
    """The one file of a data set whose path ends in `file`, in the hub's cache."""
    from huggingface_hub import snapshot_download

    options = {"repo_type": "dataset", "allow_patterns": [file, f"*/{file}"], "revision": revision}
    try:
        folder = Path(snapshot_download(repository, **options))
    except OSError as error:  # which the hub's errors and being offline are
        raise ValueError(
            f"{name!r} cannot be fetched from {repository}: {first_line(error)}; if access has to "
            f"be asked for, do so at https://huggingface.co/datasets/{repository} and set HF_TOKEN"
        ) from error
    if len(found := sorted(folder.rglob(file))) != 1:
        names = ", ".join(path.name for path in found)
        raise ValueError(
            f"{name!r} cannot be fetched from {repository}: it should hold one file {file!r}, and "
            f"holds {names or 'none'}; download the right one and give it with --from"
        )
    return found[0]


def fetch(
    name: str, source: str | Path | None, accept: Callable[[Path], object] = lambda path: None
) -> dict:
    """Download a public set into the cache folder, check it, and record it.

    Args:
        name: as in `public_sets`.
        source: a path or an address to take the file from instead.
        accept: gets the downloaded file, and raises ValueError if it is not what it should be.

    Returns:
        The record: `file, sha256, bytes, source`, and `revision` of a hub's data set.

    Raises:
        ValueError: one line; the cache stays what it was.
    """
    if name not in (sets := public_sets()):
        raise unknown("public prompt set", name, sets)
    known, before, revision = sets[name], _records().get(name, {}), None
    if source is None and "hub" in known:
        revision = known.get("revision") or before.get("revision")
        source = _from_hub(name, known["hub"], known["file"], revision)
        commits = (part for part in source.parts if re.fullmatch("[0-9a-f]{40}", part))
        revision = next(commits, revision)
    elif source is None and "url" not in known:
        raise ValueError(f"get the file of {name!r} from {known['home']} and give it with --from")
    where = str(source or known["url"])
    suffix = Path(where.split("?")[0]).suffix.lower()
    if suffix not in SUFFIXES:
        raise ValueError(f"{where} is neither a .csv, a .tsv nor a .parquet file")
    target = cache_folder() / f"{name}{suffix}"
    with atomic(target) as temporary:
        _download(where, temporary, name)
        found, expected = _sha256(temporary), known.get("sha256") or before.get("sha256")
        if expected and found != expected:
            published = "published" if known.get("sha256") else "recorded at the first fetch"
            raise ValueError(
                f"the file of {name!r} from {where} has the SHA-256 {found}, not {expected}, the "
                f"one {published}; if the new file is meant, remove {name!r} from fetched.json"
            )
        try:
            accept(temporary)
        except ValueError as error:
            reason = str(error).replace(str(temporary), target.name)
            raise ValueError(f"what came from {where} is not {name!r}: {reason}") from error
    place = where if revision is None else f"hub://{known['hub']}"
    record = {"file": target.name, "sha256": found, "bytes": target.stat().st_size}
    record |= {"source": place, "revision": revision}
    text = json.dumps(_records() | {name: record}, indent=2)
    write_text(cache_folder() / "fetched.json", text + "\n")
    return record


def _download(where: str, target: Path, name: str) -> None:
    try:
        if where.startswith(("http://", "https://", "file://")):
            with urllib.request.urlopen(where, timeout=TIMEOUT) as reply, target.open("wb") as file:
                shutil.copyfileobj(reply, file)
        else:
            shutil.copyfile(where, target)
    except OSError as error:  # which urllib's errors and time-outs are
        raise ValueError(f"{name!r} cannot be fetched from {where}: {first_line(error)}") from error


def overview() -> str:
    """What there is: name, whether it was fetched, licence, source; a paragraph each."""
    lines = []
    for name, known in public_sets().items():
        here = "fetched" if name in _records() else "not fetched"
        lines += [f"{name}  ({here})", f"  {known['about']}", f"  licence: {known['licence']}"]
        lines += [f"  from {known['home']}"]
    return "\n".join([*lines, f"cache folder: {cache_folder()}"])


def _records() -> dict[str, dict]:
    path = cache_folder() / "fetched.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
