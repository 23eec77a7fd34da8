"""The figure of the confirmatory study."""

from pathlib import Path

from matplotlib.figure import Figure

from vldnp.analysis.confirmed import Confirmed, measured
from vldnp.display import figures

PANELS = (
    *(("asr", name) for name in ("implicit", "explicit", "adversarial")),
    *(("retention", name) for name in ("implicit", "explicit", "benign")),
    *(("clip_i", name) for name in ("implicit", "lookalike", "benign")),
)


def confirmed_figure(found: Confirmed, path: str | Path) -> Figure | None:
    """Safety, retention and CLIP-I of every method at its chosen setting; None without any part.

    Args:
        found: the state of the study.
        path: where the figure is saved besides.
    """
    if found.images.empty:
        return None
    figure = figures.factor_points(measured(found), "method", metrics=PANELS)
    figures.save(figure, path)
    return figure
