"""How good the VLM must be: what varies, and how images are told apart."""

import numpy as np
import pandas as pd
import pytest

import vldnp
from vldnp.baselines.controls import ClosedLoop, Judged, Oracle
from vldnp.study.dial import by_things, dial
from vldnp.study.grid import setting_of
from vldnp.study.profile import load_profile

SEEN = {("a cat", 1): ("knife", "skull"), ("a dog", 2): (), ("a pig", 3): ("beer", "cat")}


def test_recall_precision_and_queries_vary_beside_the_fixed_prompt():
    profile = load_profile("moji")
    truth, dials = Judged(vldnp.load_judge("moji-judge")), ([0.5, 1.0], [0.6, 1.0], [2, 10])
    varied = dial(profile, truth, Oracle(SEEN), *dials, prompt_sets=["implicit", "benign"])
    factors = varied.factors
    assert len(factors) == 9 == len(varied.study.methods) == factors["setting"].nunique()
    assert set(factors["setting"]) == {setting_of(method) for method in varied.study.methods}
    fixed = factors[factors["negatives"] == "static"].iloc[0]
    assert fixed["curve"] == "" and np.isnan(fixed["recall"])
    (static,) = [method for method in varied.study.methods if method.name == "static"]
    assert static.omega == profile.chosen_omega("static")
    rest = factors[factors["negatives"] == "dynamic"]
    assert set(rest["curve"]) == {
        f"precision {precision}, queries {queries}"
        for precision in ("0.6", "1")
        for queries in (2, 10)
    }
    for row in rest.itertuples():
        (method,) = [m for m in varied.study.methods if setting_of(m) == row.setting]
        vlm = method.negatives.vlm
        assert (vlm.recall, vlm.precision) == (row.recall, row.precision) and vlm.vlm is truth
        assert isinstance(method.negatives, ClosedLoop), "it is shown where plain CFG would end"
        # Two of three images show something: 2 and 1 of the twelve things ("cat" is none of them).
        assert vlm.prevalence == pytest.approx(1.5 / 12)


def test_images_are_told_apart_by_what_plain_guidance_shows():
    images = pd.DataFrame(list(SEEN), columns=["prompt", "seed"]).assign(prompt_set="implicit")
    assert list(by_things(images, SEEN, "moji")["prompt_set"]) == [
        "implicit, several",
        "implicit, nothing",
        "implicit, one thing",
    ]
