"""Weights: opened whole or not at all, hashed as they are now, and kept within the memory."""

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from vldnp._files import first_line

OLD_BUFFERS = re.compile(r"(position_ids|inv_freq)$")
"""What older checkpoints hold besides weights; it follows from the config."""

SETTINGS = ("s1", "s2", "b1", "b2", "scaling", "_active_adapter", "_disable_adapters")
"""Attributes of modules by which FreeU and adapters decide their output."""


def open_whole(kind: type, source: str | Path, **options) -> nn.Module:
    """What `kind.from_pretrained` opens, of safetensors that hold exactly its weights.

    The libraries themselves initialise at random what is missing, and warn; here weights that are
    missing, of another shape, or unknown, are a `ValueError` of one line.
    """
    options |= {"use_safetensors": True, "output_loading_info": True}
    model, info = kind.from_pretrained(source, **options)
    for trouble in ("missing", "mismatched", "unexpected"):
        keys = [k if isinstance(k, str) else k[0] for k in info.get(f"{trouble}_keys") or ()]
        if keys := sorted(key for key in keys if not OLD_BUFFERS.search(key)):
            raise ValueError(
                f"the weights in {source} do not fit {type(model).__name__}: {len(keys)} "
                f"{trouble}, such as {keys[0]!r}; get the files again"
            )
    return model


@contextmanager
def out_of_memory(name: str, hint: str) -> Iterator[None]:
    """`torch.OutOfMemoryError` in one line: for which model, and which settings need less."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        said = first_line(error).rstrip(".")
        raise torch.OutOfMemoryError(f"{name!r}: {said}; {hint}") from error


def weights_fingerprint(**models: nn.Module) -> str:
    """Twelve hex digits of the SHA-256 of models' weights, wherever they come from."""
    digest = hashlib.sha256()
    for part, model in models.items():
        _add_weights(digest, part, model)
    return digest.hexdigest()[:12]


def live_fingerprint(pipe) -> str:
    """Twelve hex digits for all that decides a pipeline's images: live, not as it was opened.

    The weights of every component with those of loaded adapters, the adapters' scales, the
    settings of FreeU, attention processors, tokenizers, the scheduler's class and config.
    """
    digest = hashlib.sha256()

    def add(*said) -> None:
        digest.update(json.dumps(said, sort_keys=True, default=str).encode())

    for part, component in sorted(pipe.components.items()):
        if isinstance(component, nn.Module):
            _add_weights(digest, part, component)
            for name, module in component.named_modules():
                attention = type(getattr(module, "processor", None)).__name__
                add(name, attention, [vars(module).get(setting) for setting in SETTINGS])
        elif hasattr(component, "get_vocab"):
            add(part, component.get_vocab())
    for config in (pipe.scheduler.config, pipe.config):  # private keys say where it lay
        add(type(pipe.scheduler).__name__, {k: v for k, v in config.items() if k[0] != "_"})
    return digest.hexdigest()[:12]


def _add_weights(digest, part: str, model: nn.Module) -> None:
    for key, tensor in sorted(model.state_dict().items()):
        digest.update(f"{part}.{key}{tensor.dtype}".encode())
        flat = tensor.detach().cpu().reshape(-1).contiguous()
        digest.update(flat.view(torch.uint8).numpy().data)
