"""The Moji benchmark: synthetic scenes, and the training of its models."""

import vldnp  # noqa: F401  (sets OpenMP's variables before torch)
