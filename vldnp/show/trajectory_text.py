"""What a trajectory shows, in sentences and small tables."""

import re
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from vldnp.metrics.intervals import UNSAFE_THRESHOLD
from vldnp.models.judges import Judge, Judgement
from vldnp.show.markdown import Statement, listed, literal
from vldnp.trace import Output


def side_by_side(
    outputs: Mapping[str, Output], judge: Judge, threshold: float = UNSAFE_THRESHOLD
) -> pd.DataFrame:
    """What the judge finds in the images of each method, and what they cost.

    Args:
        outputs: label → output, with PIL images.
        judge: as `vldnp.load_judge` opens it.
        threshold: an image is unsafe from this probability on.
    """
    rows = {}
    for label, output in outputs.items():
        judged = judge(output.images)
        found = set().union(*judged.found())
        trace = output.trace
        images = len(trace.prompts)
        kept = judged.retention([_named(prompt, judged) for prompt in trace.prompts])
        rows[label] = {
            "images": images,
            "unsafe": int((judged.unsafe_probability >= threshold).sum()),
            "found by the judge": ", ".join(sorted(found)) or "nothing",
            "retention": np.nan if np.isnan(kept).all() else np.nanmean(kept),
            "evaluations per step": sum(trace.model_evaluations) / images / len(trace.steps),
            "VLM calls per image": sum(trace.vlm_calls) / images,
        }
    return pd.DataFrame.from_dict(rows, orient="index").round(2)


def unsafe_counts(compared: pd.DataFrame) -> Statement:
    """Two sentences from the table of `side_by_side`."""
    parts = [
        f"`{label}` in **{row['unsafe']} of {row['images']}** ({row['found by the judge']})"
        for label, row in compared.iterrows()
    ]
    text = f"The judge finds something restricted with {listed(parts)}."
    kept = compared["retention"].dropna()
    if len(kept):
        shares = [f"**{share:.0%}** with `{label}`" for label, share in kept.items()]
        text += f" Of the harmless things that the prompt names it finds {listed(shares)}."
    return Statement(text)


def _named(prompt: str, judged: Judgement) -> list[str]:
    """The harmless things that the judge knows and the prompt names."""
    known = judged.things[0] if judged.things else ()
    return [thing for thing in known if re.search(rf"\b{re.escape(thing)}\b", prompt.lower())]


def queries(output: Output, image: int = 0) -> pd.DataFrame:
    """What was asked about one image: step, the VLM's words, and what they made of the prompt."""
    trace = output.trace.to_frame()
    asked = trace[(trace["image"] == image) & trace["queried"]]
    columns = ["step", "timestep", "vlm_answer", "negative_prompt"]
    return asked[columns].fillna({"negative_prompt": "none"}).set_index("step")


def trajectory(output: Output, image: int = 0) -> Statement:
    """How the negative prompt of one image came and went."""
    trace = output.trace.to_frame()
    trace = trace[trace["image"] == image]
    asked, steered = trace[trace["queried"]], trace[trace["negative_prompt"].notna()]
    text = (
        f"*{literal(output.trace.prompts[image])}*: the VLM was asked at "
        f"{_steps(asked['step'])} of {len(trace)}. "
    )
    if steered.empty:
        return Statement(text + "It named nothing, so every step is plain CFG.")
    first = steered.iloc[0]
    prompts = list(dict.fromkeys(steered["negative_prompt"]))
    return Statement(
        f"{text}The first negative prompt came at step {first['step']} "
        f"(“{literal(first['negative_prompt'])}”). One was in force in **{len(steered)} of "
        f"{len(trace)}** steps: {listed([f'“{literal(p)}”' for p in prompts])}. "
        f"The image took {trace['model_evaluations'].mean():.2f} U-Net evaluations a step."
    )


def _steps(steps: Sequence[int]) -> str:
    steps = list(steps)
    if not steps:
        return "none of the steps"
    return f"step{'s' * (len(steps) > 1)} {listed([str(step) for step in steps])}"
