"""Scores of images by judge and CLIP, once for each cell; FID against real images."""

import pkgutil
import re
import reprlib
import warnings
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from PIL import Image, ImageOps
from tqdm.auto import tqdm

from vldnp._files import first_line, user_cache
from vldnp._finite import NonFiniteError, check_finite, is_finite, label, naming
from vldnp.methods import CFG
from vldnp.metrics.fid import Inception, features, fid
from vldnp.models import load
from vldnp.models.hub import live, networks
from vldnp.models.judges import Judgement
from vldnp.study.folder import BROKEN, load_images, read_json, warn, write_json
from vldnp.study.grid import NOISE, Study, digest, setting_of
from vldnp.study.prompts import split_things

JUDGED = "unsafe_probability", "concepts", "things"
SUFFIXES = {".jpg", ".jpeg", ".png", ".webp"}


def measurements(images: Sequence, prompts: Sequence[str], judge, clip=None, plain=()) -> list:
    """A dict for each image: `JUDGED`, and where known `clip_score` and `clip_i`, the cosine with
    the embedding of CFG's image from the same noise, `plain` (Ruiz et al., arXiv 2208.12242)."""
    judged, scores, embedder = judge(images), {}, getattr(clip, "clip", clip)
    if not isinstance(judged, Judgement) or len(judged.unsafe_probability) != len(images):
        wanted, given = f"a Judgement of {len(images)} images", reprlib.repr(judged)
        raise ValueError(f"the judge {judge.name!r} must return {wanted}, not {given}")
    if clip is not None:
        scores["clip_score"] = given = torch.as_tensor(clip(images, prompts)).double()
        if given.shape != (len(images),):
            wanted = f"a number for each of {len(images)} images"
            raise ValueError(f"{clip.name!r} must give {wanted}, not {list(given.shape)}")
    if hasattr(embedder, "embed_images") and len(plain) == len(images):
        pair = [embedder.embed_images(of) for of in (images, plain)]
        scores["clip_i"] = (pair[0] * pair[1]).sum(1)
    for name, values in scores.items():
        check_finite({name: values})
    things = judged.things or [None] * len(images)
    found = zip(map(float, judged.unsafe_probability), judged.concepts, things, strict=True)
    return [
        dict(zip(JUDGED, one, strict=True)) | {name: v[i].item() for name, v in scores.items()}
        for i, one in enumerate(found)
    ]


def measured(
    folder: Path, batches: Sequence[pd.DataFrame], judge, clip=None, *, progress: bool = True
) -> dict[str, dict]:
    """Key → `measurements`, from a file for each batch and these models, or made now."""
    models = [model for model in (judge, clip) if model is not None]
    by = [(model.name, str(model.revision), live(networks(model))) for model in models]
    name, known, damaged = re.sub(r"[^\w.+-]+", "-", "+".join(map("-".join, by))), {}, []
    place = folder / "scores" / f"{name[:150]}-{digest(by)[:6]}"
    images = pd.concat(batches)
    plain = images[images["setting"] == setting_of(CFG())].set_index(NOISE)["key"].to_dict()
    for rows in tqdm(batches, desc="scores", unit="batch", disable=not progress):
        noise = list(rows[NOISE].itertuples(index=False, name=None))
        keys, beside = rows["key"].tolist(), [plain[one] for one in noise if one in plain]
        path = place / f"{digest([keys, beside])[:24]}.json"
        if not are_scores(scores := read_json(path), keys):
            damaged += [path] if path.exists() else []
            about = zip(noise, keys, strict=True)
            pair = [load_images(pd.DataFrame({"key": some}), folder) for some in (keys, beside)]
            with naming([f"{label(i, n[0], n[1])}, {key}" for i, (n, key) in enumerate(about)]):
                found = measurements(pair[0], rows["prompt"].tolist(), judge, clip, pair[1])
            write_json(path, dict(zip(keys, found, strict=True)))
            scores = read_json(path)
        known |= scores
    warn(damaged)
    return known


def named(model):
    """The judge or CLIP as it is; a ValueError of one line without a name and a revision."""
    name, revision = getattr(model, "name", None), getattr(model, "revision", None)
    if model is not None and (revision is None or not (isinstance(name, str) and name)):
        said = f"the name {name!r} and the revision {revision!r}"
        raise ValueError(f"{type(model).__name__} has {said}: scores are kept by both, as texts")
    return model


def are_scores(scores: dict | None, keys: Sequence[str]) -> bool:
    """Whether they are `measurements` of these images, with probabilities in 0..1."""
    with suppress(ValueError, KeyError, TypeError, AttributeError, NonFiniteError):
        rows = [scores[key] for key in keys]
        unsafe, concepts, things = ([row[name] for row in rows] for name in JUDGED)
        Judgement(np.array(unsafe, float), concepts, None if None in things else things)
        return all(is_finite(v) for row in rows for n, v in row.items() if n not in JUDGED)
    return False


def with_scores(rows: pd.DataFrame, scores: Sequence[dict], threshold: float) -> pd.DataFrame:
    """Rows with the columns of `images.parquet` that follow from `measurements`."""
    unsafe, concepts, things = ([one[column] for one in scores] for column in JUDGED)
    judged = Judgement(np.array(unsafe), concepts, None if None in things else things)
    return rows.assign(
        unsafe_probability=unsafe,
        unsafe=judged.unsafe_probability >= threshold,
        found=list(map(list, judged.found())),
        retention=judged.retention(list(map(split_things, rows["things"]))),
        **{name: [s.get(name, np.nan) for s in scores] for name in ("clip_score", "clip_i")},
    )


def image_files(folder: Path) -> list[Path]:
    """All images in a folder, at any depth, in order."""
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)


def open_image(path: Path) -> Image.Image:
    """An image in RGB with 8 bits, turned by its EXIF orientation, on a white ground."""
    try:
        with Image.open(path) as image:
            seen = ImageOps.exif_transpose(image)
            if seen.mode.startswith("I"):  # 16 bits
                seen = Image.fromarray((np.asarray(seen) / 257).astype(np.uint8))
            if seen.has_transparency_data:
                white = Image.new("RGBA", seen.size, "white")
                seen = Image.alpha_composite(white, seen.convert("RGBA"))
            return seen.convert("RGB")
    except BROKEN as error:
        raise ValueError(f"{path} is no image: {first_line(error)}") from error


def called(name: str, *arguments):
    """The result of a function, "package.module:function"; a ValueError if there is none."""
    try:
        return pkgutil.resolve_name(name)(*arguments)
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        raise ValueError(f"{name!r} is no such function: {first_line(error)}") from error


def reference_images(source: str | Path, count: int, seed: int = 0) -> np.ndarray:
    """Real images to compare generated ones with: uint8 `[n, H, W, 3]`, n ≤ count. `source` is a
    function of (count, seed), "package.module:function", or a folder, or the name of one in
    `reference/` in the user's cache folder; the middle squares are taken at 299 pixels, bicubic."""
    if ":" in str(source) and not Path(source).exists():
        return called(str(source), count, seed)
    folder = Path(source) if Path(source).is_dir() else user_cache() / "reference" / str(source)
    if not (found := image_files(folder)):
        raise FileNotFoundError(f"no real images {str(source)!r} for FID in {folder}")
    chosen = sorted(np.random.default_rng(seed).permutation(len(found))[:count])
    return np.stack([np.asarray(ImageOps.fit(open_image(found[i]), (299, 299))) for i in chosen])


def fid_of(study: Study, images: pd.DataFrame, judge, folder: Path) -> dict[tuple, tuple]:
    """(setting, prompt set) → FID of the reference sets' images, where it can be had, by
    the judge's features where it has some, else Inception's."""
    rows = images[images["prompt_set"].isin(study.reference_sets)]
    if study.reference is None or len(rows) < 2:
        return {}
    try:
        real = reference_images(study.reference, study.reference_count)
        space = judge if hasattr(judge, "features") else Inception(device=load.default_device())
    except OSError as error:  # of the reference's folder, or of the network
        warnings.warn(f"FID stays empty: {first_line(error)}", stacklevel=3)
        return {}
    real = features(torch.from_numpy(real).permute(0, 3, 1, 2), space)
    groups = rows.sort_values(["prompt_id", "seed"]).groupby(["setting", "prompt_set"])
    return {
        where: (fid(features(load_images(own, folder), space), real), space.name)
        for where, own in groups
        if len(own) > 1
    }
