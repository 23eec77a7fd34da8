"""The Moji benchmark: synthetic scenes, and the training of its models."""

import vldnp  # noqa: F401  (sets how OpenMP waits, before torch)
