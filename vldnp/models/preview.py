"""Preview decoders: tiny VAEs for the pictures that a VLM is shown, never for the final ones."""

import torch
from diffusers import AutoencoderTiny
from torch import Tensor

from vldnp.models.backbone import Backbone, decoded


class Preview:
    """The decoder of an `AutoencoderTiny`, distilled from the VAE of the model that it serves.

    As TAESD is from Stable Diffusion 1's (Bohan 2023, github.com/madebyollin/taesd).

    Args:
        vae: it is used where it lies, in its own precision.
        name, revision: what identifies it in records.
    """

    def __init__(self, vae: AutoencoderTiny, name: str, revision: str):
        self.vae, self.name, self.revision = vae.eval(), name, revision

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Clean latents `[B, C, h, w]` → pictures `[B, 3, H, W]`, float32 in 0..1."""
        return decoded(self.vae, latents.to(self.vae.device))

    def check(self, backbone: Backbone) -> None:
        """Raise a `ValueError` of one line if it decodes other latents than this model's."""
        own, vae = self.vae.config, backbone.pipe.vae.config
        levels = len(own.decoder_block_out_channels) - 1
        ours = own.latent_channels, own.upsampling_scaling_factor**levels
        theirs = vae.latent_channels, backbone.pipe.vae_scale_factor
        if ours != theirs:
            raise ValueError(
                f"preview {self.name!r} is for latents of {ours[0]} channels, a {ours[1]}th of the "
                f"picture's size, and {backbone.name!r} has {theirs[0]} and a {theirs[1]}th; use "
                "the tiny VAE made for this model"
            )

    def describe(self) -> dict:
        """JSON-able; what decides its pictures."""
        return {"name": self.name, "revision": self.revision, "dtype": str(self.vae.dtype)}
