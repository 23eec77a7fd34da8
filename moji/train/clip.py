"""The Moji benchmark's CLIP: an open_clip model on 64×64 images and captions."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import open_clip
import torch
from open_clip.model import CLIP
from safetensors.torch import save_file
from torch import Tensor, nn

from moji.train.judge import disturb
from moji.train.loop import Recipe, fit
from moji.train.vae import rendered
from moji.world.scenes import sample_scene
from moji.world.words import CONTEXT_LENGTH, tokenizer
from vldnp._files import atomic, write_text
from vldnp.models.hub import default_device

RECIPE = Recipe("clip", steps=1400, learning_rate=1.5e-3, seed=31, batch_size=96, ema=0.997)
SCENES = 30_000


def config() -> dict:
    """open_clip's configuration of the model and its preprocessing."""
    return {
        "model_cfg": {
            "embed_dim": 128,
            "vision_cfg": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 24},
            "text_cfg": {
                "context_length": CONTEXT_LENGTH,
                "vocab_size": len(tokenizer()),
                "hf_tokenizer_name": "moji",
                "width": 128,
                "heads": 4,
                "layers": 3,
            },
        },
        "preprocess_cfg": {
            "mean": [0.5, 0.5, 0.5],
            "std": [0.5, 0.5, 0.5],
            "interpolation": "bicubic",
            "resize_mode": "squash",
        },
    }


class Contrast(nn.Module):
    """CLIP's symmetric contrastive loss as a `forward`, the form that the training loop wraps."""

    def __init__(self, clip: CLIP):
        super().__init__()
        self.clip = clip
        self.criterion = open_clip.ClipLoss()

    def forward(self, pixels: Tensor, tokens: Tensor) -> Tensor:
        images, words, scale = self.clip(pixels, tokens)
        return self.criterion(images.float(), words.float(), scale.float().clamp(max=100))


def train(folder: Path, steps: int | None = None, seed: int = RECIPE.seed) -> CLIP:
    """Train CLIP from scratch on captioned scenes of its own data stream."""
    recipe = replace(RECIPE, steps=steps or RECIPE.steps, seed=seed)
    images = rendered(SCENES, recipe.seed)
    captions = [sample_scene(recipe.seed, index).caption for index in range(SCENES)]
    tokens = tokenizer()(captions, padding="max_length", truncation=True, return_tensors="pt")
    words = tokens.input_ids
    device = default_device()

    def loss(module: nn.Module, generator: torch.Generator) -> Tensor:
        rows = torch.randint(len(images), (recipe.batch_size,), generator=generator)
        batch = disturb(images[rows].float() / 255, generator) * 2 - 1
        return module(batch.to(device), words[rows].to(device))

    cfg = config()["model_cfg"]
    model = CLIP(cfg["embed_dim"], cfg["vision_cfg"], cfg["text_cfg"])
    return fit(recipe, Contrast(model), loss, folder).clip


def save(model: CLIP, folder: Path) -> None:
    """Write the folder that `open_clip` opens with the `local-dir:` prefix."""
    weights = {name: tensor.half().contiguous() for name, tensor in model.state_dict().items()}
    with atomic(folder / "open_clip_model.safetensors") as fresh:
        save_file(weights, fresh)
    tokenizer().save_pretrained(folder)
    write_text(folder / "open_clip_config.json", json.dumps(config(), indent=2) + "\n")
