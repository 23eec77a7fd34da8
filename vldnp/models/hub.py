"""Locations of models (names of `data/models.yaml`, folders, files, hub ids), and their weights:
opened completely or not at all, and hashed in their current state."""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch
from torch import nn
from transformers.utils import logging

from vldnp import _files


@dataclass(frozen=True)
class ModelSpec:
    """A model in a profile: a name and the options for opening it."""

    name: str
    options: dict = field(default_factory=dict, hash=False)

    def __str__(self) -> str:
        return self.name


class Source(NamedTuple):
    """The location of a model: a folder, a file, a server, or the hub at `hub_revision`."""

    name: str
    location: str | None  # None where an opener needs no files
    revision: str | None = None
    hub_revision: str | None = None
    entry: dict = {}  # of the table


_read = cache(_files.read_yaml)


def table() -> dict[str, dict]:
    """`data/models.yaml`: kind ("model", "vlm", "clip", "judge", "preview") → name → entry."""
    return _read(_files.data_folder() / "models.yaml", "table of models")


def find(kind: str, name: str | Path, revision: str | None = None) -> Source:
    """The location of the model of this name, folder, file or hub id; nothing is fetched."""
    text, known = str(name), table()[kind]
    entry = next((e for n, e in known.items() if text in (n, e.get("repository"))), {})
    if kind == "judge" and text.endswith(".onnx"):
        entry = {**known["nudenet-v2"], "file": Path(text).absolute()}
    if kind == "vlm" and text.startswith(("http://", "https://")):
        return Source(text, text)
    if "repository" in entry:
        pinned = revision or entry["revision"]
        return Source(text, entry["repository"], pinned, pinned, entry)
    if "opener" in entry:
        file = entry.get("file")
        return Source(text, file and str(_files.user_cache() / "models" / file), entry=entry)
    folder = _files.data_folder() / "models" / entry["folder"] if entry else Path(text)
    if folder.is_dir():
        _files.check_safetensors(folder)
        own = text if entry else folder.resolve().name
        return Source(own, str(folder), _files.fingerprint(folder))
    if entry:
        raise FileNotFoundError(f"{folder} is missing; get the clone, or run {entry['train']}")
    if not isinstance(name, str) or not re.fullmatch(r"[^./][^/]*/[^/]+", text):
        raise _files.unknown(kind, text, known)
    if revision is None:
        raise ValueError(f"the {kind} {text!r} of the hub needs a commit: pass revision=...")
    return Source(text, text, revision, revision)


def default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


# Entries of older checkpoints that are no weights, and attributes of FreeU and adapters.
OLD_BUFFERS = re.compile(r"(position_ids|inv_freq)$")
SETTINGS = ("s1", "s2", "b1", "b2", "scaling", "_active_adapter", "_disable_adapters")


def open_whole(kind: type, source: str | Path, **options) -> nn.Module:
    """The result of `kind.from_pretrained` if the safetensors hold exactly its weights; else a
    `ValueError`, because the libraries only warn and initialise missing weights at random."""
    options |= {"use_safetensors": True, "output_loading_info": True}
    # Bars vanish when they are full, because a pipeline has one for each of its parts.
    before = logging.set_tqdm_hook(lambda bar, args, own: bar(*args, **own | {"leave": False}))
    try:
        model, info = kind.from_pretrained(source, **options)
    finally:
        logging.set_tqdm_hook(before)
    for trouble in ("missing", "mismatched", "unexpected"):
        keys = [k if isinstance(k, str) else k[0] for k in info.get(f"{trouble}_keys") or ()]
        if keys := sorted(key for key in keys if not OLD_BUFFERS.search(key)):
            said = f"{len(keys)} {trouble}, such as {keys[0]!r}; get the files again"
            raise ValueError(f"the weights in {source} do not fit {type(model).__name__}: {said}")
    return model


@contextmanager
def out_of_memory(name: str, hint: str) -> Iterator[None]:
    """`torch.OutOfMemoryError` in one line that names the model and settings that need less."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        said = _files.first_line(error).rstrip(".")
        raise torch.OutOfMemoryError(f"{name!r}: {said}; {hint}") from error


def live_fingerprint(components: Mapping[str, object], scheduler: str, *configs: dict) -> str:
    """Twelve hex digits of the components' current state: weights with those of adapters, adapters'
    scales, FreeU, attention processors, tokenizers, the scheduler's class, and `configs`."""
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
        add(scheduler, config)
    return digest.hexdigest()[:12]


def networks(thing: object) -> list:
    """The networks and tokenizers in an object at any depth, such as those of a method's VLM."""
    found, seen, waiting = [], {}, [thing]
    while waiting:
        if id(thing := waiting.pop()) in seen or isinstance(thing, str | type | ModuleType):
            continue
        seen[id(thing)] = thing
        if isinstance(thing, nn.Module) or hasattr(thing, "get_vocab"):
            found.append(thing)
        elif isinstance(thing, Mapping | list | tuple | set | frozenset):
            waiting += thing.values() if isinstance(thing, Mapping) else thing
        else:
            waiting += getattr(thing, "__dict__", {}).values()
            waiting += [getattr(thing, own, None) for own in ("__self__", "func", "args")]
            for cell in getattr(thing, "__closure__", None) or ():
                with suppress(ValueError):  # a cell without a value
                    waiting.append(cell.cell_contents)
    return found


def live(parts: Sequence) -> str:
    """`live_fingerprint` of `networks`; "" where there are none."""
    return live_fingerprint({str(i): part for i, part in enumerate(parts)}, "") if parts else ""
