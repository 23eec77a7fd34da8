"""Training images of the VLMs and the preview decoder: x̂₀ of noised scenes, decoded."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from diffusers import DDPMScheduler, StableDiffusionPipeline
from torch import Tensor
from tqdm.auto import tqdm

from moji.train.text2image import NOISE
from moji.train.vae import as_pixels, encode, to_pixels
from moji.world.icons import RESTRICTED
from moji.world.scenes import (
    Scene,
    caption,
    compose,
    held_out,
    labels,
    patch_truth,
    sample_scene,
    shuffled_scene,
)
from vldnp._files import atomic
from vldnp.guidance import cfg

SCENES, SEED = 24_000, 48
GUIDANCE_SCALE = 3.0
PATCH = 8


def training_scene(seed: int, index: int) -> tuple[Scene, str]:
    """A scene and the caption its x̂₀ is predicted with.

    Half are ordinary scenes. The others are shuffled, so that the answer does not follow from the
    place; their captions name only the harmless things and the place.
    """
    if index % 2:
        scene = sample_scene(seed, index)
        return scene, scene.caption
    scene = shuffled_scene(seed, index)
    harmless = tuple(thing for thing in scene.things if thing not in RESTRICTED)
    words = "" if held_out(harmless, scene.place) else caption(harmless, scene.place)
    return scene, words


class NoisyViews(NamedTuple):
    """The images that a VLM is queried with while n scenes are denoised, and their labels.

    Attributes:
        pixels: uint8 `[n, 3, 64, 64]`, decoded from x̂₀.
        targets: float32 `[n, 44]`, 1 for each thing that is in the scene.
        patches: int64 `[n, 64]`, the thing that covers each patch (`scenes.patch_truth`).
        x0: float32 `[n, 4, 16, 16]`, the x̂₀ themselves, of unit variance.
    """

    pixels: Tensor
    targets: Tensor
    patches: Tensor
    x0: Tensor


def noisy_views(
    pipe: StableDiffusionPipeline,
    count: int,
    seed: int,
    evaluation: bool = False,
    timestep: int | None = None,
) -> NoisyViews:
    """Noise scenes, predict x̂₀ with `pipe`, decode.

    Half of the x̂₀ come from the CFG prediction, half from the conditional one. Timesteps are
    uniform, one scene in ten at 0; or all are at `timestep`.
    """
    generator = torch.Generator().manual_seed(seed)
    blank = _embed(pipe, [""])
    parts = []
    for start in tqdm(range(0, count, 64), desc="predict x̂₀", leave=False):
        rows = range(start, min(count, start + 64))
        if evaluation:
            pairs = [(s, s.caption) for s in (sample_scene(seed, i, evaluation=True) for i in rows)]
        else:
            pairs = [training_scene(seed, i) for i in rows]
        t = torch.randint(1000, (len(pairs),), generator=generator)
        t[torch.rand(len(pairs), generator=generator) < 0.1] = 0
        if timestep is not None:
            t.fill_(timestep)
        rendered = [compose(scene) for scene, _ in pairs]
        pixels = as_pixels((image for image, _ in rendered), len(pairs))
        words = [words for _, words in pairs]
        autocast = torch.autocast(pipe.device.type, torch.bfloat16, enabled=not evaluation)
        with torch.inference_mode(), autocast:
            x0 = _predicted(pipe, pixels, words, blank, t, generator)
            decoded = pipe.vae.decode(x0 / pipe.vae.config.scaling_factor).sample
        targets = torch.from_numpy(np.stack([labels(scene) for scene, _ in pairs]))
        owners = [torch.from_numpy(patch_truth(owner, PATCH)) for _, owner in rendered]
        parts.append(NoisyViews(to_pixels(decoded), targets, torch.stack(owners), x0.float().cpu()))
    return NoisyViews(*map(torch.cat, zip(*parts, strict=True)))


def _predicted(
    pipe: StableDiffusionPipeline,
    pixels: Tensor,
    captions: list[str],
    blank: Tensor,
    t: Tensor,
    generator: torch.Generator,
) -> Tensor:
    """x̂₀ of noised scenes, on the pipeline's device."""
    schedule, device = DDPMScheduler(**NOISE), pipe.device
    alpha = schedule.alphas_cumprod[t].view(-1, 1, 1, 1).to(device)
    clean = (encode(pipe.vae, pixels) * pipe.vae.config.scaling_factor).to(device)
    noise = torch.randn(clean.shape, generator=generator).to(device)
    noisy = schedule.add_noise(clean, noise, t.to(device))
    predicted = pipe.unet(noisy, t.to(device), _embed(pipe, captions)).sample.float()
    guided = torch.arange(len(pixels)) % 4 < 2
    some = noisy[guided]
    empty = pipe.unet(some, t[guided].to(device), blank.expand(len(some), -1, -1)).sample
    predicted[guided] = cfg(empty.float(), predicted[guided], GUIDANCE_SCALE)
    return (noisy - (1 - alpha).sqrt() * predicted) / alpha.sqrt()


def data(
    pipe: StableDiffusionPipeline, folder: Path, seed: int = SEED, scenes: int = SCENES
) -> NoisyViews:
    """`noisy_views` for training, computed once and kept in `folder`."""
    cache = folder / f"views-{seed}.pt"
    if cache.exists():
        return NoisyViews(*torch.load(cache, weights_only=True))
    views = noisy_views(pipe, scenes, seed)
    with atomic(cache) as fresh:
        torch.save(list(views), fresh)
    return views


@torch.inference_mode()
def _embed(pipe: StableDiffusionPipeline, captions: list[str]) -> Tensor:
    tokens = pipe.tokenizer(
        captions, padding="max_length", truncation=True, return_tensors="pt"
    ).input_ids
    return pipe.text_encoder(tokens.to(pipe.device)).last_hidden_state
