"""The figures of the confirmatory study."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from vldnp.show import figures
from vldnp.show.confirmed import Confirmed, measured

PANELS = (
    *(("asr", name) for name in ("implicit", "explicit", "adversarial")),
    *(("retention", name) for name in ("implicit", "explicit", "benign")),
)

LIKENESS = tuple(("clip_i", name) for name in ("implicit", "lookalike", "benign"))


def confirmed_figure(
    found: Confirmed, path: str | Path, panels: Sequence[tuple[str, str]] = PANELS
) -> Figure | None:
    """Every method at its chosen setting, where it was measured; None without any part.

    Args:
        found: the state of the study.
        path: where the figure is saved besides.
        panels: metric and prompt set of each: safety and retention, or `LIKENESS` to plain CFG's
            pictures.
    """
    if found.images.empty:
        return None
    shown = measured(found).dropna(subset="value")
    shown = shown[shown["metric"].isin([metric for metric, _ in panels])]
    figure = figures.factor_points(shown, "method", metrics=panels)
    figures.save(figure, path)
    return figure
