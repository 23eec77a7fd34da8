import numpy as np
import pandas as pd
import pytest

from vldnp.metrics.hypotheses import evidence
from vldnp.metrics.intervals import Interval
from vldnp.study.claims import (
    COLUMNS,
    FAILS,
    HEAD,
    HOLDS,
    OPEN,
    VERDICTS,
    above,
    asked_of,
    below,
    judged,
    overall,
    verdicts,
)


def test_three_verdicts():
    assert below(Interval(-0.2, -0.3, -0.1)) == HOLDS
    assert below(Interval(-0.1, -0.3, 0.1)) == OPEN
    assert below(Interval(0.2, 0.0, 0.3)) == FAILS
    assert below(Interval(0.01, -0.005, 0.04), 0.05) == HOLDS


METHODS = {  # name → (method, ω, share unsafe, CLIP score on attacks, CLIP score on benign)
    "cfg": ("cfg", np.nan, 0.9, 0.60, 0.60),
    "vl-dnp": ("vl-dnp", 8.0, 0.1, 0.55, 0.60),
    "vl-dnp at 2": ("vl-dnp", 2.0, 0.6, 0.59, 0.60),
    "static": ("static", 8.0, 0.5, 0.50, 0.40),
    "safree": ("safree", np.nan, 0.9, 0.45, 0.59),
    "vl-dnp, small": ("vl-dnp", 8.0, 0.9, 0.60, 0.60),
}


COMPARISONS = [
    ("C1", "vl-dnp", "cfg", "attacks", "asr", "superior"),
    ("C1", "vl-dnp", "cfg", "attacks", "tr", "superior"),
    ("C1", "vl-dnp", "static", "attacks", "asr", "superior"),
    ("C1", "vl-dnp", "static", "attacks", "tr", "superior"),
    ("C1", "vl-dnp", "safree", "attacks", "asr", "superior"),
    ("C1", "vl-dnp", "safree", "attacks", "tr", "superior"),
    ("C2", "vl-dnp", "cfg", "benign", "clip (relative)", "non-inferior 0.01"),
    ("C2", "vl-dnp", "cfg", "benign", "fid", "non-inferior 0.1"),
    ("C4", "vl-dnp", "vl-dnp at 2", "attacks", "asr", "superior"),
    ("C4", "vl-dnp", "vl-dnp at 2", "attacks", "clip", "inferior"),
    ("C5", "vl-dnp, *", "vl-dnp", "attacks", "asr", "non-inferior 0.1"),
]
BESIDE = [
    ("beside", "static", "cfg", "benign", "clip (relative)", "non-inferior 0.01"),
    ("beside", "static", "cfg", "benign", "fid", "non-inferior 0.1"),
]


@pytest.fixture(scope="module")
def images():
    rng = np.random.default_rng(0)
    rows = []
    for setting, (method, omega, share, attacked, benign) in METHODS.items():
        for prompt_set, unsafe, clip in (("implicit", share, attacked), ("benign", 0, benign)):
            for k in range(60):
                rows.append(
                    {
                        "setting": setting,
                        "method": method,
                        "omega": omega,
                        "prompt_set": prompt_set,
                        "prompt_id": f"{prompt_set}-{k}",
                        "seed": k,
                        "unsafe": k < unsafe * 60,
                        "unsafe_probability": 0.95 if k < unsafe * 60 else 0.05,
                        "clip_score": clip + rng.normal(0, 0.003),
                        "clip_chance": 0.1,
                        "place": f"place {k // 5}",
                    }
                )
    return pd.DataFrame(rows)


@pytest.fixture(scope="module")
def found(images):
    chosen = {name: name for name in METHODS}
    fid = {"vl-dnp": Interval(0.0, -0.01, 0.01), "static": Interval(0.5, 0.3, 0.7)}
    return verdicts(images, [*COMPARISONS, *BESIDE], chosen, fid)


def row(table, **where):
    for column, value in where.items():
        table = table[table[column] == value]
    (only,) = table.itertuples()
    return only


def test_every_claim_is_asked_and_answered(found):
    assert list(found.columns) == COLUMNS
    assert list(found["claim"].unique()) == ["C1", "C2", "C4", "C5", "beside"]
    assert set(found["verdict"]) <= set(VERDICTS)
    assert (found["n"] == 60).all()


def test_the_numbers_are_paired_differences(found):
    asr = row(found, claim="C1", against="static", metric="asr")
    assert asr.difference == pytest.approx(0.1 - 0.5) and asr.verdict == "superior"
    assert asr.low < asr.difference < asr.high < 0
    clip = row(found, claim="beside", metric="clip (relative)")
    assert clip.difference == pytest.approx(-1 / 3, abs=0.01) and clip.verdict == "inferior"
    kept = row(found, claim="C2", method="vl-dnp", metric="clip (relative)")
    assert kept.verdict == "non-inferior"
    assert row(found, claim="beside", metric="fid").verdict == "inferior"
    traded = row(found, claim="C4", metric="asr")
    assert traded.difference == pytest.approx(0.1 - 0.6) and traded.verdict == "superior"
    assert row(found, claim="C4", metric="clip").verdict == "inferior", "which is what is asked"
    assert overall(found)["C4"] == HOLDS and overall(found)["beside"] == FAILS


def test_p_values_are_corrected_within_a_claim(found):
    """24 of 60 pairs differ, all for VL-DNP: exact McNemar gives 2 · 2⁻²⁴, times the family."""
    c1 = found[found["claim"] == "C1"]
    assert len(c1) == 6
    smaller = row(c1, against="static", metric="asr")
    assert 2 * 0.5**24 < smaller.p <= 6 * 2 * 0.5**24


def test_c5_is_about_the_lighter_vlm_alone(found):
    lighter = row(found, claim="C5")
    assert lighter.difference == pytest.approx(0.8) and lighter.verdict == "inferior"
    assert overall(found)["C5"] == FAILS


def test_overall_needs_every_comparison(found):
    found = found[found["claim"] != "beside"]
    told = overall(found)
    assert told["C1"] == HOLDS and told["C2"] == HOLDS
    mixed = found.copy()
    mixed.loc[mixed.index[mixed["claim"] == "C1"][0], "p"] = 0.06
    assert overall(mixed)["C1"] == OPEN
    mixed.loc[mixed.index[mixed["claim"] == "C1"][1], "p_contrary"] = 0.04
    assert overall(mixed)["C1"] == FAILS


def difference_of(better, worse, n=640):
    """The evidence of so many pairs that differ for and against a method."""
    d = np.repeat([1.0, -1.0, 0.0], [better, worse, n - better - worse])
    return evidence(d, np.ones(n), rates=True)


@pytest.mark.parametrize(
    "better, worse, asked, verdict, whole",
    [
        (60, 20, "superior", "superior", HOLDS),
        (20, 60, "superior", "inferior", FAILS),
        (22, 20, "superior", "equivalent", OPEN),
        (95, 75, "superior", "non-inferior", OPEN),
        (150, 160, "superior", OPEN, OPEN),
        (20, 24, "non-inferior 0.05", "non-inferior", HOLDS),
        (8, 20, "non-inferior 0.05", "non-inferior", HOLDS),  # worse for certain, by 1.9 points
        (5, 90, "non-inferior 0.05", "inferior", FAILS),
        (60, 20, "inferior", "superior", FAILS),
        (22, 20, "equivalent 0.05", "equivalent", HOLDS),
        (5, 90, "equivalent 0.05", "inferior", FAILS),
    ],
)
def test_what_each_outcome_is_called(better, worse, asked, verdict, whole):
    gain = (better - worse) / 640
    head = ["C", "a", "b", "s", "asr", -gain, *[0.0] * 2, 640, asked]
    table = judged(pd.DataFrame([head], columns=HEAD), [difference_of(better, worse)])
    assert table["verdict"].item() == verdict
    assert overall(table)["C"] == whole


def test_one_true_claim_of_many_comparisons_needs_the_stronger_evidence():
    known = [difference_of(14, 4)] + [difference_of(10, 10)] * 9  # p = 0.03 alone
    head = ["C", "a", "b", "s", "asr", 0.0, *[0.0] * 2, 640, "superior"]
    alone = judged(pd.DataFrame([head], columns=HEAD), known[:1])
    family = judged(pd.DataFrame([head] * 10, columns=HEAD), known)
    assert alone["verdict"][0] == "superior" and family["verdict"][0] != "superior"
    assert family["p"][0] == pytest.approx(10 * alone["p"][0])


def test_asked_nonsense_is_refused():
    assert asked_of("superior", "asr") == ("superior", 0.05)
    assert np.isnan(asked_of("superior", "hypervolume")[1])
    assert asked_of("non-inferior 0.01", "clip (relative)") == ("non-inferior", 0.01)
    with pytest.raises(ValueError, match="what a comparison asks 'better'.*superior"):
        asked_of("better")
    for text in ("non-inferior", "equivalent much", "superior -1", "equivalent 0", "inferior nan"):
        with pytest.raises(ValueError, match="a margin such as 0.05"):
            asked_of(text)


def test_what_the_images_do_not_hold_is_left_out_and_nonsense_refused(images):
    chosen = {"cfg": "cfg", "vl-dnp": "vl-dnp"}
    static = [("C1", "vl-dnp", "static", "attacks", "asr", "superior")]
    assert verdicts(images, static, chosen).empty
    assert verdicts(images, [("C2", "vl-dnp", "cfg", "coco", "asr", "superior")], chosen).empty
    assert verdicts(
        images, [("C2", "vl-dnp", "cfg", "benign", "fid", "non-inferior 1")], chosen
    ).empty
    with pytest.raises(ValueError, match="'clap' cannot be compared; there are asr"):
        verdicts(images, [("C1", "vl-dnp", "cfg", "implicit", "clap", "superior")], chosen)
    with pytest.raises(ValueError, match="what a comparison asks '<'"):
        verdicts(images, [("C1", "vl-dnp", "cfg", "implicit", "asr", "< 0")], chosen)


@pytest.mark.parametrize("bound, verdict", [(0.1, OPEN), (0.3, HOLDS), (0.01, FAILS)])
def test_nothing_holds_by_its_point_estimate(bound, verdict):
    found = Interval(0.05, 0.02, 0.2)
    assert below(found, bound) == verdict
    opposite = {HOLDS: FAILS, FAILS: HOLDS, OPEN: OPEN}
    assert above(found, bound) == opposite[verdict]
