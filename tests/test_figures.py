import matplotlib
import numpy as np
import pandas as pd
import pytest
from matplotlib import pyplot as plt
from PIL import Image

from vldnp import figures

matplotlib.use("Agg")


@pytest.fixture
def summary():
    rows = []
    for method, omegas in {"cfg": [np.nan], "static": [2.0, 8.0], "vl-dnp": [2.0, 8.0]}.items():
        for omega in omegas:
            for prompt_set in ("benign", "implied"):
                for metric, value in {"asr": 0.2, "clip": 0.3, "kept": 0.9}.items():
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
    figure = figures.pareto(summary, "implied", "benign")
    (axes,) = figure.axes
    assert {text.get_text() for text in axes.texts} == {"ω=2", "ω=8"}
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == ["cfg", "static", "vl-dnp"]
    container = next(c for c in axes.containers if c.get_label() == "cfg")
    line, _, (horizontal, vertical) = container
    assert line.get_xydata()[0] == pytest.approx([0.3, 0.8])
    # ASR 0.2 in 0.1 … 0.25 is safety 0.8 in 0.75 … 0.9
    assert vertical.get_segments()[0][:, 1] == pytest.approx([0.75, 0.9])
    assert horizontal.get_segments()[0][:, 0] == pytest.approx([0.2, 0.35])
    markers = {c.get_label(): c[0].get_marker() for c in axes.containers}
    assert markers == {"cfg": "X", "static": "s", "vl-dnp": "o"}


def test_omega_curves_have_a_panel_per_metric_and_set(summary):
    figure = figures.omega_curves(summary)
    assert len(figure.axes) == 2 * 3
    assert figure.axes[0].get_ylabel() == "Safety, 1 − ASR"
    lines = {line.get_label(): line for line in figure.axes[0].get_lines()}
    assert lines["vl-dnp"].get_xdata().tolist() == [2, 8]
    assert lines["vl-dnp"].get_ydata() == pytest.approx([0.8, 0.8])
    assert lines["cfg"].get_linestyle() == "--"
    assert len(figures.omega_curves(summary, ["asr"]).axes) == 2


def test_methods_without_a_look_of_their_own_get_different_ones(summary):
    for name in ("safree", "sld-max"):
        extra = summary[summary["method"] == "static"].assign(method=name, setting=name)
        summary = pd.concat([summary, extra], ignore_index=True)
    figure = figures.pareto(summary)
    markers = [container[0].get_marker() for container in figure.axes[0].containers]
    assert len(set(markers)) == 5


def test_image_grid_keeps_pixels_and_labels():
    red, blue = Image.new("RGB", (8, 8), "red"), Image.new("RGB", (8, 8), "blue")
    figure = figures.image_grid({"cfg": [red, blue], "vl-dnp": [blue]}, ["a cat", "a dog"])
    assert [axes.get_title() for axes in figure.axes[:2]] == ["a cat", "a dog"]
    assert figure.axes[2].get_ylabel() == "vl-dnp"
    np.testing.assert_array_equal(figure.axes[2].get_images()[0].get_array(), np.asarray(blue))
    assert not figure.axes[3].get_images()


def test_nothing_to_draw_is_said_in_one_line(summary):
    with pytest.raises(ValueError, match="no asr for the prompt set 'named'; there are benign"):
        figures.pareto(summary, "named")
    with pytest.raises(ValueError, match="at least one picture"):
        figures.image_grid({})
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
