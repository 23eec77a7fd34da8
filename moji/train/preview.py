"""The Moji benchmark's preview decoder: an `AutoencoderTiny` distilled from the VAE as TAESD was
(Bohan 2023, github.com/madebyollin/taesd), on images of x̂₀ at all noise levels."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from diffusers import AutoencoderTiny, StableDiffusionPipeline
from torch import Tensor, nn

from moji.train.loop import Recipe, fit
from moji.train.vae import reconstruction_loss, to_model
from moji.train.views import data
from vldnp.models.hub import default_device

RECIPE = Recipe("preview", steps=3000, learning_rate=2e-3, seed=71, batch_size=16, ema=0.995)
SCENES = 6_000
DATA_SEED = 72


def network() -> AutoencoderTiny:
    """A fresh decoder of 0.19 M parameters; its encoder is neither trained nor used."""
    return AutoencoderTiny(
        encoder_block_out_channels=(8, 8, 8),
        num_encoder_blocks=(1, 1, 1),
        decoder_block_out_channels=(32, 32, 32),
        num_decoder_blocks=(3, 3, 0),  # none at full size, where they would cost the most
    )


def train(
    pipe: StableDiffusionPipeline,
    folder: Path,
    steps: int | None = None,
    seed: int = RECIPE.seed,
    data_seed: int = DATA_SEED,
) -> AutoencoderTiny:
    """Distil the decoder of `pipe`'s VAE: x̂₀ of unit variance to its images."""
    recipe = replace(RECIPE, steps=steps or RECIPE.steps, seed=seed)
    seen = data(pipe, folder, data_seed, scenes=SCENES)
    device = default_device()

    def loss(module: nn.Module, generator: torch.Generator) -> Tensor:
        rows = torch.randint(len(seen.x0), (recipe.batch_size,), generator=generator)
        wanted = to_model(seen.pixels[rows]).to(device)
        return reconstruction_loss(module(seen.x0[rows].to(device)).float(), wanted)

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        tiny = network()
    tiny.decoder = fit(recipe, tiny.decoder, loss, folder)
    return tiny
