"""Where models lie: names, which are data (`data/models.yaml`), folders, files, hub ids."""

from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import torch
from huggingface_hub import try_to_load_from_cache

from vldnp._files import check_safetensors, data_folder, fingerprint, unknown, user_cache
from vldnp._yaml import read_yaml


@dataclass(frozen=True)
class ModelSpec:
    """A model as a profile has it: a name, folder or hub id, and the options it is opened with.

    `vldnp.load`, `load_vlm`, `load_judge` and the like take it in place of a name.
    """

    name: str
    options: dict = field(default_factory=dict, hash=False)

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Source:
    """Where a model lies: a folder, a file, or the hub at `hub_revision`; `entry` of the table."""

    name: str
    location: str | None  # None where an opener needs no files
    revision: str | None = None
    hub_revision: str | None = None
    entry: dict = field(default_factory=dict, hash=False)


_read = cache(read_yaml)


def table() -> dict[str, dict]:
    """`data/models.yaml`: kind ("model", "vlm", "clip", "judge", "preview") → name → entry."""
    return _read(data_folder() / "models.yaml", "table of models")


def names(kind: str, shipped: bool | None = None) -> list[str]:
    """The names of a kind, or only those of the models that are shipped, or are not."""
    known = table()[kind].items()
    return [name for name, entry in known if shipped in (None, "folder" in entry)]


def find(kind: str, name: str | Path, revision: str | None = None) -> Source:
    """Where the model of this name, folder, file or hub id lies; nothing is fetched.

    Raises:
        ValueError, FileNotFoundError: one line; no such name, or a shipped folder is missing.
    """
    text, known = str(name), table()[kind]
    entry = next((e for n, e in known.items() if text in (n, e.get("repository"))), {})
    if kind == "judge" and text.endswith(".onnx"):
        entry = {**known["nudenet-v2"], "file": Path(text).absolute()}
    if "folder" in entry:
        folder = data_folder() / "models" / entry["folder"]
        if not folder.is_dir():
            raise FileNotFoundError(
                f"the {kind} {text!r} is not in {folder.parent}; get the whole clone, or make it "
                f"with: {entry['train']}"
            )
        return _folder(text, folder)
    if "repository" in entry:
        pinned = revision or entry["revision"]
        return Source(text, entry["repository"], pinned, pinned, entry)
    if entry:
        file = entry.get("file")
        return Source(text, file and str(user_cache() / "models" / file), entry=entry)
    if Path(text).is_dir():
        return _folder(Path(text).resolve().name, Path(text))
    is_hub_id = isinstance(name, str) and text.count("/") == 1 and not text.startswith((".", "/"))
    if not (is_hub_id and all(text.split("/"))):
        raise unknown(kind, text, known)
    if revision is None:
        raise ValueError(
            f"{kind} {text!r} is no folder here, and as a hub id it needs a commit: "
            "pass revision=..., so that the same weights are used again"
        )
    return Source(text, text, revision, revision)


def _folder(name: str, folder: Path) -> Source:
    check_safetensors(folder)
    return Source(name, str(folder), fingerprint(folder))


def whereabouts(kind: str, name: str | Path | ModelSpec) -> tuple[str, bool]:
    """Where a model comes from, and whether it is here; nothing is fetched. Errors as of `find`."""
    if str(name).startswith(("http://", "https://")):
        return str(name), True
    source = find(kind, str(name), getattr(name, "options", {}).get("revision"))
    place, revision = source.location or source.entry["opener"], source.hub_revision
    if revision is None:
        return place, source.location is None or Path(place).exists()
    configs = "model_index.json", "config.json", "open_clip_config.json"
    cached = (try_to_load_from_cache(place, file, revision=revision) for file in configs)
    return f"{place} at {revision[:8]}", any(isinstance(file, str) for file in cached)


def default_device() -> str:
    """Where models are opened of which nothing else is said: CUDA where there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"
