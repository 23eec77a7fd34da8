"""Public prompt sets: where they come from, and a copy of each in the user's cache folder.

Nothing is fetched unasked, and nothing is written into the project. A file is pinned by its
SHA-256: the published one where there is one, else that of the first fetch (trust on first use),
which is kept beside the files in `fetched.json`.
"""

import hashlib
import json
import re
import shutil
import urllib.request
from collections.abc import Callable
from datetime import UTC, datetime
from fnmatch import fnmatch
from functools import cache
from pathlib import Path

import yaml

from vldnp._files import atomic, data_folder, first_line, unknown, user_cache, write_text

LIMIT = 60
"""Seconds to wait for a server."""

SUFFIXES = (".csv", ".parquet")

HUB = "hub://"
"""Begins the address of a file of a hub's data set: `hub://owner/name/path/in/it.csv@commit`."""

ADDRESS = re.compile(
    r"hub://(?P<repository>[^/@]+/[^/@]+)/(?P<file>[^@]+)@(?P<commit>[0-9a-f]{40})"
)


def cache_folder() -> Path:
    """The user's cache folder for prompt sets; it need not exist."""
    return user_cache() / "prompts"


def public_sets() -> dict[str, dict]:
    """The public sets by name, as `data/prompts/public.yaml` describes them; none without it."""
    path = data_folder() / "prompts" / "public.yaml"
    return _described(path, path.stat().st_mtime_ns) if path.is_file() else {}


@cache
def _described(path: Path, changed: int) -> dict[str, dict]:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def fetched(name: str) -> Path:
    """The file of a public set that was fetched, unchanged since.

    Raises:
        FileNotFoundError, ValueError: one line; it was not fetched, or it was changed.
    """
    record = _records().get(name)
    path = cache_folder() / record["file"] if record else None
    if path is None or not path.is_file():
        raise FileNotFoundError(
            f"the prompt set {name!r} is not here yet; get it with: "
            f"python -m vldnp data fetch {name}"
        )
    if _sha256(path) != record["sha256"]:
        raise ValueError(f"{path} was changed since it was fetched; fetch {name!r} again")
    return path


def hub_file(address: str) -> Path:
    """A file of a data set on the hub, from its cache or fetched into it.

    Args:
        address: `hub://owner/name/path/in/it.csv@commit`; the commit in full, so that the same
            prompts are read again.

    Raises:
        ValueError: no such address or file, no access, no connection; one line.
    """
    said = ADDRESS.fullmatch(address)
    if said is None or Path(said["file"]).suffix.lower() not in SUFFIXES:
        raise ValueError(
            f"{address!r} is no file of a hub's data set; write hub://owner/name/file@commit, with "
            "a .csv or .parquet file and the commit's 40 digits"
        )
    from huggingface_hub import hf_hub_download

    try:
        return Path(
            hf_hub_download(
                said["repository"], said["file"], repo_type="dataset", revision=said["commit"]
            )
        )
    except OSError as error:  # which the hub's errors and being offline are
        home = f"https://huggingface.co/datasets/{said['repository']}"
        known = {"hub": said["repository"], "home": home}
        raise ValueError(_no_access(address, known, error)) from error


def fetch(
    name: str,
    source: str | Path | None = None,
    accept: Callable[[Path], object] = lambda path: None,
) -> dict:
    """Download a public set into the cache folder, check it, and record it.

    Args:
        name: as in `public_sets`.
        source: a path or an address to take the file from instead, for a set that its authors give
            on request.
        accept: gets the downloaded file, and raises an error if it is not what it should be.

    Returns:
        The record: `file`, `sha256`, `bytes`, `source`, `revision` (of a hub's data set),
        `fetched` (when).

    Raises:
        ValueError, FileNotFoundError: one line; an unknown name, no connection, no access, no such
            file, a wrong checksum, or what `accept` says. The cache stays what it was.
    """
    described = public_sets()
    if name not in described:
        raise unknown("public prompt set", name, described)
    known, before = described[name], _records().get(name)
    cache_folder().mkdir(parents=True, exist_ok=True)
    where, revision = _locate(name, known, source, before)
    suffix = Path(where.split("?")[0]).suffix.lower()
    if suffix not in SUFFIXES:
        raise ValueError(f"{where} is neither a .csv nor a .parquet file")
    target = cache_folder() / f"{name}{suffix}"
    expected = known.get("sha256") or (before or {}).get("sha256")
    with atomic(target) as temporary:
        _download(where, revision, temporary, name, known)
        digest = _sha256(temporary)
        if expected and digest != expected:
            published = "published" if known.get("sha256") else "recorded at the first fetch"
            raise ValueError(
                f"the file of {name!r} from {where} has the SHA-256 {digest}, not {expected}, the "
                f"one {published}; if the new file is meant, remove {name!r} from "
                f"{cache_folder() / 'fetched.json'}"
            )
        size = temporary.stat().st_size
        try:
            accept(temporary)
        except ValueError as error:
            reason = str(error).replace(str(temporary), target.name)
            raise ValueError(f"what came from {where} is not {name!r}: {reason}") from error
    record = {
        "file": target.name,
        "sha256": digest,
        "bytes": size,
        "source": where,
        "revision": revision,
        "fetched": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    write_text(_records_path(), json.dumps(_records() | {name: record}, indent=2) + "\n")
    return record


def _locate(name: str, known: dict, source, before: dict | None) -> tuple[str, str | None]:
    """The path or address of the file, or `hub:` and its path in the data set, and the commit."""
    if source is not None:
        return str(source), None
    if "url" in known:
        return known["url"], None
    if "hub" not in known:
        raise ValueError(
            f"{name!r} cannot be fetched by itself: get the file from {known['home']} and give it "
            "with --from"
        )
    from huggingface_hub import HfApi

    revision = known.get("revision") or (before or {}).get("revision")
    try:
        info = HfApi().dataset_info(known["hub"], revision=revision, timeout=LIMIT)
    except OSError as error:  # which the hub's errors and being offline are
        raise ValueError(_no_access(name, known, error)) from error
    present = [sibling.rfilename for sibling in info.siblings or []]
    matching = [file for file in present if fnmatch(Path(file).name, known["file"])]
    if len(matching) != 1:
        raise ValueError(
            f"{name!r} should be one file {known['file']!r} of {known['hub']}, which holds "
            f"{', '.join(present) or 'nothing'}; download the right one and give it with --from"
        )
    return f"hub:{matching[0]}", info.sha


def _download(where: str, revision: str | None, target: Path, name: str, known: dict) -> None:
    try:
        if where.startswith("hub:"):
            from huggingface_hub import hf_hub_download

            file = where.removeprefix("hub:")
            where = hf_hub_download(known["hub"], file, repo_type="dataset", revision=revision)
        if where.startswith(("http://", "https://", "file://")):
            with urllib.request.urlopen(where, timeout=LIMIT) as reply, target.open("wb") as file:
                shutil.copyfileobj(reply, file)
        else:
            shutil.copyfile(where, target)
    except OSError as error:  # which urllib's and the hub's errors, and time-outs, are
        raise ValueError(_no_access(name, known, error, where)) from error


def _no_access(name: str, known: dict, error: Exception, where: str = "hub:") -> str:
    reason = first_line(error)
    if not where.startswith("hub:"):
        return f"{name!r} cannot be fetched from {where}: {reason}"
    return (
        f"{name!r} cannot be fetched from {known['hub']}: {reason}; if access has to be asked for, "
        f"do so at {known['home']} and set HF_TOKEN"
    )


def _records_path() -> Path:
    return cache_folder() / "fetched.json"


def _records() -> dict[str, dict]:
    path = _records_path()
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def overview() -> str:
    """What there is: name, whether it was fetched, size, licence, source; one set a paragraph."""
    records, told = _records(), []
    for name, known in public_sets().items():
        record = records.get(name)
        size = record["bytes"] if record else known.get("bytes")
        here = "fetched" if record else "not fetched"
        about = f"{size / 1000:,.0f} kB" if size else "size unknown"
        told.append(
            f"{name}  ({here}; {about})\n  {known['about']}\n  licence: {known['licence']}\n"
            f"  from {known['home']}"
        )
    return "\n".join(told)
