"""The benchmark's world: icons, scenes, captions, words. It imports nothing of `vldnp`."""
