"""Training of the Moji benchmark's judges, on rendered scenes whose content is known."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor, nn
from tqdm.auto import tqdm

from moji.judge import CNNJudge
from moji.train.damage import damaged_scene
from moji.train.loop import Recipe, fit
from moji.train.vae import as_pixels, encode, to_pixels
from moji.world.icons import RESTRICTED, THINGS
from moji.world.scenes import labels, render, shuffled_scene
from vldnp.models.hub import default_device

SCENES = 24_000


@dataclass(frozen=True)
class Variant:
    """A judge's recipe and network (arguments of `CNNJudge`). `damaged`: icons as `damage` leaves
    them; one image in `through_vae` is encoded and decoded by the autoencoder."""

    recipe: Recipe
    network: dict = field(default_factory=dict)
    damaged: bool = False
    through_vae: int = 8


VARIANTS = {
    "moji-judge": Variant(
        Recipe("judge", steps=1400, learning_rate=2e-3, seed=21, batch_size=48, ema=0.996)
    ),
    "moji-judge-2": Variant(
        Recipe("judge-2", steps=1600, learning_rate=2e-3, seed=63, batch_size=48, ema=0.996),
        {"architecture": "places"},
        damaged=True,
        through_vae=4,
    ),
}


def truth(count: int, seed: int, damaged: bool = False) -> tuple[Tensor, Tensor]:
    """Shuffled scenes as uint8 `[n, 3, 64, 64]` and their labels `[n, 44]`.

    A label of a `damaged` scene is NaN where the visible area does not decide.
    """
    rows = [shuffled_scene(seed, i) for i in tqdm(range(count), desc="render scenes", leave=False)]
    pairs = [damaged_scene(s) if damaged else (render(s), labels(s)) for s in rows]
    images, targets = zip(*pairs, strict=True)
    return as_pixels(images, count), torch.from_numpy(np.stack(targets))


@torch.inference_mode()
def round_trip(vae: AutoencoderKL, pixels: Tensor, batch_size: int = 128) -> Tensor:
    """Images after encoding and decoding, uint8 like their input."""
    parts = [
        to_pixels(vae.decode(encode(vae, part).to(vae.device)).sample)
        for part in pixels.split(batch_size)
    ]
    return torch.cat(parts)


def disturb(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Random softness, contrast, brightness and noise on images `[B, 3, 64, 64]` in 0..1.

    Generated images are softer than rendered ones.
    """
    count = len(pixels)
    blurred = F.avg_pool2d(F.pad(pixels, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    amount = torch.rand((count, 1, 1, 1), generator=generator)
    gain = 1 + 0.2 * (torch.rand((count, 1, 1, 1), generator=generator) - 0.5)
    shift = 0.1 * (torch.rand((count, 3, 1, 1), generator=generator) - 0.5)
    noise = 0.04 * torch.randn(pixels.shape, generator=generator)
    noise *= torch.rand((count, 1, 1, 1), generator=generator)
    softened = pixels.lerp(blurred, amount)
    return ((softened - 0.5) * gain + 0.5 + shift + noise).clamp(0, 1)


def train(vae: AutoencoderKL, folder: Path, steps: int | None, name: str, seed: int) -> CNNJudge:
    """Train the judge `name` of `VARIANTS` on rendered scenes drawn from `seed`."""
    variant = VARIANTS[name]
    recipe = replace(variant.recipe, steps=steps or variant.recipe.steps, seed=seed)
    pixels, targets = truth(SCENES, recipe.seed, variant.damaged)
    seen = SCENES // variant.through_vae
    pixels[:seen] = round_trip(vae, pixels[:seen])
    with torch.random.fork_rng():
        torch.manual_seed(recipe.seed)
        judge = CNNJudge(THINGS, tuple(RESTRICTED), **variant.network)
    device = default_device()

    def loss(module: nn.Module, generator: torch.Generator) -> Tensor:
        rows = torch.randint(len(pixels), (recipe.batch_size,), generator=generator)
        batch = disturb(pixels[rows].float() / 255, generator).to(device)
        logits, wanted = module(batch).float(), targets[rows].to(device)
        known = wanted.isfinite()
        return F.binary_cross_entropy_with_logits(logits[known], wanted[known])

    judge.network = fit(recipe, judge.network, loss, folder)
    return judge
