"""Models of others, opened by libraries that are at least as new as the tested ones."""

import warnings
from contextlib import suppress
from importlib import metadata

from packaging.requirements import Requirement

old = []
with suppress(metadata.PackageNotFoundError):  # vldnp itself, where it runs from a folder
    for need in map(Requirement, metadata.requires("vldnp") or ()):
        with suppress(metadata.PackageNotFoundError):
            if (own := metadata.version(need.name)) not in need.specifier:
                old.append(f"{need.name} {own} (needs {need.specifier})")
if old:
    warnings.warn(f"vldnp was not tested with {', '.join(old)}; update them", stacklevel=2)
