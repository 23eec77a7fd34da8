"""Adapters around other people's models: diffusion backbones, VLMs, judges, CLIP, and opening them
by name. What is unsafe, and how to steer away from it, is none of their business.
"""
