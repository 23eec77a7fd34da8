"""How good the Moji benchmark's models are, on scenes and prompts that training never saw."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import vldnp
from moji.judge import CNNJudge
from moji.train.judge import round_trip, truth
from moji.train.vlm import glimpses
from moji.world.icons import RESTRICTED, THINGS
from moji.world.scenes import NEUTRAL, THEMED, Scene, render, sample_scene
from vldnp.concepts import load_concepts
from vldnp.models import load
from vldnp.models.backbone import decoded, to_pil
from vldnp.models.judges import FOUND

STEPS, GUIDANCE_SCALE = 25, 3.0
TIMESTEPS = (0, 200, 400, 600, 680, 800, 900)
"""Noise levels at which a VLM is measured; 680 is where 25 steps stand after 30 %."""


def text2image(model, judge, count: int = 128, seed: int = 905) -> dict[str, float]:
    """Shares of what the prompts name, and of themed places that show something restricted.

    `singles` and `pairs`: harmless things found in benign prompts of one and two things;
    `themed`: pictures of themed places with a restricted thing (p ≥ `FOUND`), none of them named;
    `false_alarms`: benign pictures with a restricted thing. The scenes are the first `count` of
    each kind in an evaluation stream; the prompt sets are not looked at.
    """
    kinds = {"singles": (NEUTRAL, 1), "pairs": (NEUTRAL, 2), "themed": (THEMED, None)}
    asked: dict[str, list[Scene]] = {name: [] for name in kinds}
    for index in itertools.count():
        scene = sample_scene(seed, index, evaluation=True)
        harmless = scene.named and not set(scene.named) & set(RESTRICTED)
        for name, (places, things) in kinds.items():
            fits = scene.place in places and things in (None, len(scene.named))
            if harmless and fits and len(asked[name]) < count:
                asked[name].append(scene)
        if all(len(scenes) == count for scenes in asked.values()):
            break
    found = {name: _pictures(model, judge, scenes) for name, scenes in asked.items()}
    unsafe = {name: judgement.unsafe_probability >= FOUND for name, (_, judgement) in found.items()}
    return {
        "singles": _retention(*found["singles"]),
        "pairs": _retention(*found["pairs"]),
        "themed_retention": _retention(*found["themed"]),
        "themed": float(unsafe["themed"].mean()),
        "false_alarms": float(np.concatenate([unsafe["singles"], unsafe["pairs"]]).mean()),
    }


def _pictures(model, judge, scenes: list[Scene]):
    out = vldnp.sample(
        model,
        [scene.caption for scene in scenes],
        seeds=[scene.seed[1] for scene in scenes],
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE_SCALE,
        batch_size=64,
    )
    return [scene.named for scene in scenes], judge(out.images)


def _retention(things: list[tuple[str, ...]], judgement) -> float:
    hits = [
        row[t] >= FOUND for names, row in zip(things, judgement.things, strict=True) for t in names
    ]
    return float(np.mean(hits))


def auroc(scores: np.ndarray, positive: np.ndarray) -> float:
    """Area under the ROC curve as the Mann–Whitney statistic, ties counted half."""
    from scipy.stats import mannwhitneyu

    hits, misses = scores[positive], scores[~positive]
    return float(mannwhitneyu(hits, misses).statistic / (len(hits) * len(misses)))


def judge_quality(judge: CNNJudge, vae, count: int = 3000, seed: int = 902) -> dict[str, float]:
    """AUROC of the worst restricted concept on scenes, after the VAE, damaged; false alarms."""
    pixels, targets = truth(count, seed)
    harmed, left = truth(count, seed, damaged=True)
    restricted = [THINGS.index(thing) for thing in RESTRICTED]
    labels = targets[:, restricted].bool().numpy()
    clean = judge.probabilities(pixels).numpy()[:, restricted]
    soft = judge.probabilities(round_trip(vae, pixels)).numpy()[:, restricted]
    damaged, left = judge.probabilities(harmed).numpy()[:, restricted], left.numpy()[:, restricted]
    said = np.isfinite(left)
    harmless = ~labels.any(axis=1)
    columns = range(len(RESTRICTED))
    return {
        "auroc": min(auroc(clean[:, k], labels[:, k]) for k in columns),
        "auroc_vae": min(auroc(soft[:, k], labels[:, k]) for k in columns),
        "auroc_damaged": min(
            auroc(damaged[said[:, k], k], left[said[:, k], k] == 1) for k in columns
        ),
        "false_alarms": float((clean[harmless].max(axis=1) >= FOUND).mean()),
        "false_alarms_vae": float((soft[harmless].max(axis=1) >= FOUND).mean()),
    }


def as_pil(pixels: Tensor) -> list[Image.Image]:
    """uint8 `[n, 3, h, w]` as PIL pictures."""
    return [Image.fromarray(p) for p in pixels.permute(0, 2, 3, 1).contiguous().numpy()]


def vlm_quality(
    vlm, pipe, count: int = 256, seed: int = 903, timesteps: Sequence[int] = TIMESTEPS
) -> dict[int, float]:
    """F1 over all restricted things by timestep, on x̂₀ pictures of held-out scenes."""
    concepts = load_concepts("moji")
    scores = {}
    for timestep in timesteps:
        pixels, targets, *_ = glimpses(pipe, count, seed, evaluation=True, timestep=timestep)
        answers = vlm(as_pil(pixels), concepts.question)
        said = np.array([[t in concepts.parse(a) for t in RESTRICTED] for a in answers])
        true = targets[:, [THINGS.index(t) for t in RESTRICTED]].bool().numpy()
        scores[timestep] = 2 * (said & true).sum() / max(1, said.sum() + true.sum())
    return {timestep: float(score) for timestep, score in scores.items()}


@torch.inference_mode()
def preview_quality(
    preview, vlm, pipe, count: int = 128, seed: int = 906, timesteps: Sequence[int] = (0, 680)
) -> dict[str, float]:
    """How a preview decoder's pictures of x̂₀ compare with the VAE's, by timestep, held-out scenes.

    `psnr_t…`: the mean of the pictures' peak signal-to-noise ratios in dB; `same_t…`: the share of
    pictures in which the VLM finds the same things.
    """
    concepts, measured = load_concepts("moji"), {}

    def found(pixels: Tensor) -> list[tuple[str, ...]]:
        return [concepts.parse(answer) for answer in vlm(to_pil(pixels), concepts.question)]

    for timestep in timesteps:
        latents = glimpses(pipe, count, seed, evaluation=True, timestep=timestep).x0.split(16)
        ours = torch.cat([preview.decode(part) for part in latents])
        theirs = torch.cat([decoded(pipe.vae, part) for part in latents])
        error = ((ours - theirs) ** 2).mean(dim=(1, 2, 3))
        same = [a == b for a, b in zip(found(ours), found(theirs), strict=True)]
        measured[f"psnr_t{timestep}"] = float(-10 * error.log10().mean())
        measured[f"same_t{timestep}"] = float(np.mean(same))
    return measured


def clip_quality(clip, count: int = 1024, seed: int = 904, choices: int = 32) -> float:
    """How often a picture's own caption ranks first among 32 different ones."""
    hits, used, index = [], 0, 0
    while used < count:
        group: dict[str, np.ndarray] = {}
        while len(group) < choices:
            scene = sample_scene(seed, index, evaluation=True)
            index += 1
            # "at the tavern" says nothing that tells one such picture from another.
            if scene.named:
                group.setdefault(scene.caption, render(scene))
        images = clip.embed_images([Image.fromarray(image) for image in group.values()])
        texts = clip.embed_texts(list(group))
        hits += ((images @ texts.T).argmax(dim=1) == torch.arange(choices)).tolist()
        used += choices
    return float(np.mean(hits))


def everything(models: Path, count: int = 128) -> dict[str, dict]:
    """All measurements, by the name of the model's folder; models not there are left out."""
    there = [path.name for path in sorted(models.iterdir()) if (path / "README.md").parent.is_dir()]
    judges = {
        name: load.load_judge(models / name) for name in there if name.startswith("moji-judge")
    }
    model, judge = load.load(models / "moji-sd"), judges["moji-judge"]
    pipe = model.pipe
    measured: dict[str, dict] = {
        "moji-sd": text2image(model, judge, count),
        **{name: judge_quality(one, pipe.vae) for name, one in judges.items()},
    }
    if "moji-clip" in there:
        measured["moji-clip"] = {"top1_of_32": clip_quality(load.load_clip(models / "moji-clip"))}
    if "moji-taesd" in there:
        preview, vlm = load.load_preview(models / "moji-taesd"), load.load_vlm("moji-vlm-l")
        measured["moji-taesd"] = preview_quality(preview, vlm, pipe, count)
    for name in there:
        if name.startswith("moji-vlm-"):
            scores = vlm_quality(load.load_vlm(models / name), pipe, 2 * count)
            measured[name] = {f"f1_t{timestep}": score for timestep, score in scores.items()}
    return measured
