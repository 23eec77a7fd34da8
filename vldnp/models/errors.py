"""Errors of other people's libraries in one line: the model, what the library says, what helps."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from vldnp._files import first_line


@contextmanager
def out_of_memory(name: str, hint: str) -> Iterator[None]:
    """Where the GPU's memory does not last, say for which model, and which settings need less."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise torch.OutOfMemoryError(f"{name!r}: {first_line(error)} {hint}") from error
