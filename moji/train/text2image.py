"""The Moji benchmark's Stable Diffusion: text encoder and U-Net, trained together to predict noise
on Stable Diffusion's own schedule; the result is an ordinary `StableDiffusionPipeline` folder."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from moji.train.loop import Recipe, fit
from moji.train.vae import encode, rendered
from moji.world.icons import RESTRICTED
from moji.world.scenes import sample_scene
from moji.world.words import CONTEXT_LENGTH, tokenizer
from vldnp._files import atomic, write_text
from vldnp.models.hub import default_device

RECIPE = Recipe("text2image", steps=5200, learning_rate=1.5e-3, seed=12, ema=0.999)
SCENES = 40_000
EMPTY_CAPTIONS = 0.1
CROWDED = 2.0
"""Relative frequency of captions with two harmless things, which are learnt last."""
MIN_SNR = 5.0
NOISE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def text_encoder() -> CLIPTextModel:
    """A fresh text encoder of 0.7 M parameters."""
    words = tokenizer()
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(words),
            hidden_size=128,
            intermediate_size=512,
            projection_dim=128,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=CONTEXT_LENGTH,
            bos_token_id=words.bos_token_id,
            eos_token_id=words.eos_token_id,
            pad_token_id=words.pad_token_id,
        )
    )


def unet() -> UNet2DConditionModel:
    """A fresh U-Net of 5.6 M parameters on 16×16×4 latents."""
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        block_out_channels=(64, 96, 128),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4,
        cross_attention_dim=128,
        norm_num_groups=16,
    )


class Denoise(nn.Module):
    """Caption tokens, noisy latents, timesteps → predicted noise."""

    def __init__(self, encoder: CLIPTextModel, denoiser: UNet2DConditionModel):
        super().__init__()
        self.encoder, self.denoiser = encoder, denoiser

    def forward(self, tokens: Tensor, noisy: Tensor, timesteps: Tensor) -> Tensor:
        hidden = self.encoder(tokens).last_hidden_state
        return self.denoiser(noisy, timesteps, hidden).sample


def pipeline(vae: AutoencoderKL, model: Denoise) -> StableDiffusionPipeline:
    """The trained parts as a Stable Diffusion pipeline."""
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=model.encoder,
        tokenizer=tokenizer(),
        unet=model.denoiser,
        scheduler=DPMSolverMultistepScheduler(**NOISE, algorithm_type="dpmsolver++"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def save(pipe: StableDiffusionPipeline, folder: Path) -> None:
    """Write the pipeline in half precision, to be used in single.

    transformers opens a model in the precision that its config names, diffusers in float32, so the
    text encoder's config says float32. Paths of the training machine are left out.
    """
    pipe.to(dtype=torch.float16).save_pretrained(folder)
    for path in (folder / "model_index.json", *folder.glob("*/config.json")):
        config = json.loads(path.read_text())
        config.pop("_name_or_path", None)
        if path.parent.name == "text_encoder":
            config["dtype"] = "float32"
        write_text(path, json.dumps(config, indent=2) + "\n")


def min_snr_weight(alphas_cumprod: Tensor) -> Tensor:
    """Loss weight per timestep, min(SNR, 5) / SNR (Hang et al. 2023, arXiv 2303.09556, eq. 8)."""
    snr = alphas_cumprod / (1 - alphas_cumprod)
    return snr.clamp(max=MIN_SNR) / snr


def train(
    vae: AutoencoderKL,
    folder: Path,
    steps: int | None = None,
    seed: int = RECIPE.seed,
    start: Path | None = None,
    learning_rate: float | None = None,
) -> StableDiffusionPipeline:
    """Train text encoder and U-Net for `steps` batches, from scratch or from a pipeline folder.

    Raises:
        ValueError: the folder's pipeline numbers its words in another way than `words.tokenizer`.
    """
    rate = learning_rate or RECIPE.learning_rate
    recipe = replace(RECIPE, steps=steps or RECIPE.steps, learning_rate=rate, seed=seed)
    device = default_device()
    model = Denoise(text_encoder(), unet()) if start is None else _opened(start)
    latents, tokens = _data(vae, recipe.seed, folder)
    share = _shares(recipe.seed, len(latents))
    blank = torch.tensor(tokenizer()("", padding="max_length").input_ids)
    schedule = DDPMScheduler(**NOISE)
    weight = min_snr_weight(schedule.alphas_cumprod)

    def loss(module: nn.Module, generator: torch.Generator) -> Tensor:
        rows = torch.multinomial(share, recipe.batch_size, replacement=True, generator=generator)
        clean, words = latents[rows].float(), tokens[rows]
        drop = torch.rand(len(rows), generator=generator) < EMPTY_CAPTIONS
        words = torch.where(drop[:, None], blank, words)
        noise = torch.randn(clean.shape, generator=generator)
        timesteps = torch.randint(len(weight), (len(rows),), generator=generator)
        noisy = schedule.add_noise(clean, noise, timesteps)
        predicted = module(words.to(device), noisy.to(device), timesteps.to(device)).float()
        error = F.mse_loss(predicted, noise.to(device), reduction="none").mean((1, 2, 3))
        return (error * weight[timesteps].to(device)).mean()

    model = fit(recipe, model, loss, folder, compiled=True)
    return pipeline(vae, model)


def _opened(folder: Path) -> Denoise:
    pipe = StableDiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    if pipe.tokenizer.get_vocab() != tokenizer().get_vocab():
        raise ValueError(f"{folder} numbers words otherwise than the captions; train from scratch")
    return Denoise(pipe.text_encoder, pipe.unet)


def _shares(seed: int, count: int) -> Tensor:
    """How often each scene is drawn, `[n]`, by its caption."""
    named = (sample_scene(seed, index).named for index in range(count))
    crowded = torch.tensor([len(set(things) - set(RESTRICTED)) > 1 for things in named])
    return 1 + (CROWDED - 1) * crowded


def _data(vae: AutoencoderKL, seed: int, folder: Path) -> tuple[Tensor, Tensor]:
    """Scaled latents `[n, 4, 16, 16]` (half precision) and caption tokens `[n, 32]`."""
    cache = folder / f"latents-{seed}.pt"
    if cache.exists():
        stored = torch.load(cache, weights_only=True)
        return stored["latents"], stored["tokens"]
    latents = encode(vae, rendered(SCENES, seed)) * vae.config.scaling_factor
    captions = [sample_scene(seed, index).caption for index in range(SCENES)]
    tokens = tokenizer()(captions, padding="max_length", truncation=True, return_tensors="pt")
    data = {"latents": latents.half(), "tokens": tokens.input_ids}
    with atomic(cache) as fresh:
        torch.save(data, fresh)
    return data["latents"], data["tokens"]
