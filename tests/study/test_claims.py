"""Verdicts on claims, from rows made by hand."""

import numpy as np
import pandas as pd
import pytest

from vldnp.metrics.hypotheses import Evidence
from vldnp.study.claims import (
    COLUMNS,
    FAILS,
    HEAD,
    HOLDS,
    OPEN,
    asked_of,
    judged,
    overall,
    verdicts,
)

METHODS = {  # name → (method, ω, share unsafe, CLIP score on attacks, CLIP score on benign)
    "cfg": ("cfg", np.nan, 0.9, 0.60, 0.60),
    "vl-dnp": ("vl-dnp", 8.0, 0.1, 0.55, 0.60),
    "vl-dnp at 2": ("vl-dnp", 2.0, 0.6, 0.59, 0.60),
    "static": ("static", 8.0, 0.5, 0.50, 0.40),
    "safree": ("safree", np.nan, 0.9, 0.45, 0.59),
    "vl-dnp, small": ("vl-dnp", 8.0, 0.9, 0.60, 0.60),
}
COMPARISONS = [
    *(
        ("C1", "vl-dnp", other, "attacks", metric, "superior")
        for other in ("cfg", "static", "safree")
        for metric in ("asr", "tr")
    ),
    ("C2", "vl-dnp", "cfg", "benign", "clip (relative)", "non-inferior 0.01"),
    ("C4", "vl-dnp", "vl-dnp at 2", "attacks", "asr", "superior"),
    ("C4", "vl-dnp", "vl-dnp at 2", "attacks", "clip", "inferior"),
    ("C5", "vl-dnp, *", "vl-dnp", "attacks", "asr", "non-inferior 0.1"),
    ("beside", "static", "cfg", "benign", "clip (relative)", "non-inferior 0.01"),
]


@pytest.fixture(scope="module")
def images():
    rng, rows = np.random.default_rng(0), []
    for setting, (method, omega, share, attacked, benign) in METHODS.items():
        for prompt_set, unsafe, clip in (("implicit", share, attacked), ("benign", 0, benign)):
            for k in range(60):
                row = {"setting": setting, "method": method, "omega": omega, "seed": k}
                row |= {"prompt_set": prompt_set, "prompt_id": f"{prompt_set}-{k}"}
                row |= {"unsafe": k < unsafe * 60, "clip_score": clip + rng.normal(0, 0.003)}
                rows.append(row | {"unsafe_probability": 0.95 if row["unsafe"] else 0.05})
    return pd.DataFrame(rows)


@pytest.fixture(scope="module")
def found(images):
    return verdicts(images, COMPARISONS, {name: name for name in METHODS})


def row(table, **where):
    for column, value in where.items():
        table = table[table[column] == value]
    (only,) = table.itertuples()
    return only


def test_every_claim_is_asked_and_answered(found):
    assert list(found.columns) == COLUMNS and (found["n"] == 60).all()
    assert list(found["claim"].unique()) == ["C1", "C2", "C4", "C5", "beside"]
    told = {"C1": HOLDS, "C2": HOLDS, "C4": HOLDS, "C5": FAILS, "beside": FAILS}
    assert overall(found).to_dict() == told
    mixed = found.copy()
    mixed.loc[mixed.index[mixed["claim"] == "C1"][0], "p"] = 0.06
    assert overall(mixed)["C1"] == OPEN
    mixed.loc[mixed.index[mixed["claim"] == "C1"][1], "p_contrary"] = 0.04
    assert overall(mixed)["C1"] == FAILS


def test_the_numbers_are_paired_differences(found):
    asr = row(found, claim="C1", against="static", metric="asr")
    assert asr.difference == pytest.approx(0.1 - 0.5) and asr.verdict == "superior"
    assert asr.low < asr.difference < asr.high < 0
    clip = row(found, claim="beside")
    assert clip.difference == pytest.approx(-1 / 3, abs=0.01) and clip.verdict == "beyond"
    assert row(found, claim="C2").verdict == "non-inferior"
    traded = row(found, claim="C4", metric="asr")
    assert traded.difference == pytest.approx(0.1 - 0.6) and traded.verdict == "superior"
    assert row(found, claim="C4", metric="clip").verdict == "inferior", "which is what is asked"
    lighter = row(found, claim="C5")
    assert lighter.difference == pytest.approx(0.8) and lighter.verdict == "beyond"


def test_p_values_are_corrected_within_a_claim(found):
    """24 of 60 pairs differ, all for VL-DNP: exact McNemar gives 2 · 2⁻²⁴, times the family."""
    c1 = found[found["claim"] == "C1"]
    smaller = row(c1, against="static", metric="asr")
    assert len(c1) == 6 and 2 * 0.5**24 < smaller.p <= 6 * 2 * 0.5**24


def difference_of(better, worse, n=640):
    """The evidence of so many pairs that differ for and against a method."""
    d = np.repeat([1.0, -1.0, 0.0], [better, worse, n - better - worse])
    return Evidence(d, np.ones(n), rates=True)


@pytest.mark.parametrize(
    "better, worse, asked, verdict, whole",
    [
        (60, 20, "superior", "superior", HOLDS),
        (20, 60, "superior", "inferior", FAILS),
        (22, 20, "superior", OPEN, OPEN),
        (20, 24, "non-inferior 0.05", "non-inferior", HOLDS),
        (8, 20, "non-inferior 0.05", "non-inferior", HOLDS),  # worse for certain, by 1.9 points
        (150, 160, "non-inferior 0.05", OPEN, OPEN),
        (5, 90, "non-inferior 0.05", "beyond", FAILS),
        (60, 20, "inferior", "superior", FAILS),
    ],
)
def test_what_each_outcome_is_called(better, worse, asked, verdict, whole):
    head = ["C", "a", "b", "s", "asr", 0.0, *[0.0] * 2, 640, asked]
    table = judged(pd.DataFrame([head], columns=HEAD), [difference_of(better, worse)])
    assert table["verdict"].item() == verdict
    assert overall(table)["C"] == whole


def test_one_true_claim_of_many_comparisons_needs_the_stronger_evidence():
    known = [difference_of(14, 4)] + [difference_of(10, 10)] * 9  # p = 0.03 alone
    head = ["C", "a", "b", "s", "asr", 0.0, *[0.0] * 2, 640, "superior"]
    alone = judged(pd.DataFrame([head], columns=HEAD), known[:1])
    family = judged(pd.DataFrame([head] * 10, columns=HEAD), known)
    assert alone["verdict"][0] == "superior" and family["verdict"][0] == OPEN
    assert family["p"][0] == pytest.approx(10 * alone["p"][0])


def test_nonsense_is_refused_and_what_the_images_do_not_hold_left_out(images):
    assert asked_of("non-inferior 0.01") == ("non-inferior", 0.01)
    with pytest.raises(ValueError, match="what a comparison asks 'better'.*superior"):
        asked_of("better")
    for text in ("non-inferior", "non-inferior much", "non-inferior -1", "inferior 0.1"):
        with pytest.raises(ValueError, match="asks for 'superior' or 'non-inferior 0.05'"):
            asked_of(text)
    chosen = {"cfg": "cfg", "vl-dnp": "vl-dnp"}
    for against, prompts in (("static", "attacks"), ("cfg", "coco")):
        assert verdicts(images, [("C", "*", against, prompts, "asr", "superior")], chosen).empty
    with pytest.raises(ValueError, match="metric of a comparison 'clap'"):
        verdicts(images, [("C1", "vl-dnp", "cfg", "implicit", "clap", "superior")], chosen)
