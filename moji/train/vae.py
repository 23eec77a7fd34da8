"""The Moji benchmark's autoencoder: 64×64×3 images to 16×16×4 latents and back."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor, nn
from tqdm.auto import tqdm

from moji.train.loop import Recipe, fit
from moji.world.scenes import render, sample_scene
from vldnp.models.hub import default_device

RECIPE = Recipe("vae", steps=2600, learning_rate=1.5e-3, seed=11, batch_size=16, ema=0.995)
IMAGES = 40_000


def network() -> AutoencoderKL:
    """A fresh autoencoder of 0.9 M parameters."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(32, 64, 64),
        layers_per_block=1,
        norm_num_groups=16,
        latent_channels=4,
        sample_size=64,
        scaling_factor=1.0,
    )


def as_pixels(images: Iterable[np.ndarray], count: int) -> Tensor:
    """uint8 arrays `[64, 64, 3]` as one tensor `[count, 3, 64, 64]`."""
    rows = (image.transpose(2, 0, 1) for image in images)
    return torch.from_numpy(np.fromiter(rows, np.dtype((np.uint8, (3, 64, 64))), count))


def rendered(count: int, seed: int) -> Tensor:
    """Training scenes of a stream as uint8 `[n, 3, 64, 64]`."""
    rows = tqdm(range(count), desc="render scenes", leave=False)
    return as_pixels((render(sample_scene(seed, index)) for index in rows), count)


def to_model(pixels: Tensor) -> Tensor:
    """uint8 pixels to the autoencoder's range −1..1."""
    return pixels.float() / 127.5 - 1


def to_pixels(decoded: Tensor) -> Tensor:
    """The autoencoder's range −1..1 to uint8 pixels on the CPU."""
    return ((decoded.float().cpu() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def reconstruction_loss(decoded: Tensor, pixels: Tensor) -> Tensor:
    """L1 + MSE + L1 of vertical and horizontal differences, as outlines are few pixels."""
    edge = sum(F.l1_loss(decoded.diff(dim=d), pixels.diff(dim=d)) for d in (2, 3))
    return F.l1_loss(decoded, pixels) + F.mse_loss(decoded, pixels) + edge


class Autoencode(nn.Module):
    """Encode, sample, decode in one `forward`, the form that the training loop wraps."""

    def __init__(self, vae: AutoencoderKL):
        super().__init__()
        self.vae = vae

    def forward(self, pixels: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        moments = self.vae.quant_conv(self.vae.encoder(pixels))
        mean, log_variance = moments.float().chunk(2, dim=1)
        log_variance = log_variance.clamp(-20, 10)
        latents = mean + noise * (0.5 * log_variance).exp()
        kl = 0.5 * (mean**2 + log_variance.exp() - 1 - log_variance).mean()
        decoded = self.vae.decoder(self.vae.post_quant_conv(latents))
        return decoded.float(), kl


def train(folder: Path, steps: int | None = None, seed: int = RECIPE.seed) -> AutoencoderKL:
    """Train the autoencoder and set its scaling factor so that latents have unit variance."""
    recipe = replace(RECIPE, steps=steps or RECIPE.steps, seed=seed)
    pixels = rendered(IMAGES, recipe.seed)
    device = default_device()

    def loss(module: nn.Module, generator: torch.Generator) -> Tensor:
        rows = torch.randint(len(pixels), (recipe.batch_size,), generator=generator)
        batch = to_model(pixels[rows]).to(device)
        noise = torch.randn((len(rows), 4, 16, 16), generator=generator).to(device)
        decoded, kl = module(batch, noise)
        return reconstruction_loss(decoded, batch) + 1e-4 * kl

    vae = fit(recipe, Autoencode(network()), loss, folder).vae
    latents = encode(vae, pixels[:1024])
    vae.register_to_config(scaling_factor=round(float(1 / latents.std()), 5))
    return vae


@torch.inference_mode()
def encode(vae: AutoencoderKL, pixels: Tensor, batch_size: int = 128) -> Tensor:
    """Unscaled latent means of uint8 pixels: `[n, 4, 16, 16]` float32."""
    parts = [
        vae.encode(to_model(part).to(vae.device)).latent_dist.mean.float().cpu()
        for part in pixels.split(batch_size)
    ]
    return torch.cat(parts)
