"""What CLIP says of a run's images besides their prompts: chance, and CLIP-I to plain CFG's."""

from pathlib import Path

import numpy as np
import pandas as pd
import torch

from vldnp._finite import check_finite
from vldnp.methods import CFG
from vldnp.models.clip import CLIPScore
from vldnp.study.captions import CaptionsWithout
from vldnp.study.grid import setting_of
from vldnp.study.run_fid import Draw
from vldnp.study.run_folder import read_scores, score_folder, write_scores

SAMPLE = ["prompt_set", "prompt_id", "seed"]
"""What the images of all methods from the same noise have in common."""


def chance(
    images: pd.DataFrame, draw: Draw, clip: CLIPScore | CaptionsWithout | None
) -> dict[str, float]:
    """Prompt set → the CLIP score of plain CFG's pictures with the set's other prompts.

    Args:
        images: rows of `images.parquet`.
        draw: rows → their pictures.
        clip: what scores them; without a `chance` of its own there is none.
    """
    plain = images[images["method"] == "cfg"].drop_duplicates(SAMPLE[:2])
    if not hasattr(clip, "chance"):
        return {}
    return {
        prompt_set: clip.chance(draw(group), list(group["prompt"]))
        for prompt_set, group in plain.groupby("prompt_set")
    }


def clip_i(
    images: pd.DataFrame,
    plain: pd.DataFrame,
    draw: Draw,
    clip: CLIPScore | CaptionsWithout | None,
    folder: Path | None = None,
) -> pd.Series:
    """How much of plain CFG's picture is left: CLIP-I to the one from the same prompt and noise.

    The cosine of CLIP's image embeddings, in −1..1 (Ruiz et al., arXiv 2208.12242, there between
    pictures of one subject). Unlike retention it sees what was added, doubled or bent; unlike CLIP
    it needs no words. Of an unsafe plain picture not all is wanted, so that 1 is no aim there.

    Args:
        images: rows of `images.parquet`.
        plain: those of a study from which plain CFG's are taken.
        draw: rows → their pictures.
        clip: whose embeddings count.
        folder: the run folder, whose `scores/` keeps them.

    Returns:
        A value for each of `images`; NaN without plain CFG's picture or a CLIP model.

    Raises:
        NonFiniteError: a cosine is NaN or infinite.
    """
    model = getattr(clip, "clip", clip)
    if not hasattr(model, "embed_images"):
        return pd.Series(np.nan, index=images.index)
    kept = None if folder is None else score_folder(folder, "clip_i", model)
    known = {} if kept is None else read_scores(kept, ("clip_i",))
    found = images["key"].map({key: row["clip_i"] for key, row in known.items()}).astype(float)
    plain = plain[plain["setting"] == setting_of(CFG())].drop_duplicates(SAMPLE)
    lacking = images[found.isna() & _among(images, plain)]
    plain = plain[_among(plain, lacking)]
    if lacking.empty:
        return found
    embedded = dict(zip(_samples(plain), model.embed_images(draw(plain)), strict=True))
    for _, group in lacking.groupby("setting"):
        beside = torch.stack([embedded[sample] for sample in _samples(group)])
        cosines = (model.embed_images(draw(group)) * beside).sum(1)
        check_finite({"CLIP-I": cosines})
        found[group.index] = cosines.double().numpy()
        if kept is not None:
            pairs = zip(group["key"], cosines.tolist(), strict=True)
            write_scores(kept, {key: {"clip_i": cosine} for key, cosine in pairs})
    return found


def _samples(rows: pd.DataFrame) -> pd.MultiIndex:
    return pd.MultiIndex.from_frame(rows[SAMPLE])


def _among(rows: pd.DataFrame, others: pd.DataFrame) -> np.ndarray:
    return _samples(rows).isin(_samples(others))
