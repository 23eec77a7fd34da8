"""Errors of other people's libraries in one line: the model, what the library says, what helps."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from huggingface_hub import constants, errors

from vldnp._files import first_line
from vldnp.models.hub import Source


@contextmanager
def out_of_memory(name: str, hint: str) -> Iterator[None]:
    """Where the GPU's memory does not last, say for which model, and which settings need less."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise torch.OutOfMemoryError(
            f"{name!r}: {first_line(error).rstrip('.')}; {hint}"
        ) from error


TROUBLES = (
    ImportError,  # a package that a model needs is not installed
    OSError,  # something is missing on disk or on the hub
    ValueError,
    RuntimeError,  # shapes that do not fit, and too little memory
    errors.HTTPError,
    errors.RevisionResolutionError,
)


@contextmanager
def opening(source: Source) -> Iterator[None]:
    """Turn what libraries raise while a model is opened into one line."""
    try:
        yield
    except TROUBLES as error:
        hint = _hint(error, source)
        is_ours = isinstance(error, FileNotFoundError | ValueError) and "\n" not in str(error)
        if is_ours and not hint:
            raise
        where = f"{source.location} at revision {source.revision}"
        reason = "; ".join(filter(None, [first_line(error).rstrip("."), hint]))
        raise ValueError(f"{source.name!r} cannot be opened from {where}: {reason}") from error


def _hint(error: BaseException | None, source: Source) -> str:
    """What helps; the libraries raise errors of their own, and the hub's are behind them."""
    behind, page = [], f"{constants.ENDPOINT}/{source.location}"
    while error is not None:
        behind.append(error)
        error = error.__cause__ or error.__context__

    def any_is(*kinds: type[BaseException]) -> bool:
        return any(isinstance(e, kinds) for e in behind)

    refused = {getattr(getattr(e, "response", None), "status_code", None) for e in behind}
    if any_is(torch.OutOfMemoryError):
        return (
            "it needs less with dtype='float16', with model_cpu_offload=True or, if it is a "
            "VLM, with quantization={'load_in_4bit': True}"
        )
    if source.hub_revision is None:
        return ""
    if any_is(errors.RevisionNotFoundError, errors.RemoteEntryNotFoundError):
        return f"its revisions and their files are at {page}/commits"
    if any_is(errors.RepositoryNotFoundError) or refused & {401, 403}:
        return (
            f"check its name, accept its terms at {page} if it has any, and log in with "
            "`hf auth login` or set HF_TOKEN"
        )
    offline = (errors.LocalEntryNotFoundError, ConnectionError, TimeoutError)
    if any_is(*offline, errors.HTTPError, errors.RevisionResolutionError):
        how = "unset HF_HUB_OFFLINE" if constants.HF_HUB_OFFLINE else "go online"
        return f"{how} once to fetch it, or pass a folder that holds it"
    return ""
