"""Where models lie (names of `data/models.yaml`, folders, files, hub ids), and their weights:
opened whole or not at all, hashed as they are now, and kept within the memory."""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from huggingface_hub import try_to_load_from_cache
from torch import nn

from vldnp import _files


@dataclass(frozen=True)
class ModelSpec:
    """A model as a profile has it, for `load` and the like: a name and options to open it with."""

    name: str
    options: dict = field(default_factory=dict, hash=False)

    def __str__(self) -> str:
        return self.name


class Source(NamedTuple):
    """Where a model lies: a folder, a file, or the hub at `hub_revision`; `entry` of the table."""

    name: str
    location: str | None  # None where an opener needs no files
    revision: str | None = None
    hub_revision: str | None = None
    entry: dict = {}


_read = cache(_files.read_yaml)


def table() -> dict[str, dict]:
    """`data/models.yaml`: kind ("model", "vlm", "clip", "judge", "preview") → name → entry."""
    return _read(_files.data_folder() / "models.yaml", "table of models")


def find(kind: str, name: str | Path, revision: str | None = None) -> Source:
    """Where the model of this name, folder, file or hub id lies; nothing is fetched."""
    text, known = str(name), table()[kind]
    entry = next((e for n, e in known.items() if text in (n, e.get("repository"))), {})
    if kind == "judge" and text.endswith(".onnx"):
        entry = {**known["nudenet-v2"], "file": Path(text).absolute()}
    folder = _files.data_folder() / "models" / entry["folder"] if "folder" in entry else Path(text)
    if "folder" in entry and not folder.is_dir():
        raise FileNotFoundError(f"{folder} is missing; get the clone, or run {entry['train']}")
    if "repository" in entry:
        pinned = revision or entry["revision"]
        return Source(text, entry["repository"], pinned, pinned, entry)
    if entry and "folder" not in entry:
        file = entry.get("file")
        return Source(text, file and str(_files.user_cache() / "models" / file), entry=entry)
    if folder.is_dir():
        _files.check_safetensors(folder)
        own = text if entry else folder.resolve().name
        return Source(own, str(folder), _files.fingerprint(folder))
    is_hub_id = isinstance(name, str) and text.count("/") == 1 and not text.startswith((".", "/"))
    if not (is_hub_id and all(text.split("/"))):
        raise _files.unknown(kind, text, known)
    if revision is None:
        raise ValueError(f"the {kind} {text!r} of the hub needs a commit: pass revision=...")
    return Source(text, text, revision, revision)


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


# What older checkpoints hold besides weights, and attributes by which FreeU and adapters work.
OLD_BUFFERS = re.compile(r"(position_ids|inv_freq)$")
SETTINGS = ("s1", "s2", "b1", "b2", "scaling", "_active_adapter", "_disable_adapters")


def open_whole(kind: type, source: str | Path, **options) -> nn.Module:
    """What `kind.from_pretrained` opens, of safetensors that hold exactly its weights, or a
    `ValueError`: the libraries initialise missing weights at random, and warn."""
    options |= {"use_safetensors": True, "output_loading_info": True}
    model, info = kind.from_pretrained(source, **options)
    for trouble in ("missing", "mismatched", "unexpected"):
        keys = [k if isinstance(k, str) else k[0] for k in info.get(f"{trouble}_keys") or ()]
        if keys := sorted(key for key in keys if not OLD_BUFFERS.search(key)):
            said = f"{len(keys)} {trouble}, such as {keys[0]!r}; get the files again"
            raise ValueError(f"the weights in {source} do not fit {type(model).__name__}: {said}")
    return model


@contextmanager
def out_of_memory(name: str, hint: str) -> Iterator[None]:
    """`torch.OutOfMemoryError` in one line: for which model, and which settings need less."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        said = _files.first_line(error).rstrip(".")
        raise torch.OutOfMemoryError(f"{name!r}: {said}; {hint}") from error


def live_fingerprint(components: Mapping[str, object], *configs) -> str:
    """Twelve hex digits for what components are now: weights with those of loaded adapters, the
    adapters' scales, FreeU, attention processors, tokenizers; and for `configs`, JSON-able."""
    digest = hashlib.sha256()

    def add(*said) -> None:
        digest.update(json.dumps(said, sort_keys=True, default=str).encode())

    for part, component in sorted(components.items()):
        if isinstance(component, nn.Module):
            for key, tensor in sorted(component.state_dict().items()):
                digest.update(f"{part}.{key}{tensor.dtype}".encode())
                flat = tensor.detach().cpu().reshape(-1).contiguous()
                digest.update(flat.view(torch.uint8).numpy().data)
            for name, module in component.named_modules():
                attention = type(getattr(module, "processor", None)).__name__
                add(name, attention, [vars(module).get(setting) for setting in SETTINGS])
        elif hasattr(component, "get_vocab"):
            add(part, component.get_vocab())
    for config in configs:
        add(*config)
    return digest.hexdigest()[:12]
