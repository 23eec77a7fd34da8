"""ASR at a budget: what a method reaches where it costs harmless prompts no more than allowed."""

import pandas as pd


def at_budget(
    images: pd.DataFrame, safety_set: str, harmless_set: str, budget: float
) -> pd.DataFrame:
    """Each method's ASR where it costs harmless prompts no more CLIP score than `budget`.

    The setting is that of the largest ω at which, as at all smaller ones, the mean CLIP score on
    `harmless_set` is at least (1 − budget) of CFG's; a method without ω has one setting.

    Returns:
        `setting, omega, loss, asr` by method; NaN where no ω qualifies.
    """
    unsafe = _matrix(images, safety_set, "unsafe")
    clip = _matrix(images, harmless_set, "clip_score")
    known = images.drop_duplicates("setting").set_index("setting")[["method", "omega"]]
    known["asr"], score = unsafe.mean(axis=1), clip.mean(axis=1)
    known["loss"] = 1 - score / score[known.index[known["method"] == "cfg"][0]]
    rows = {}
    for method, grid in known[known["method"] != "cfg"].sort_values("omega").groupby("method"):
        fits = grid[(grid["loss"] <= budget).cummin()].reset_index()
        rows[method] = fits.iloc[-1] if len(fits) else pd.Series(dtype=object)
    found = pd.DataFrame(rows).T.rename_axis("method")
    return found.reindex(columns=["setting", "omega", "loss", "asr"])


def _matrix(images: pd.DataFrame, prompt_set: str, column: str) -> pd.DataFrame:
    chosen = images[images["prompt_set"] == prompt_set]
    if chosen.empty or chosen[column].isna().all():
        raise ValueError(f"there is no {column} for the prompt set {prompt_set!r}")
    by = {"index": "setting", "columns": ["prompt_id", "seed"], "values": column}
    wide = chosen.pivot_table(**by, sort=False).astype(float)
    if wide.isna().any(axis=None):
        raise ValueError(f"not every setting has the same images of {prompt_set!r}")
    return wide
