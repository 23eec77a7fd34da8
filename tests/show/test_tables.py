import numpy as np
import pandas as pd
import pytest
from tiny import ScriptedVLM, sd_pipeline

from vldnp.methods import CFG, VLDNP, Static
from vldnp.metrics.summary import TABLE
from vldnp.models.backbone import Backbone
from vldnp.models.judges import Judgement
from vldnp.sampler import sample
from vldnp.show import tables, timing_text, trajectory_text
from vldnp.study.timing import costs


def row(method, omega, prompt_set, asr, retention, clip, seconds=1.0):
    known = {"method": method, "omega": omega, "prompt_set": prompt_set, "n": 64, "asr": asr}
    for name, value in {"asr": asr, "retention": retention}.items():
        known |= {f"{name}_low": value - 0.01, f"{name}_high": value + 0.01}
    return known | {
        "retention": retention,
        "clip": clip,
        "seconds": seconds,
        "model_evaluations": 50,
    }


@pytest.fixture
def table():
    rows = [
        row("cfg", np.nan, "benign", 0.0, 0.97, 0.300),
        row("cfg", np.nan, "implicit", 0.7, 0.95, 0.280),
        row("static", 4, "benign", 0.0, 0.6, 0.270),
        row("static", 4, "implicit", 0.3, 0.5, 0.250),
        row("vl-dnp", 4, "benign", 0.0, 0.97, 0.299, 1.5),
        row("vl-dnp", 4, "implicit", 0.08, 0.93, 0.285, 1.5),
        row("vl-dnp", 8, "benign", 0.0, 0.97, 0.290, 1.5),
        row("vl-dnp", 8, "implicit", 0.02, 0.85, 0.285, 1.5),
    ]
    return pd.DataFrame(rows).reindex(columns=TABLE)


def test_best_needs_the_named_things(table):
    assert tables.best(table)["omega"] == 4, "ω = 8 is safer but keeps too little"
    table.loc[table["method"] == "vl-dnp", "retention"] = [0.97, 0.5, 0.97, 0.6]
    assert tables.best(table)["omega"] == 8, "none keeps enough, so the one that keeps most"
    assert tables.best(table, "safree") is None
    assert tables.best(table, chosen={"vl-dnp": 4.0})["omega"] == 4, "as tuning chose"


def test_verdict_says_what_holds_and_what_does_not(table):
    text = tables.verdict(table)
    assert text.count("**holds**") == 3 and "does not hold" not in text
    assert "CLIP score by -0.3 %" in text and "CLIP on `benign` -10.0 %" in text
    for method, asr in {"cfg": 0.5, "vl-dnp": 0.2}.items():
        own = table["method"] == method
        table.loc[own, ["asr", "asr_low", "asr_high"]] = asr, asr - 0.01, asr + 0.01
    assert tables.verdict(table).count("**does not hold**") == 2
    assert "no pair" in tables.verdict(table[table["method"] == "static"])


def test_what_only_the_point_estimate_meets_is_undecided(table):
    table["asr_low"], table["asr_high"] = table["asr"] - 0.2, table["asr"] + 0.2
    table["retention_low"], table["retention_high"] = (
        table["retention"] - 0.1,
        table["retention"] + 0.02,
    )
    text = tables.verdict(table)
    assert text.count("**undecided**") == 3 and "holds" not in text and "not hold" not in text


def test_results_are_tables_with_intervals(table):
    text = tables.results(table.drop(columns=["retention_low", "retention_high"]))
    assert "| cfg |  | 0.70 [0.69, 0.71] | 0.280 | 0.95 | 50.0 |" in text
    assert "| vl-dnp | 8 | 0.02 [0.01, 0.03] | 0.285 | 0.85 | 50.0 |" in text
    assert "| FID |" not in text and "Not measured: FID and KID" in text, "no empty columns"
    assert "Not measured" not in tables.results(table.assign(fid=1.0))
    assert text._repr_markdown_() == text


def test_prompts_elsewhere_have_no_goals_and_no_retention(table):
    text = tables.verdict(table.assign(retention=np.nan))
    assert "goal" not in text and "retention" not in text and "nan" not in text
    assert "VL-DNP at ω = " in text and "lowest ASR among the strengths; it was" in text


def images():
    rng = np.random.default_rng(0)
    frames = []
    for method, omega, unsafe in (("static", 4.0, 0.9), ("vl-dnp", 4.0, 0.1), ("cfg", np.nan, 0.9)):
        frames.append(
            pd.DataFrame(
                {
                    "method": method,
                    "omega": omega,
                    "prompt_set": "implicit",
                    "prompt_id": [str(i) for i in range(60)],
                    "prompt": "a cat",
                    "seed": 0,
                    "unsafe": rng.random(60) < unsafe,
                    "unsafe_probability": 0.5,
                    "retention": 1.0,
                    "clip_score": np.nan,
                    "found": [["dagger"]] * 60,
                    "vlm_answers": [["none"]] * 60,
                }
            )
        )
    return pd.concat(frames)


def test_paired_turns_so_that_positive_favours_the_first():
    data = images()
    found = tables.paired(data, "implicit")
    assert list(found.columns) == ["Safety, 1 − ASR", "Retention"], "CLIP was not measured"
    by_hand = [
        data[data["method"] == name]["unsafe"].to_numpy(float) for name in ("static", "vl-dnp")
    ]
    safety = found.loc[4.0, "Safety, 1 − ASR"]
    assert safety.value == pytest.approx((by_hand[0] - by_hand[1]).mean())
    assert 0 < safety.low < safety.value < safety.high
    assert "**+" in tables.written(found) and "| 4 |" in tables.written(found)
    against_plain = tables.paired(data, "implicit", "vl-dnp", "cfg")
    assert against_plain.loc[4.0, "Safety, 1 − ASR"].low > 0
    with pytest.raises(ValueError, match="no image of method 'vl-dnp' on prompt set 'benign'"):
        tables.paired(data, "benign")


@pytest.fixture(scope="module")
def model():
    return Backbone(sd_pipeline())


def test_trajectory_tells_what_was_in_force(model):
    answers = iter(["none", "a knife", "a skull"])
    vlm = ScriptedVLM(lambda image, question: next(answers))
    method = VLDNP(vlm, "moji", omega=2, query_steps=[0, 1, 3])
    out = sample(model, "a *cat* <b>", method, num_inference_steps=4, progress=False)
    text = trajectory_text.trajectory(out)
    assert text.startswith("*a \\*cat\\* &lt;b>*: the VLM was asked at steps 0, 1 and 3 of 4.")
    assert "came at step 1 (“knife”)" in text and "**3 of 4** steps: “knife” and “skull”" in text
    asked = trajectory_text.queries(out)
    assert asked.index.tolist() == [0, 1, 3]
    assert asked["negative_prompt"].tolist() == ["none", "knife", "skull"]
    plain = sample(model, "a cat", CFG(), num_inference_steps=2, progress=False)
    assert "none of the steps" in trajectory_text.trajectory(plain)


def test_retention_stands_beside_safety(model):
    def judge(images):
        things = [{"cat": float(k > 0), "dog": 1.0, "at": 1.0} for k in range(len(images))]
        return Judgement(np.array([0.9] + [0.1] * (len(images) - 1)), [{}] * len(images), things)

    out = sample(
        model, "a cat", CFG(), num_images_per_prompt=4, num_inference_steps=1, progress=False
    )
    found = trajectory_text.side_by_side({"cfg": out}, judge)
    assert found.loc["cfg", ["unsafe", "retention"]].tolist() == [1, 0.75]  # "at" is in no word
    text = trajectory_text.unsafe_counts(found)
    assert "`cfg` in **1 of 4** (nothing)" in text and "finds **75%** with `cfg`." in text
    unknown = trajectory_text.unsafe_counts(found.assign(retention=np.nan))
    assert "harmless" not in unknown


def test_costs_of_each_method_relative_to_the_first(model):
    methods = {"cfg": CFG(), "static": Static("knife", omega=1)}
    found = costs(
        model, methods, ["a cat", "a dog"], [0, 1], repetitions=2, num_inference_steps=2,
        progress=False,
    )  # fmt: skip
    assert found["evaluations_per_step"].tolist() == [2, 3] and found.loc["cfg", "ratio"] == 1
    row = found.loc["static"]
    assert 0 < row["ratio_low"] <= row["ratio"] <= row["ratio_high"]
    assert "`static` takes **" in timing_text.cost(found)
    with pytest.raises(ValueError, match="repetitions must be 1 or more, not 0"):
        costs(model, methods, ["a cat"], [0], repetitions=0)
    with pytest.raises(ValueError, match="no methods to time"):
        costs(model, {}, ["a cat"], [0])
