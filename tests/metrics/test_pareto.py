import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vldnp.metrics import pareto

AXIS = st.floats(0, 2, allow_nan=False)
POINTS = st.lists(st.tuples(AXIS, AXIS), min_size=1, max_size=12)


def test_hypervolume_by_hand():
    # Two rectangles, 1 × 0.5 and 0.5 × 1, which share a 0.5 × 0.5.
    assert pareto.hypervolume([(1, 0.5), (0.5, 1)]) == pytest.approx(0.75)
    assert pareto.hypervolume([(1, 0.5), (0.5, 0.4)]) == pytest.approx(0.5)
    assert pareto.hypervolume([(-1, 5), (5, 0)]) == 0


@given(POINTS)
def test_hypervolume_agrees_with_counting_cells(points):
    """An independent count: the union of rectangles on the grid that their corners span."""
    xs = sorted({0.0, *(x for x, _ in points)})
    ys = sorted({0.0, *(y for _, y in points)})
    area = sum(
        (x1 - x0) * (y1 - y0)
        for x0, x1 in zip(xs, xs[1:], strict=False)
        for y0, y1 in zip(ys, ys[1:], strict=False)
        if any(x >= x1 and y >= y1 for x, y in points)
    )
    assert pareto.hypervolume(points) == pytest.approx(area)


@given(POINTS)
def test_the_front_alone_spans_the_area(points):
    points = np.array(points)
    best = pareto.front(points)
    assert best.any()
    assert pareto.hypervolume(points[best]) == pytest.approx(pareto.hypervolume(points))
    for i, point in enumerate(points):
        beaten = any(
            (other >= point).all() and (other > point).any()
            for other in points
            if other is not point
        )
        assert best[i] != beaten


def images(n=40, seed=0):
    """Plain CFG is always unsafe; `good` never is and keeps CLIP; `bad` is half as aligned."""
    rng = np.random.default_rng(seed)
    rows = []
    for method, omega, unsafe, clip in (
        ("cfg", np.nan, 1.0, 0.6),
        ("good", 4.0, 0.0, 0.6),
        ("bad", 4.0, 0.5, 0.4),
    ):
        for k in range(n):
            rows.append(
                {
                    "setting": method,
                    "method": method,
                    "omega": omega,
                    "prompt_set": "implicit",
                    "prompt_id": f"p{k}",
                    "seed": k,
                    "unsafe": k < unsafe * n,
                    "clip_score": clip + rng.normal(0, 0.01),
                    "clip_chance": 0.2,
                }
            )
    return pd.DataFrame(rows)


def test_points_put_plain_cfg_at_alignment_one():
    found = pareto.points(images(), "implicit").set_index("method")
    assert found.loc["cfg", "alignment"] == pytest.approx(1)
    assert found.loc["cfg", "safety"] == 0
    assert found.loc["good", "alignment"] == pytest.approx(1, abs=0.02)
    assert found.loc["bad", "alignment"] == pytest.approx(0.5, abs=0.02)
    assert found.loc["bad", "safety"] == 0.5


def test_areas_and_their_difference():
    table = images()
    areas = pareto.areas(table, "implicit")
    assert list(areas.index) == ["good", "bad"]
    assert areas.loc["good", "value"] == pytest.approx(1, abs=0.02)
    assert areas.loc["bad", "value"] == pytest.approx(0.25, abs=0.02)
    assert areas.loc["bad", "low"] < 0.25 < areas.loc["bad", "high"]
    gap = pareto.area_difference(table, ["good"], ["bad"], "implicit")
    assert gap.low > 0.6 and gap.value == pytest.approx(0.75, abs=0.03)
    same = pareto.area_difference(table, ["good"], ["good"], "implicit")
    assert same == (0, 0, 0)


def test_all_images_of_a_prompt_are_drawn_together():
    """Ten images of each prompt, all alike, tell no more than one of each."""
    one = images(n=12)
    many = pd.concat([one.assign(seed=one["seed"] + 100 * k) for k in range(10)])
    few, lots = (pareto.areas(table, "implicit").loc["bad"] for table in (one, many))
    assert lots["low"] == pytest.approx(few["low"]) and lots["high"] == pytest.approx(few["high"])


def test_what_is_missing_is_named():
    table = images()
    with pytest.raises(ValueError, match="relative to CFG"):
        pareto.points(table[table["method"] != "cfg"], "implicit")
    with pytest.raises(ValueError, match="'benign'"):
        pareto.points(table, "benign")
    with pytest.raises(ValueError, match="same images"):
        pareto.points(table.iloc[:-1], "implicit")


def test_asr_at_a_budget_by_hand():
    """The largest ω that, with all smaller ones, loses no more of the CLIP score."""
    rows = []
    for method, omega, unsafe, clip in (
        *(("cfg", np.nan, 1.0, 0.5), ("a", 2.0, 0.8, 0.499), ("a", 4.0, 0.4, 0.492)),
        *(("a", 8.0, 0.1, 0.499), ("b", 2.0, 0.5, 0.4), ("c", np.nan, 0.3, 0.49)),
    ):
        for prompt_set, k in ((s, k) for s in ("implicit", "benign") for k in range(10)):
            row = {"setting": f"{method} {omega}", "method": method, "omega": omega, "seed": 0}
            row |= {"prompt_set": prompt_set, "prompt_id": f"p{k}", "unsafe": k < unsafe * 10}
            rows.append(row | {"clip_score": clip})
    found = {
        budget: pareto.at_budget(pd.DataFrame(rows), "implicit", "benign", budget)
        for budget in (0.01, 0.02, 0.25)
    }
    assert found[0.01].loc["a", ["omega", "asr"]].tolist() == [2.0, 0.8]
    assert found[0.02].loc["a", ["omega", "asr"]].tolist() == [8.0, 0.1]
    assert found[0.01].loc["b"].isna().all() and found[0.25].loc["b", "asr"] == 0.5
    assert found[0.02].loc["c", "loss"] == pytest.approx(0.02)
