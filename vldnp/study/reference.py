"""Real images, and FID and KID of a run's images against them."""

import warnings
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from PIL import Image, ImageOps
from torch import Tensor

from vldnp._files import first_line, user_cache
from vldnp.metrics.fid import Distances, Inception, distances, features, fid_change
from vldnp.metrics.intervals import Interval
from vldnp.models import load
from vldnp.study.folder import load_images
from vldnp.study.grid import Study

REFERENCE_SIZE = 299
SUFFIXES = {".jpg", ".jpeg", ".png", ".webp"}


def image_files(folder: Path) -> list[Path]:
    """All images in a folder, at any depth, in order."""
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)


def open_image(path: Path) -> Image.Image:
    """An image as people see it: turned as its camera says, 8 bits a colour, on white."""
    try:
        with Image.open(path) as image:
            seen = ImageOps.exif_transpose(image)
            if seen.mode.startswith("I"):  # 16 bits
                seen = Image.fromarray((np.asarray(seen) / 257).astype(np.uint8))
            if seen.mode in ("LA", "PA", "RGBA") or "transparency" in seen.info:
                white = Image.new("RGBA", seen.size, "white")
                seen = Image.alpha_composite(white, seen.convert("RGBA"))
            return seen.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} is no image: {first_line(error)}") from error


def called(name: str, *arguments):
    """What a function, "package.module:function", returns; raises ValueError without one."""
    module, _, function = name.partition(":")
    try:
        return getattr(import_module(module), function)(*arguments)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{name!r} names no function: {first_line(error)}") from error


def reference_images(source: str | Path, count: int, seed: int = 0) -> np.ndarray:
    """Real images to compare generated ones with: uint8 `[n, H, W, 3]`, n ≤ count.

    `source` is a function of (count, seed) that gives such an array, "package.module:function", or
    a folder, or the name of one in `reference/` in the user's cache folder; the middle square of
    its images is taken at 299 pixels. Raises FileNotFoundError, one line, where there are none.
    """
    if ":" in str(source) and not Path(source).exists():
        return called(str(source), count, seed)
    folder = Path(source) if Path(source).is_dir() else user_cache() / "reference" / str(source)
    if not (found := image_files(folder)):
        raise FileNotFoundError(f"no real images {str(source)!r} for FID in {folder}")
    chosen = sorted(np.random.default_rng(seed).permutation(len(found))[:count])
    size = (REFERENCE_SIZE, REFERENCE_SIZE)
    squares = (ImageOps.fit(open_image(found[i]), size, Image.Resampling.BICUBIC) for i in chosen)
    return np.stack([np.asarray(square) for square in squares])


def feature_space(judge):
    """What sees the features for FID: the judge where it has some, else Inception."""
    return judge if hasattr(judge, "features") else Inception(device=load.default_device())


def _seen(study: Study, images: pd.DataFrame, judge, folder: Path) -> tuple[dict, Tensor | None]:
    """(setting, prompt set) → rows and their features; the real images' features."""
    rows = images[images["prompt_set"].isin(study.reference_sets)]
    if study.reference is None or len(rows) < 2:
        return {}, None
    try:
        real, space = reference_images(study.reference, study.reference_count), feature_space(judge)
    except OSError as error:  # of the reference's folder, or of the network
        warnings.warn(f"FID and KID stay empty: {first_line(error)}", stacklevel=4)
        return {}, None
    groups = rows.sort_values(["prompt_id", "seed"]).groupby(["setting", "prompt_set"])
    seen = {where: (own, features(load_images(own, folder), space)) for where, own in groups}
    return seen, features(torch.from_numpy(real).permute(0, 3, 1, 2), space)


def fid_of(study: Study, images: pd.DataFrame, judge, folder: Path) -> dict[tuple, Distances]:
    """(setting, prompt set) → FID and KID of the reference sets' images, where they can be had."""
    seen, real = _seen(study, images, judge, folder)
    return {where: distances(own, real) for where, (rows, own) in seen.items() if len(rows) > 1}


def fid_changes(
    study: Study, images: pd.DataFrame, judge, methods: Mapping[str, str], folder: Path
) -> dict[str, Interval]:
    """Method → how much its FID on the first reference set lies above CFG's, by prompts.

    `images` are what `run` returned; `methods` are names → settings, with `cfg` among them.
    """
    seen, real = _seen(study, images, load.load_judge(judge), folder)
    own = {name: seen.get((at, study.reference_sets[0])) for name, at in methods.items()}
    if not (plain := own.pop("cfg", None)):
        return {}
    base, prompts = plain[1].numpy(), plain[0]["prompt_id"]
    return {
        name: fid_change(found[1].numpy(), base, real.numpy(), prompts)
        for name, found in own.items()
        if found
    }
