"""Adapters around other people's models: diffusion backbones, VLMs, judges, CLIP."""
