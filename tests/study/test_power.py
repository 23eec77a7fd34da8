"""Power by simulation, against statsmodels and by hand."""

import pandas as pd
import pytest
from scipy import stats
from statsmodels.stats.power import NormalIndPower
from statsmodels.stats.proportion import proportion_effectsize

from moji.study.protocol import load_protocol
from vldnp._files import data_folder
from vldnp.show.power import planned, power, tuned

SHIPPED = data_folder() / "protocol.yaml"


def test_power_agrees_with_the_textbook():
    """McNemar's exact test on independent pairs is a little weaker than two samples' z-test."""
    textbook = NormalIndPower().power(proportion_effectsize(0.3, 0.2), 300, 0.05)
    found = power(0.2, 0.3, 300, "superior", draws=400)
    assert textbook - 0.12 < found < textbook + 0.05


def test_without_a_difference_it_is_the_level():
    assert power(0.3, 0.3, 200, "superior", draws=400) <= 0.025 + 3 * (0.025 * 0.975 / 400) ** 0.5


def test_non_inferiority_by_hand():
    """Equal rates, so that the standard error of the difference is √(2 p (1 − p) / n)."""
    n, p, margin = 400, 0.1, 0.1
    expected = stats.norm.cdf(margin / (2 * p * (1 - p) / n) ** 0.5 - stats.norm.ppf(0.975))
    assert power(p, p, n, "non-inferior 0.1", draws=300) == pytest.approx(expected, abs=0.05)


def test_more_prompts_more_seeds_and_smaller_families_help():
    few = power(0.1, 0.2, 96, "superior")
    assert power(0.1, 0.2, 640, "superior") > few + 0.2
    assert power(0.1, 0.2, 96, "superior", seeds=8) > few + 0.2
    assert power(0.1, 0.2, 96, "superior", family=10) < few


def test_comparisons_without_an_expected_rate_are_left_out():
    protocol = load_protocol()
    rates = pd.DataFrame({"implicit": {"cfg": 0.8, "vl-dnp": 0.1, "static": float("nan")}})
    found = planned(protocol, rates)
    assert list(found[["method", "against", "prompt_set"]].iloc[0]) == ["vl-dnp", "cfg", "implicit"]
    assert len(found) == 1 and found["power"].iloc[0] == 1


def test_expected_rates_come_from_all_published_tuning_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("VLDNP_DATA", str(tmp_path))
    assert tuned("moji").empty and planned(load_protocol(SHIPPED), tuned("moji")).empty
    for run, rows in {
        "main": "static,0.4,False\nstatic,0.2,True",
        "others": "sld,0.3,True",
    }.items():
        folder = tmp_path / "results" / f"moji-tuning-{run}"
        folder.mkdir(parents=True)
        (folder / "tuning.csv").write_text(f"method,asr-tuning-implicit,chosen\n{rows}\n")
    assert tuned("moji")["implicit"].to_dict() == {"static": 0.2, "sld": 0.3}
