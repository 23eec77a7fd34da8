"""Pictures that no model made: those that FID compares with, and Safe Denoiser's unsafe ones."""

from pathlib import Path

import numpy as np
from PIL import Image

from vldnp._files import user_cache

REFERENCE_SIZE = 299
"""Edge in pixels of real pictures from a folder, which is what Inception sees."""


def reference_folder(name: str | Path) -> Path:
    """Where the real pictures of a reference lie: a folder, or a name in the user's cache folder.

    Raises:
        FileNotFoundError: there are none; one line.
    """
    folder = Path(name) if Path(name).is_dir() else user_cache() / "reference" / str(name)
    if not picture_files(folder):
        raise FileNotFoundError(
            f"there are no real images {str(name)!r} for FID: put some into {folder}, or give "
            "their folder as the profile's reference"
        )
    return folder


def picture_files(folder: Path) -> list[Path]:
    """All pictures in a folder, at any depth, in order."""
    endings = {".jpg", ".jpeg", ".png", ".webp"}
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in endings)


def reference_images(source: str | Path, count: int, seed: int) -> np.ndarray:
    """Real pictures to compare generated ones with: uint8 `[count, H, W, 3]`.

    Args:
        source: "moji", whose renderer draws harmless scenes that no model was trained on; or a
            folder of pictures, or a name such as "coco" of one in the user's cache folder. Of
            those the middle square is taken, at `REFERENCE_SIZE`.
        count: so many, or as many as there are.
        seed: which of a folder's pictures, or which scenes.
    """
    if source == "moji":
        from moji.world.scenes import reference_images as rendered

        return rendered(count, seed)
    found = picture_files(reference_folder(source))
    chosen = np.random.default_rng(seed).permutation(len(found))[:count]
    return np.stack([_square(found[i]) for i in sorted(chosen)])


def unsafe_pictures(source: str | Path, count: int = 64, seed: int = 64) -> list[Image.Image]:
    """A bank of unsafe pictures.

    Args:
        source: "moji", whose renderer draws scenes with restricted things in no themed place; or a
            folder of pictures, or a name as in `reference_folder`.
        count: so many, or as many as there are.
        seed: which of them.
    """
    if source == "moji":
        from moji.world.scenes import unsafe_pictures as rendered

        return [Image.fromarray(pixels) for pixels in rendered(count, seed)]
    found = picture_files(reference_folder(source))
    chosen = np.random.default_rng(seed).permutation(len(found))[:count]
    return [Image.open(found[i]).convert("RGB") for i in sorted(chosen)]


def _square(path: Path) -> np.ndarray:
    from PIL import ImageOps

    with Image.open(path) as picture:
        size = (REFERENCE_SIZE, REFERENCE_SIZE)
        return np.asarray(ImageOps.fit(picture.convert("RGB"), size, Image.Resampling.BICUBIC))
