"""What judge and CLIP say of a run folder's images, by cell; each is asked once."""

from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import torch
from tqdm.auto import tqdm

from vldnp._finite import check_finite, label, naming
from vldnp.concepts import load_concepts
from vldnp.methods import CFG
from vldnp.models import load
from vldnp.study.folder import load_images, read_json, warn, write_json
from vldnp.study.grid import NOISE, digest, setting_of
from vldnp.study.prompts import CaptionsWithout

JUDGED = "unsafe_probability", "concepts", "things"


def clip_of(captions_without: str | None, clip):
    """What scores a study's alignment: the CLIP model, with the study's captions; or None."""
    clip = None if clip is None else load.load_clip(clip)
    if clip is None or captions_without is None:
        return clip
    return CaptionsWithout(clip, load_concepts(captions_without))


def measured(
    folder: Path, batches: Sequence[pd.DataFrame], judge, clip=None, *, progress: bool = True
) -> dict[str, dict]:
    """Key → `unsafe_probability`, `concepts`, `things`, and where known `clip_score`, `clip_i`.

    They come from a file in `scores/` for each batch and these models, or are measured now. CLIP-I
    is the cosine of CLIP's embeddings of an image and CFG's from the same prompt and noise, −1..1
    (Ruiz et al., arXiv 2208.12242); it is absent without CFG among the batches.
    """
    names = [f"{model.name}-{model.revision}" for model in (judge, clip) if model is not None]
    place, known, damaged = folder / "scores" / "+".join(names).replace("/", "-"), {}, []
    images = pd.concat(batches)
    plain = images[images["setting"] == setting_of(CFG())].set_index(NOISE)["key"].to_dict()
    for rows in tqdm(batches, desc="scores", unit="batch", disable=not progress):
        noise = list(rows[NOISE].itertuples(index=False, name=None))
        keys, beside = rows["key"].tolist(), [plain[one] for one in noise if one in plain]
        path = place / f"{digest([keys, beside])[:24]}.json"
        if (scores := read_json(path)) is None:
            damaged += [path] if path.exists() else []
            about = zip(noise, keys, strict=True)
            with naming([f"{label(i, n[0], n[1])}, {key}" for i, (n, key) in enumerate(about)]):
                values = _measure(folder, rows, beside, judge, clip)
            write_json(path, dict(zip(keys, values, strict=True)))
            scores = read_json(path)
        known |= scores
    warn(damaged)
    return known


def _measure(folder: Path, rows: pd.DataFrame, beside: list[str], judge, clip) -> list[dict]:
    images, scores = load_images(rows, folder), {}
    judged, embedder = judge(images), getattr(clip, "clip", clip)
    if clip is not None:
        scores["clip_score"] = torch.as_tensor(clip(images, rows["prompt"].tolist())).double()
    if hasattr(embedder, "embed_images") and len(beside) == len(rows):
        plain = load_images(pd.DataFrame({"key": beside}), folder)
        pair = [embedder.embed_images(of) for of in (images, plain)]
        scores["clip_i"] = (pair[0] * pair[1]).sum(1)
    for name, values in scores.items():
        check_finite({name: values})
    probabilities, things = map(float, judged.unsafe_probability), judged.things
    found = zip(probabilities, judged.concepts, things or [None] * len(rows), strict=True)
    found = [dict(zip(JUDGED, one, strict=True)) for one in found]
    for i, one in enumerate(found):
        one |= {name: values[i].item() for name, values in scores.items()}
    return found
