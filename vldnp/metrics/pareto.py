"""The safety–alignment front: points of methods, which dominate which, and the area they cover.

Safety is 1 − ASR. Alignment is the CLIP score on a scale of its own, 0 where pictures and prompts
have nothing to do with each other and 1 where plain CFG is, so that the area a method covers has
a meaning: a method as safe as can be and as faithful as plain CFG covers 1.
"""

from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd
from scipy import stats

from vldnp.metrics.intervals import Interval

RESAMPLES = 1000


def hypervolume(points: np.ndarray) -> float:
    """The area between the origin and a set of points, larger is better on both axes.

    Args:
        points: `[n, 2]`; those that are not above the origin on both axes add nothing.
    """
    area = height = 0.0
    for x, y in sorted(np.asarray(points, dtype=float).tolist(), reverse=True):
        if x > 0 and y > height:
            area += x * (y - height)
            height = y
    return area


def front(points: np.ndarray) -> np.ndarray:
    """Which points no other point dominates, boolean `[n]`."""
    return ~dominates(points).any(axis=0)


def dominates(points: np.ndarray) -> np.ndarray:
    """Which point dominates which other, boolean `[n, n]`: row i those that point i dominates.

    A point dominates another when it is at least as good on both axes and better on one.
    """
    points = np.asarray(points, dtype=float)
    at_least = (points[:, None] >= points[None]).all(-1)
    better = (points[:, None] > points[None]).any(-1)
    return at_least & better


def points(images: pd.DataFrame, safety_set: str, clip_set: str | None = None) -> pd.DataFrame:
    """Safety and alignment of every setting: `setting, method, omega, safety, alignment`.

    Args:
        images: rows of `images.parquet`, plain CFG's among them.
        safety_set: the prompt set whose safety counts.
        clip_set: the prompt set whose CLIP score counts; default is `safety_set`.
    """
    grid = _Grid(images, safety_set, clip_set or safety_set)
    found = grid.settings.copy()
    found[["safety", "alignment"]] = grid.points()
    return found


def areas(images: pd.DataFrame, safety_set: str, clip_set: str | None = None) -> pd.DataFrame:
    """The hypervolume of each method with its 95 % interval over prompts.

    Args:
        images, safety_set, clip_set: as in `points`.

    Returns:
        `value, low, high` by method.
    """
    grid = _Grid(images, safety_set, clip_set or safety_set)
    methods = [method for method in grid.settings["method"].unique() if method != "cfg"]
    return pd.DataFrame(
        {method: grid.bootstrapped(grid.area_of([method])) for method in methods},
        index=Interval._fields,
    ).T.rename_axis("method")


def area_difference(
    images: pd.DataFrame,
    first: Sequence[str],
    second: Sequence[str],
    safety_set: str,
    clip_set: str | None = None,
) -> Interval:
    """Hypervolume of the methods `first` − of the methods `second`, on the same prompts and seeds.

    Args:
        images, safety_set, clip_set: as in `points`.
        first, second: names of methods; several are taken together as one front.
    """
    grid = _Grid(images, safety_set, clip_set or safety_set)
    one, other = grid.area_of(first), grid.area_of(second)
    return grid.bootstrapped(lambda points: one(points) - other(points))


class _Grid:
    """Settings × images as matrices, so that a bootstrap sample is a choice of columns."""

    def __init__(self, images: pd.DataFrame, safety_set: str, clip_set: str):
        self.unsafe = _matrix(images, safety_set, "unsafe")
        self.clip = _matrix(images, clip_set, "clip_score")
        self.both = (self.unsafe, self.clip)
        known = images.drop_duplicates("setting").set_index("setting")[["method", "omega"]]
        self.settings = known.loc[self.unsafe.index].reset_index()
        self.plain = self.settings["method"] == "cfg"
        if not self.plain.any():
            raise ValueError("alignment is relative to plain CFG, which is not among the images")
        chance = images.loc[images["prompt_set"] == clip_set, "clip_chance"]
        self.chance = float(chance.iloc[0])

    def points(self, safety: np.ndarray | None = None, clip: np.ndarray | None = None):
        """`[settings, 2]` from all prompts, or from the prompts of these numbers."""
        safe = 1 - _mean(self.unsafe, safety)
        score = _mean(self.clip, clip) - self.chance
        return np.stack([safe, score / score[self.plain][0]], axis=1)

    def area_of(self, methods: Sequence[str]) -> Callable[[np.ndarray], float]:
        wanted = self.settings["method"].isin(list(methods)).to_numpy()
        if not wanted.any():
            raise ValueError(f"there is no image of the methods {', '.join(methods)}")
        return lambda points: hypervolume(points[wanted])

    def bootstrapped(self, statistic: Callable[[np.ndarray], float]) -> Interval:
        """A number made of the points, with its interval over prompts."""
        names = [matrix.columns.get_level_values("prompt_id") for matrix in self.both]
        prompts = [pd.factorize(of)[0] for of in names]
        value = statistic(self.points())
        if names[0].equals(names[1]):  # one set of prompts: both axes from the same draw
            samples = (np.arange(prompts[0].max() + 1),)
        else:
            samples = tuple(np.arange(codes.max() + 1) for codes in prompts)

        columns = [
            [np.flatnonzero(codes == number) for number in range(codes.max() + 1)]
            for codes in prompts
        ]

        def resampled(*drawn: np.ndarray) -> float:
            drawn = (*drawn, drawn[-1])[:2]
            # All columns of a drawn prompt, as often as it was drawn.
            chosen = (
                np.concatenate([own[number] for number in numbers])
                for own, numbers in zip(columns, drawn, strict=True)
            )
            return statistic(self.points(*chosen))

        found = stats.bootstrap(
            samples,
            resampled,
            vectorized=False,
            n_resamples=RESAMPLES,
            method="percentile",
            rng=np.random.default_rng(0),
        ).confidence_interval
        return Interval(value, float(found.low), float(found.high))


def _matrix(images: pd.DataFrame, prompt_set: str, column: str) -> pd.DataFrame:
    chosen = images[images["prompt_set"] == prompt_set]
    if chosen.empty or chosen[column].isna().all():
        raise ValueError(f"there is no {column} for the prompt set {prompt_set!r}")
    wide = chosen.pivot_table(
        index="setting", columns=["prompt_id", "seed"], values=column, sort=False
    ).astype(float)
    if wide.isna().any(axis=None):
        raise ValueError(f"not every setting has the same images of {prompt_set!r}")
    return wide


def _mean(matrix: pd.DataFrame, columns: np.ndarray | None) -> np.ndarray:
    values = matrix.to_numpy()
    return (values if columns is None else values[:, columns]).mean(axis=1)
