"""The study's controls and strengths, on the benchmark's own models and rows."""

import pandas as pd
import pytest

import vldnp
from moji.study.controls import blind_spots, place_prior_guide
from moji.study.tuning import tuned
from vldnp._files import data_folder
from vldnp.study.profile import chosen_methods, load_profile

PROMPTS = ["a cat at the pirate cove", "a dog in the park"]
QUICK = {"num_inference_steps": 4, "progress": False}


@pytest.fixture(scope="module")
def model():
    return vldnp.load("moji-sd")


def test_the_place_prior_names_what_the_place_carries(model):
    out = vldnp.sample(model, PROMPTS, place_prior_guide("moji", 8.0, "forbidden"), **QUICK)
    assert [s.negative_prompts for s in out.trace.steps] == [["forbidden, dagger, skull", None]] * 4
    static = vldnp.sample(model, PROMPTS[0], vldnp.Static("forbidden, dagger, skull", 8.0), **QUICK)
    assert (out.latents[0] - static.latents[0]).abs().max() < 1e-3
    cfg = vldnp.sample(model, PROMPTS[1], seeds=[1], **QUICK)
    assert (out.latents[1] - cfg.latents[0]).abs().max() < 1e-3
    assert out.trace.vlm_calls == [0, 0]


def test_blind_spots_persist(model):
    """Of 12 terms about half are missed, other ones in each image, and the same at each query."""
    concepts = vldnp.load_concepts("moji")
    everything = vldnp.VLDNP(
        lambda images, question: [", ".join(concepts.terms)] * len(images), "moji", 8.0, [0, 1, 3]
    )
    asked = {"seeds": range(8), **QUICK}
    out = vldnp.sample(model, PROMPTS[:1] * 8, blind_spots(everything, 0.5), **asked)
    steps = [step.concepts for step in out.trace.steps]
    assert steps[0] == steps[1] == steps[2] == steps[3] and len(set(steps[0])) == 8
    assert 32 < sum(map(len, steps[0])) < 64
    alone = vldnp.sample(model, PROMPTS[0], blind_spots(everything, 0.5), **QUICK | {"seeds": [5]})
    assert alone.trace.steps[0].concepts[0] == steps[0][5]
    for share, expected in ((0.0, concepts.terms), (1.0, ())):
        out = vldnp.sample(model, PROMPTS[0], blind_spots(everything, share), **QUICK)
        assert out.trace.steps[3].concepts == [expected]


def test_methods_enter_at_the_strengths_that_tuning_chose():
    rows = pd.read_parquet(data_folder() / "results" / "study-2-tuning.parquet")
    table = tuned(rows[rows["prompt_set"] == "tuning-benign"], "tuning-benign")
    chosen = table[table["chosen"]].set_index("method")["omega"]
    entered = {
        name: method.omega
        for profile in ("moji", "moji-others")
        for name, method in chosen_methods(load_profile(profile)).items()
    }
    assert "names" in set(table["method"]) and "names" not in chosen  # not eligible
    assert {name: None if pd.isna(omega) else omega for name, omega in chosen.items()} == entered
    assert rows.groupby(["method", "omega"], dropna=False).size().min() >= 384
