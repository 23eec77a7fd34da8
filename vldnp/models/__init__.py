"""Other people's models. The oldest versions of libraries that open them rightly are checked."""

import warnings
from contextlib import suppress
from importlib import metadata

from packaging.requirements import Requirement


def outdated() -> list[str]:
    """What is installed and older than this package needs, each in words."""
    found = []
    with suppress(metadata.PackageNotFoundError):  # vldnp itself, where it runs from a folder
        for need in map(Requirement, metadata.requires("vldnp") or ()):
            with suppress(metadata.PackageNotFoundError):
                if (own := metadata.version(need.name)) not in need.specifier:
                    found.append(f"{need.name} {own} (needs {need.specifier})")
    return found


if too_old := outdated():
    warnings.warn(f"vldnp does not know {', '.join(too_old)}: update them", stacklevel=2)
