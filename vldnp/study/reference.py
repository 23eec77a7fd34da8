"""Real images, and FID and KID of a run's images against them."""

import warnings
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from PIL import Image, ImageOps

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
    """An image as people see it: turned as its camera says, 8 bits a colour, on white.

    Raises:
        ValueError: it is none; one line.
    """
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

    Args:
        source: a folder of images, or a name such as "coco" of one in `reference/` in the user's
            cache folder, of which the middle square is taken at 299 pixels; or a function of
            (count, seed) that gives such an array, "package.module:function".
        count, seed: so many, and which.

    Raises:
        FileNotFoundError: there are none; one line.
    """
    if ":" in str(source) and not Path(source).exists():
        return called(str(source), count, seed)
    folder = Path(source) if Path(source).is_dir() else user_cache() / "reference" / str(source)
    if not (found := image_files(folder)):
        raise FileNotFoundError(
            f"there are no real images {str(source)!r} for FID: put some into {folder}, or give "
            "their folder as the profile's reference"
        )
    chosen = sorted(np.random.default_rng(seed).permutation(len(found))[:count])
    size = (REFERENCE_SIZE, REFERENCE_SIZE)
    squares = (ImageOps.fit(open_image(found[i]), size, Image.Resampling.BICUBIC) for i in chosen)
    return np.stack([np.asarray(square) for square in squares])


def feature_space(judge):
    """What sees the features for FID: the judge where it has some, else Inception."""
    return judge if hasattr(judge, "features") else Inception(device=load.default_device())


def _reference_features(study: Study, images: pd.DataFrame, judge):
    """The rows that are compared, the space, and the real images' features; None without FID."""
    rows = images[images["prompt_set"].isin(study.reference_sets)]
    if study.reference is None or len(rows) < 2:
        return None
    try:
        real = reference_images(study.reference, study.reference_count)
        space = feature_space(judge)
    except OSError as error:  # of the reference's folder, or of the network
        warnings.warn(f"FID and KID stay empty: {first_line(error)}", stacklevel=4)
        return None
    return rows, space, features(torch.from_numpy(real).permute(0, 3, 1, 2), space)


def fid_of(
    study: Study, images: pd.DataFrame, judge, folder: Path
) -> dict[tuple[str, str], Distances]:
    """(setting, prompt set) → FID and KID of the reference sets' images, where they can be had."""
    if (found := _reference_features(study, images, judge)) is None:
        return {}
    rows, space, real = found
    return {
        where: distances(features(load_images(group, folder), space), real)
        for where, group in rows.groupby(["setting", "prompt_set"])
        if len(group) > 1
    }


def fid_changes(
    study: Study, images: pd.DataFrame, judge, methods: Mapping[str, str], folder: Path
) -> dict[str, Interval]:
    """How much FID on the reference sets lies above CFG's, with intervals over prompts.

    Args:
        study, images: what `run` was given and returned; `folder` is its run folder.
        judge: whose features count.
        methods: name → setting, with `cfg` among them.
    """
    if (found := _reference_features(study, images, load.load_judge(judge))) is None:
        return {}
    rows, space, real = found

    def of(setting: str) -> pd.DataFrame:
        return rows[rows["setting"] == setting].sort_values(["prompt_id", "seed"])

    plain = of(methods["cfg"])
    base, real = features(load_images(plain, folder), space).numpy(), real.numpy()
    return {
        name: fid_change(
            features(load_images(of(setting), folder), space).numpy(),
            base,
            real,
            plain["prompt_id"],
        )
        for name, setting in methods.items()
        if name != "cfg"
    }
