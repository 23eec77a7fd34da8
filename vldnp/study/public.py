"""Where public prompt sets are: `data/prompts/public.yaml`, the user's cache folder, the hub."""

import hashlib
import json
import re
from pathlib import Path

import yaml

from vldnp._files import data_folder, first_line, user_cache

ADDRESS = re.compile(r"hub://([^/@]+/[^/@]+)/([^@]+)@([0-9a-f]{40}|newest)")


def cache_folder() -> Path:
    """The user's cache folder for prompt sets; it need not exist."""
    return user_cache() / "prompts"


def public_sets() -> dict[str, dict]:
    """Name → description, as `data/prompts/public.yaml` has it; none without that file."""
    path = data_folder() / "prompts" / "public.yaml"
    return yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else {}


def records() -> dict[str, dict]:
    """Name → what was fetched: `file, sha256, source`."""
    path = cache_folder() / "fetched.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def fetched(name: str) -> Path:
    """The file of a public set; a one-line error where it was not fetched, or changed since."""
    record = records().get(name)
    if record is None or not (path := cache_folder() / record["file"]).is_file():
        get = f"python -m vldnp data fetch {name}"
        raise FileNotFoundError(f"the prompt set {name!r} is not here yet; get it with: {get}")
    if hashlib.sha256(path.read_bytes()).hexdigest() != record["sha256"]:
        raise ValueError(f"{path} was changed since it was fetched; fetch {name!r} again")
    return path


def hub_file(address: str) -> Path:
    """The one file of a data set whose path ends so (a pattern may say how), in the hub's cache."""
    from huggingface_hub import snapshot_download

    if (found := ADDRESS.fullmatch(address)) is None:
        form = "hub://owner/name/file@commit, with the commit's 40 digits"
        raise ValueError(f"{address!r} is no file of a hub's data set; write {form}")
    repository, file, commit = found.groups()
    options = {"repo_type": "dataset", "allow_patterns": [file, f"*/{file}"]}
    try:
        revision = None if commit == "newest" else commit
        folder = Path(snapshot_download(repository, revision=revision, **options))
    except OSError as error:  # which the hub's errors and being offline are
        page = f"https://huggingface.co/datasets/{repository}"
        hint = f"if access has to be asked for, do so at {page} and set HF_TOKEN"
        raise ValueError(f"cannot fetch {address}: {first_line(error)}; {hint}") from error
    if len(here := sorted(folder.rglob(file))) != 1:
        names = ", ".join(path.name for path in here) or "none"
        raise ValueError(f"cannot fetch {address}: that should be one file, not {names}")
    return here[0]
