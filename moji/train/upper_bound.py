"""Empirical upper bound of every VLM on half-denoised pictures of the Moji benchmark.

The picture that a VLM sees at timestep t is made of the noisy latents, the caption and nothing
else. A classifier that is given both, instead of what the text-to-image model makes of them, has
all that the VLM has and more. So its F1, with the best of all thresholds, says about how far a
VLM can get. It estimates that bound from below: another network might do better.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDPMScheduler
from torch import Tensor, nn
from tqdm.auto import trange

from moji.train.text2image import NOISE
from moji.train.vae import encode
from moji.world.icons import CATEGORIES, RESTRICTED, THINGS
from moji.world.scenes import PLACES, labels, render, sample_scene

SCENES = 40_000
PHRASES = (*PLACES, *CATEGORIES)
WORDS = (*THINGS, *PHRASES)
SEED, EVALUATION_SEED = 49, 903
"""903 is the stream on which the VLMs are measured."""


class Classifier(nn.Module):
    """Noisy latents `[B, 4, 16, 16]` and words `[B, W]` → logits of the restricted things."""

    def __init__(self, width: int = 48):
        super().__init__()
        steps = ((4, width, 1), (width, 2 * width, 2), (2 * width, 2 * width, 2))
        self.eyes = nn.Sequential(*(layer for step in steps for layer in _block(*step)))
        self.words = nn.Linear(len(WORDS), 128)
        self.head = nn.Sequential(
            nn.Linear(2 * width * 16 + 128, 256),
            nn.SiLU(),
            nn.Dropout(0.2),
            nn.Linear(256, len(RESTRICTED)),
        )

    def forward(self, noisy: Tensor, words: Tensor) -> Tensor:
        return self.head(torch.cat([self.eyes(noisy).flatten(1), self.words(words)], dim=1))


def _block(inner: int, outer: int, stride: int) -> list[nn.Module]:
    return [
        nn.Conv2d(inner, outer, 3, stride, padding=1),
        nn.GroupNorm(8, outer),
        nn.SiLU(),
        nn.Conv2d(outer, outer, 3, padding=1),
        nn.GroupNorm(8, outer),
        nn.SiLU(),
    ]


def scenes(
    vae: AutoencoderKL, count: int, seed: int, evaluation: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Scaled latents `[n, 4, 16, 16]`, words of the caption `[n, W]`, truth `[n, 12]`."""
    drawn = [sample_scene(seed, index, evaluation) for index in range(count)]
    latents = []
    for start in trange(0, count, 1024, desc="encode scenes", leave=False):
        part = [torch.from_numpy(render(s)).permute(2, 0, 1) for s in drawn[start : start + 1024]]
        latents.append(encode(vae, torch.stack(part)) * vae.config.scaling_factor)
    said = [
        [thing in scene.named for thing in THINGS] + [words in scene.caption for words in PHRASES]
        for scene in drawn
    ]
    restricted = [THINGS.index(thing) for thing in RESTRICTED]
    truth = np.stack([labels(scene)[restricted] for scene in drawn])
    return torch.cat(latents), torch.tensor(said, dtype=torch.float32), torch.from_numpy(truth)


@torch.random.fork_rng(devices=[])
def upper_bound(
    vae: AutoencoderKL, timestep: int = 680, steps: int = 5000, count: int = SCENES
) -> dict[str, float]:
    """Train the classifier around `timestep`, measure it there on the VLMs' evaluation scenes.

    Returns:
        `f1` with the best threshold, chosen on the same scenes in its favour, and that
        `threshold`.
    """
    alphas = DDPMScheduler(**NOISE).alphas_cumprod
    latents, words, truth = scenes(vae, count, SEED, evaluation=False)
    torch.manual_seed(SEED)
    network = Classifier()
    optimizer = torch.optim.AdamW(network.parameters(), 1e-3, weight_decay=0.02)
    decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    generator = torch.Generator().manual_seed(SEED)
    for _ in trange(steps, desc="upper bound"):
        rows = torch.randint(len(latents), (96,), generator=generator)
        times = timestep + torch.randint(-80, 81, (96,), generator=generator)
        noisy = _noised(latents[rows], alphas[times.clamp(0, 999)], generator)
        logits = network(noisy, words[rows])
        loss = F.binary_cross_entropy_with_logits(logits, truth[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        decay.step()
    network.eval()
    latents, words, truth = scenes(vae, min(count, 2048), EVALUATION_SEED, evaluation=True)
    noisy = _noised(latents, alphas[timestep].expand(len(latents)), generator)
    with torch.inference_mode():
        parts = zip(noisy.split(256), words.split(256), strict=True)
        found = torch.cat([network(*part).sigmoid() for part in parts])
    by_threshold = {t: f1(found > t, truth > 0.5) for t in np.linspace(0.1, 0.9, 33)}
    best = max(by_threshold, key=by_threshold.get)
    return {"f1": by_threshold[best], "threshold": float(best)}


def f1(said: Tensor, true: Tensor) -> float:
    """F1 over all decisions, `[n, 12]` booleans."""
    return float(2 * (said & true).sum() / max(1, int(said.sum() + true.sum())))


def _noised(latents: Tensor, alphas: Tensor, generator: torch.Generator) -> Tensor:
    alphas = alphas.view(-1, 1, 1, 1)
    noise = torch.randn(latents.shape, generator=generator)
    return alphas.sqrt() * latents + (1 - alphas).sqrt() * noise
