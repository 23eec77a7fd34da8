"""The Moji benchmark's autoencoder: 64×64×3 pictures to 16×16×4 latents and back."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor, nn
from tqdm.auto import trange

from moji.train.loop import Recipe, fit, save_grid
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


def rendered(count: int, seed: int) -> Tensor:
    """Training scenes of a stream as uint8 `[n, 3, 64, 64]`."""
    pixels = np.empty((count, 3, 64, 64), dtype=np.uint8)
    for index in trange(count, desc="render scenes", leave=False):
        pixels[index] = render(sample_scene(seed, index)).transpose(2, 0, 1)
    return torch.from_numpy(pixels)


def to_model(pixels: Tensor) -> Tensor:
    """uint8 pixels to the autoencoder's range −1..1."""
    return pixels.float() / 127.5 - 1


def edges(pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Vertical and horizontal differences of neighbouring pixels."""
    return pixels.diff(dim=2), pixels.diff(dim=3)


def reconstruction_loss(decoded: Tensor, pixels: Tensor) -> Tensor:
    """L1 + MSE, and L1 on edges: outlines are few pixels but most of what makes an icon."""
    edge = sum(F.l1_loss(a, b) for a, b in zip(edges(decoded), edges(pixels), strict=True))
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
    recipe = Recipe(**{**vars(RECIPE), "steps": steps or RECIPE.steps, "seed": seed})
    pixels = rendered(IMAGES, recipe.seed)
    device = default_device()

    def loss(module: nn.Module, generator: torch.Generator) -> Tensor:
        rows = torch.randint(len(pixels), (recipe.batch_size,), generator=generator)
        batch = to_model(pixels[rows]).to(device)
        noise = torch.randn((len(rows), 4, 16, 16), generator=generator).to(device)
        decoded, kl = module(batch, noise)
        return reconstruction_loss(decoded, batch) + 1e-4 * kl

    def preview(module: nn.Module, folder: Path) -> None:
        with torch.inference_mode():
            sample = to_model(pixels[:32]).to(device)
            decoded = module.vae(sample).sample
        pairs = torch.cat([sample.view(2, 16, 3, 64, 64), decoded.view(2, 16, 3, 64, 64)], dim=1)
        save_grid(pairs.flatten(0, 1) / 2 + 0.5, folder / "samples.png")

    vae = fit(recipe, Autoencode(network()), loss, folder, preview).vae
    with torch.inference_mode():
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
