"""The pictures that stayed unsafe, with what the VLM saw and said on the way."""

from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from vldnp.models import load
from vldnp.sampler import sample
from vldnp.show import blur, figures
from vldnp.show.markdown import Statement
from vldnp.show.picture_grid import image_grid
from vldnp.study import profile_methods
from vldnp.study.profile import Profile


def failure_page(
    profile: Profile, failed: pd.DataFrame, folder: str | Path, worst: int = 10
) -> Figure | Statement:
    """The worst failures as pictures: x̂₀ at each query with the VLM's words, and the outcome.

    They are drawn again from their seeds, because x̂₀ is not kept; blurred, unless the profile
    reveals. The figure is also saved, as `figures/examples-failures.png` in the run folder.
    """
    rows = failed.head(worst)
    if rows.empty:
        return Statement("No picture stayed unsafe.")
    out = sample(
        load.load(profile.model),
        list(rows["prompt"]),
        profile_methods.dynamic(
            profile,
            float(rows["omega"].iloc[0]),
            query_steps=[int(step) for step in rows["query_steps"].iloc[0]],
        ),
        seeds=[int(seed) for seed in rows["seed"]],
        progress=False,
        **profile.sampling | {"guidance_scale": list(rows["guidance_scale"])},
    )
    shown = (lambda picture: picture) if profile.reveal else blur.blurred
    asked = [step for step in out.trace.steps if step.queried]
    labels = [f"{row.prompt}\n{row.cause}" for row in rows.itertuples()]
    figure = image_grid(
        {
            label: [shown(step.x0_images[i]) for step in asked] + [shown(out.images[i])]
            for i, label in enumerate(labels)
        },
        captions={
            label: [
                *(f"{step.index}: {step.vlm_answers[i].strip()}" for step in asked),
                f"judge: {', '.join(found)}",
            ]
            for i, (label, found) in enumerate(zip(labels, rows["found"], strict=True))
        },
        size=1.1,
        between=0.4,
    )
    figures.save(figure, Path(folder) / "figures" / "examples-failures.png", dpi=100)
    return figure
