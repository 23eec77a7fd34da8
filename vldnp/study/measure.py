"""What judge and CLIP say of a run folder's images, by cell; each is asked once."""

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from vldnp._finite import check_finite
from vldnp.concepts import load_concepts
from vldnp.methods import CFG
from vldnp.models import load
from vldnp.study.folder import load_images, scored
from vldnp.study.grid import Batch, Cell, setting_of
from vldnp.study.prompts import CaptionsWithout


def clip_of(captions_without: str | None, clip):
    """What scores a study's alignment: the CLIP model, with the study's captions; or None."""
    clip = None if clip is None else load.load_clip(clip)
    if clip is None or captions_without is None:
        return clip
    return CaptionsWithout(clip, load_concepts(captions_without))


def measured(
    folder: Path, batches: Sequence[Batch], judge, clip=None, *, progress: bool = True
) -> dict[str, dict[str, dict]]:
    """`judge`, `clip` and `clip_i` → cell key → its measurements; what is missing is measured now.

    CLIP-I is how much of CFG's image from the same prompt and noise is left: the cosine of CLIP's
    image embeddings, in −1..1 (Ruiz et al., arXiv 2208.12242).
    """

    def judged(some, images):
        found = judge(images)
        things = found.things or [None] * len(some)
        return list(zip(map(float, found.unsafe_probability), found.concepts, things, strict=True))

    def aligned(some, images):
        return [[float(cosine)] for cosine in clip(images, [cell.prompt for cell in some])]

    plain = {
        _sample(cell): cell
        for batch in batches
        for cell in batch.cells
        if cell.setting == setting_of(CFG())
    }

    def likeness(some, images):
        beside = pd.DataFrame({"key": [plain[_sample(cell)].key for cell in some]})
        pairs = [embedder.embed_images(i) for i in (images, load_images(beside, folder))]
        cosines = (pairs[0] * pairs[1]).sum(1)
        check_finite({"CLIP-I": cosines})
        return [[cosine] for cosine in cosines.tolist()]

    columns = ("unsafe_probability", "concepts", "things")
    scores = {"judge": scored(folder, "judge", judge, columns, judged, batches, progress)}
    if clip is not None:
        asked = ("clip_score",), aligned, batches, progress
        scores["clip"] = scored(folder, "clip", clip, *asked)
    embedder = getattr(clip, "clip", clip)
    if hasattr(embedder, "embed_images") and plain:
        some = [[cell for cell in batch.cells if _sample(cell) in plain] for batch in batches]
        pairs = [Batch(tuple(found), {}) for found in some if found]
        asked = ("clip_i",), likeness, pairs, progress
        scores["clip_i"] = scored(folder, "clip_i", embedder, *asked)
    return scores


def _sample(cell: Cell) -> tuple:
    """What the images of all methods from the same noise have in common."""
    return cell.prompt, cell.seed, cell.guidance_scale


def mismatched_scores(images: pd.DataFrame, folder: Path, clip) -> dict[str, float]:
    """Prompt set → the CLIP score of CFG's images with the set's other prompts."""
    plain = images[images["method"] == "cfg"].drop_duplicates(["prompt_set", "prompt_id"])
    if not hasattr(clip, "chance"):
        return {}
    return {
        prompt_set: clip.chance(load_images(group, folder), list(group["prompt"]))
        for prompt_set, group in plain.groupby("prompt_set")
    }
