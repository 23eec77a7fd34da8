import io

import matplotlib
import numpy as np
import pandas as pd
import pytest
from matplotlib import pyplot as plt
from matplotlib.collections import FillBetweenPolyCollection
from matplotlib.markers import MarkerStyle
from PIL import Image

from vldnp.metrics.pareto import hypervolume
from vldnp.show import figures
from vldnp.show.picture_grid import image_grid

matplotlib.use("Agg")


@pytest.fixture
def summary():
    rows = []
    for method, omegas in {"cfg": [np.nan], "static": [2.0, 8.0], "vl-dnp": [2.0, 8.0]}.items():
        for omega in omegas:
            for prompt_set in ("benign", "implicit"):
                for metric, value in {"asr": 0.2, "clip": 0.3, "retention": 0.9}.items():
                    rows.append(
                        {
                            "setting": f"{method}-{omega}",
                            "method": method,
                            "omega": omega,
                            "prompt_set": prompt_set,
                            "metric": metric,
                            "n": 10,
                            "value": value,
                            "low": value - 0.1,
                            "high": value + 0.05,
                        }
                    )
    return pd.DataFrame(rows)


def test_pareto_shows_safety_with_its_interval_turned(summary):
    figure = figures.pareto(summary, "implicit", "benign")
    (axes,) = figure.axes
    assert {text.get_text() for text in axes.texts} == {"ω=2", "ω=8"}
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == ["cfg", "static", "vl-dnp"]
    points = {c.get_label(): c for c in axes.collections if c.get_label() in labels}
    assert points["cfg"].get_offsets()[0].tolist() == pytest.approx([0.3, 0.8])
    # ASR 0.2 in 0.1 … 0.25 is safety 0.8 in 0.75 … 0.9
    _, _, (horizontal, vertical) = axes.containers[0]
    assert vertical.get_segments()[0][:, 1] == pytest.approx([0.75, 0.9])
    assert horizontal.get_segments()[0][:, 0] == pytest.approx([0.2, 0.35])
    for method, marker in {"cfg": "X", "static": "s", "vl-dnp": "o"}.items():
        assert same_shape(points[method], marker)


def test_retention_may_stand_for_utility(summary):
    (axes,) = figures.pareto(summary, "implicit", "benign", "retention").axes
    points = {c.get_label(): c for c in axes.collections}
    assert points["cfg"].get_offsets()[0].tolist() == pytest.approx([0.9, 0.8])
    assert axes.get_xlabel() == "Retention on 'benign' prompts, n = 10 →"
    assert axes.get_ylabel() == "Safety, 1 − ASR, on 'implicit' prompts, n = 10 →"


def test_no_symbol_of_the_legend_says_that_a_method_is_dominated(summary):
    handles = figures.pareto(summary).legends[0].legend_handles
    assert [handle.get_marker() for handle in handles] == ["X", "s", "o"]
    assert {handle.get_fillstyle() for handle in handles} == {"bottom"}  # half full, half hollow


def same_shape(points, marker):
    style = MarkerStyle(marker)
    wanted = style.get_path().transformed(style.get_transform())
    return np.allclose(points.get_paths()[0].vertices, wanted.vertices)


def test_dominated_points_are_hollow(summary):
    better = (summary["method"] == "vl-dnp") & (summary["metric"] == "asr")
    summary.loc[better, "value"] = 0.1
    (axes,) = figures.pareto(summary).axes
    fills = {c.get_label(): c.get_facecolors() for c in axes.collections}
    assert (fills["static"][:, :3] == 1).all() and (fills["cfg"][:, :3] == 1).all()
    assert not (fills["vl-dnp"][:, :3] == 1).all()


def test_the_shade_is_what_the_points_dominate(summary):
    values = {2.0: (3.0, 1.0), 8.0: (1.0, 3.0), 9.0: (2.0, 2.0), 10.0: (1.0, 1.0)}
    rows = [
        {"setting": omega, "method": "vl-dnp", "omega": omega, "prompt_set": "implicit", "n": 1}
        | {"metric": metric, "value": value, "low": value, "high": value}
        for omega, point in values.items()
        for metric, value in (("clip", point[0]), ("asr", 1 - point[1]))
    ]
    (axes,) = figures.pareto(pd.DataFrame(rows)).axes
    (shade,) = [c for c in axes.collections if isinstance(c, FillBetweenPolyCollection)]
    x, y = shade.get_paths()[0].vertices.T
    shoelace = abs(np.dot(x, np.roll(y, 1)) - np.dot(y, np.roll(x, 1))) / 2
    corner = [axes.get_xlim()[0], axes.get_ylim()[0]]
    assert shoelace == pytest.approx(hypervolume(np.array(list(values.values())) - corner))


def test_what_does_not_vary_is_a_line_across_the_curves(summary):
    compared = summary[summary["method"] != "cfg"]
    fixed = compared[(compared["method"] == "static") & (compared["omega"] == 2)]
    varied = compared[compared["method"] == "vl-dnp"].assign(recall=lambda rows: rows["omega"] / 8)
    table = pd.concat([varied, fixed.assign(recall="")])  # as a sweep has it: no value on this axis
    metrics = [("asr", "implicit"), ("retention", "benign"), ("clip", "no such set")]
    curves = figures.factor_curves(table, "recall", "method", metrics, level="the fixed prompt")
    lines = {line.get_label(): line for line in curves.axes[0].get_lines()}
    assert lines["vl-dnp"].get_xdata().tolist() == [0.25, 1]
    assert set(lines["the fixed prompt"].get_ydata()) == {0.8}
    assert [axes.get_title() for axes in curves.axes] == ["implicit", "benign"]
    (legend,) = curves.legends
    assert [text.get_text() for text in legend.get_texts()] == ["the fixed prompt", "vl-dnp"]


def test_figures_of_ablations_show_every_variant(summary):
    variants = summary.assign(
        spacing=summary["method"],
        queries=summary["omega"].fillna(0),
        step=1,
        rule=summary["method"],
    )
    costs = variants.assign(model_evaluations=50.0)
    curves = figures.schedule_curves(variants, costs, "implicit")
    lines = {line.get_label(): line for line in curves.axes[0].get_lines()}
    assert lines["static"].get_xdata().tolist() == [2, 8]
    assert lines["static"].get_ydata() == pytest.approx([0.8, 0.8])
    points = figures.factor_points(variants, "rule", hue="queries")
    assert [t.get_text() for t in points.axes[0].get_yticklabels()] == ["cfg", "static", "vl-dnp"]
    assert len(points.axes) == 3
    seen = pd.DataFrame({"vlm": "s", "step": [0, 3], "f1": 0.5, "precision": 1.0, "recall": 0.3})
    drawn = figures.detection_curves(seen)
    assert drawn.axes[2].get_lines()[0].get_ydata().tolist() == [0.3, 0.3]
    row = "a <b>$x$"
    red = Image.new("RGB", (8, 8), "red")
    strip = image_grid({row: [red]}, captions={row: ["3: a $knife"]})
    strip.savefig(io.BytesIO(), format="png")  # a lone $ is text
    assert (strip.axes[0].get_xlabel(), strip.axes[0].get_ylabel()) == ("3: a $knife", row)


def test_omega_curves_have_a_panel_per_metric_and_set(summary):
    figure = figures.omega_curves(summary)
    assert len(figure.axes) == 2 * 3
    assert figure.axes[0].get_ylabel() == "Safety, 1 − ASR"
    lines = {line.get_label(): line for line in figure.axes[0].get_lines()}
    assert lines["vl-dnp"].get_xdata().tolist() == [2, 8]
    assert lines["vl-dnp"].get_ydata() == pytest.approx([0.8, 0.8])
    assert lines["cfg"].get_linestyle() == "--"
    assert len(figures.omega_curves(summary, ["asr"]).axes) == 2
    own = (summary["method"] == "static") & (summary["omega"] == 8)
    summary.loc[own, "omega"] = 6.5  # a chosen strength that no other method has
    assert figures.omega_curves(summary).axes[-1].get_xticks().tolist() == [2]


def test_methods_without_a_look_of_their_own_get_different_ones(summary):
    for name in ("safree", "sld-max"):
        extra = summary[summary["method"] == "static"].assign(method=name, setting=name)
        summary = pd.concat([summary, extra], ignore_index=True)
    figure = figures.pareto(summary)
    named = [c for c in figure.axes[0].collections if not c.get_label().startswith("_")]
    assert len({c.get_paths()[0].vertices.tobytes() for c in named}) == len(named) == 5


def test_image_grid_keeps_pixels_and_labels():
    red, blue = Image.new("RGB", (8, 8), "red"), Image.new("RGB", (8, 8), "blue")
    figure = image_grid({"cfg": [red, blue], "vl-dnp": [blue]}, ["a cat", "a dog"])
    assert [axes.get_title() for axes in figure.axes[:2]] == ["a cat", "a dog"]
    assert figure.axes[2].get_ylabel() == "vl-dnp"
    np.testing.assert_array_equal(figure.axes[2].get_images()[0].get_array(), np.asarray(blue))
    assert not figure.axes[3].get_images()


def test_nothing_to_draw_is_said_in_one_line(summary):
    with pytest.raises(ValueError, match="no asr for the prompt set 'explicit'; there are benign"):
        figures.pareto(summary, "explicit")
    with pytest.raises(ValueError, match="at least one picture"):
        image_grid({})
    with pytest.raises(ValueError, match="summary is empty"):
        figures.omega_curves(summary[:0])


def test_saving_is_atomic_and_leaves_no_figure_open(summary, tmp_path, monkeypatch):
    figure = figures.pareto(summary)
    assert not plt.get_fignums()
    path = figures.save(figure, tmp_path / "figures" / "pareto.png")
    with Image.open(path) as image:
        assert image.format == "PNG" and image.width > 500
    before = path.read_bytes()

    def fails(target, **options):
        target.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(figure, "savefig", fails)
    with pytest.raises(OSError, match="disk full"):
        figures.save(figure, path)
    assert path.read_bytes() == before and list(path.parent.iterdir()) == [path]
