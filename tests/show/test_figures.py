import matplotlib
import numpy as np
import pandas as pd
import pytest
from matplotlib import pyplot as plt
from matplotlib.markers import MarkerStyle

from vldnp.metrics.intervals import paired_difference
from vldnp.metrics.summary import table
from vldnp.show import figures, tables

matplotlib.use("Agg")


@pytest.fixture
def summary():
    rows = []
    for method, omegas in {"cfg": [np.nan], "static": [2.0, 8.0], "vl-dnp": [2.0, 8.0]}.items():
        for omega in omegas:
            for prompt_set in ("benign", "implicit"):
                for metric, value in {"asr": 0.2, "clip": 0.3, "retention": 0.9}.items():
                    ends = {"value": value, "low": value - 0.1, "high": value + 0.05}
                    where = {"method": method, "omega": omega, "prompt_set": prompt_set, "n": 10}
                    rows.append({"setting": f"{method}-{omega}", **where, "metric": metric, **ends})
    return pd.DataFrame(rows)


def test_pareto_shows_safety_with_its_interval_turned(summary):
    (axes,) = figures.pareto(summary, "implicit", "benign").axes
    assert {text.get_text() for text in axes.texts} >= {"ω=2", "ω=8"}
    points = {c.get_label(): c for c in axes.collections}
    assert points["cfg"].get_offsets()[0].tolist() == pytest.approx([0.3, 0.8])
    (line,) = (line for line in axes.get_lines() if line.get_label() == "1 % below CFG")
    assert line.get_xdata() == pytest.approx([0.297, 0.297])
    # ASR 0.2 in 0.1 … 0.25 is safety 0.8 in 0.75 … 0.9
    _, _, (horizontal, vertical) = axes.containers[0]
    assert vertical.get_segments()[0][:, 1] == pytest.approx([0.75, 0.9])
    assert horizontal.get_segments()[0][:, 0] == pytest.approx([0.2, 0.35])
    for method, marker in {"cfg": "X", "static": "s", "vl-dnp": "o"}.items():
        style = MarkerStyle(marker)
        wanted = style.get_path().transformed(style.get_transform())
        assert np.allclose(points[method].get_paths()[0].vertices, wanted.vertices)
    (axes,) = figures.pareto(summary, "implicit", "benign", "retention").axes
    assert axes.get_xlabel() == "Retention on 'benign' prompts →"
    assert axes.get_ylabel() == "Safety, 1 − ASR on 'implicit' prompts →"


def test_methods_without_a_look_of_their_own_get_different_ones(summary):
    for name in ("safree", "sld-max"):
        extra = summary[summary["method"] == "static"].assign(method=name, setting=name)
        summary = pd.concat([summary, extra], ignore_index=True)
    named = [
        c
        for c in figures.pareto(summary, "implicit", "benign").axes[0].collections
        if not c.get_label().startswith("_")
    ]
    assert len({c.get_paths()[0].vertices.tobytes() for c in named}) == len(named) == 5


def test_curves_have_a_panel_per_metric_and_set(summary):
    pairs = [(m, s) for s in ("benign", "implicit") for m in ("asr", "retention", "clip")]
    figure = figures.curves(summary, "omega", "method", [*pairs, ("clip", "no such set")])
    assert [axes.get_title() for axes in figure.axes] == ["benign"] * 3 + ["implicit"] * 3
    assert figure.axes[0].get_ylabel() == "Safety, 1 − ASR"
    assert len({axes.get_position().x0 for axes in figure.axes}) == 3, "in three columns"
    lines = {line.get_label(): line for line in figure.axes[0].get_lines()}
    assert lines["vl-dnp"].get_xdata().tolist() == [2, 8]
    assert lines["vl-dnp"].get_ydata() == pytest.approx([0.8, 0.8])
    assert lines["cfg"].get_linestyle() == "--" and set(lines["cfg"].get_ydata()) == {0.8}
    assert len(figures.curves(summary, "omega", "method", [*pairs[:2], pairs[3]]).axes) == 3


def test_points_of_an_ablation(summary):
    variants = summary.assign(rule=summary["method"])
    drawn = figures.points(variants, "rule", [("asr", "implicit"), ("clip", "benign")])
    assert [t.get_text() for t in drawn.axes[0].get_yticklabels()] == ["cfg", "static", "vl-dnp"]
    assert len(drawn.axes) == 2


def test_nothing_to_show_is_said_in_one_line(summary):
    with pytest.raises(ValueError, match="no asr for the prompt set 'explicit'; there are benign"):
        figures.pareto(summary, "explicit", "benign")
    with pytest.raises(ValueError, match="summary is empty"):
        figures.curves(summary[:0], "omega", "method", [("asr", "implicit")])


def test_no_figure_stays_open(summary):
    figures.pareto(summary, "implicit", "benign")
    assert not plt.get_fignums()


# Tables
@pytest.fixture
def images():
    rng, rows = np.random.default_rng(0), []
    for method, omega in (("cfg", np.nan), ("static", 8.0), ("vl-dnp", 4.0), ("vl-dnp", 8.0)):
        for k in range(20):
            p = rng.random()
            where = {"method": method, "omega": omega, "setting": f"{method}{omega}", "seed": k}
            where |= {"prompt_set": "implicit", "prompt_id": str(k), "unsafe_probability": p}
            spent = {"model_evaluations": 50.0, "vlm_calls": 5.0, "seconds": 1.0}
            measured = {"unsafe": p > 0.5, "retention": 0.9, "clip_score": 0.3, "clip_i": np.nan}
            rows.append(where | measured | spent)
    return pd.DataFrame(rows)


def test_results_are_the_table_with_intervals(images):
    numbers = table(images)
    shown = tables.results(numbers)
    row = numbers[(numbers["method"] == "vl-dnp") & (numbers["omega"] == 8)].iloc[0]
    expected = f"{row.asr:.2f} [{row.asr_low:.2f}, {row.asr_high:.2f}]"
    assert shown.loc[("implicit", "vl-dnp", "8"), "ASR"] == expected
    assert "FID" not in shown and shown.loc[("implicit", "cfg", ""), "VLM calls"] == "5.0"


def test_paired_differences(images):
    of = dict(list(images.groupby("setting")))
    found = paired_difference(of["vl-dnp8.0"], of["static8.0"], "unsafe")
    expected = f"{found.value:+.3f} [{found.low:+.3f}, {found.high:+.3f}]"
    pairs = {"8": ("vl-dnp8.0", "static8.0"), "cfg": ("cfgnan", "static8.0")}
    shown = tables.paired(images, "implicit", pairs)
    assert list(shown.index) == ["8", "cfg"] and shown.loc["8", "ASR"] == expected
    assert tables.paired(images.assign(retention=np.nan), "implicit", pairs).columns[1] == "CLIP"
