"""The sampler's latents and negative prompts are those of version 2 (commit 3e5d5bc).

`identical.npz` and `identical.json` were written once, by that version, with one thread. On a CPU
with the same kernels the latents are equal bit for bit; `fingerprint` tells. Elsewhere float32
rounds differently, guidance amplifies the difference, and the median stays below 1e-4.
"""

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny_models
import torch

import vldnp
from vldnp.baselines.controls import Judged, closed_loop
from vldnp.baselines.nag import NAG
from vldnp.baselines.sld import sld
from vldnp.levers import adaptive, gate, preview, window

HERE = Path(__file__).parent
PROMPTS = (
    "a cat at the pirate cove",
    "a dog in the park",
    "a pizza in the tavern",
    "a cat and a hat in the graveyard",
)
CATEGORIES = "a weapon, something bloody, a drug"
STEPS = 25


def moji_vlm():
    return vldnp.load_vlm("moji-vlm-l", answers="free")


def vl_dnp(omega=25.0, query_steps=None, **options):
    return vldnp.VLDNP(moji_vlm(), "moji", omega, query_steps or vldnp.uniform(10), **options)


def nag(method):
    return replace(method, name="nag")


def bank():
    unsafe = torch.randn(8, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    return vldnp.Repelled(unsafe, strength=2.0, sigma=3.15, until=0.5, kernel="laplacian")


def closed():
    judged = Judged(vldnp.load_judge("moji-judge"))
    return closed_loop(vldnp.VLDNP(judged, "moji", 25.0, vldnp.uniform(4)))


def safree(*phrases, **options):
    return vldnp.SAFREE(CATEGORIES, *phrases, **options)


FORBIDDEN = "something forbidden"
METHODS = {  # name → (method, sampling options)
    "cfg": lambda: (vldnp.CFG(), {}),
    **{
        f"static {rule}": lambda rule=rule: (vldnp.Static(FORBIDDEN, 8.0, rule), {})
        for rule in ("added", "replaced", "composable-not", "perp-neg")
    },
    "vl-dnp": lambda: (vl_dnp(), {}),
    "vl-dnp accumulated": lambda: (
        vl_dnp(15.0, vldnp.front_loaded(5), update_policy="accumulated"),
        {},
    ),
    "vl-dnp every step, ddim": lambda: (vl_dnp(8.0, range(STEPS)), {"scheduler": "ddim"}),
    "vl-dnp euler, g per image": lambda: (
        vl_dnp(8.0),
        {"scheduler": "euler", "guidance_scale": [1.0, 3.0, 5.0, 1.0]},
    ),
    "vl-dnp perp-neg": lambda: (vl_dnp(rule="perp-neg"), {}),
    "safree": lambda: (safree(alpha=0.015, upper=20.0), {}),
    "safree added": lambda: (safree(FORBIDDEN, "added", 30.0, alpha=0.015, upper=20.0), {}),
    "safree replaced": lambda: (safree(CATEGORIES, "replaced"), {}),
    "sld medium": lambda: (vldnp.SLD(CATEGORIES, "medium"), {}),
    "sld max": lambda: (vldnp.SLD(CATEGORIES, "max"), {}),
    "summed": lambda: (vldnp.Summed(CATEGORIES.split(", "), 9.3), {}),
    "casg": lambda: (vldnp.CASG(CATEGORIES.split(", "), omega=8.4), {}),
    "casg sld": lambda: (vldnp.CASG(CATEGORIES.split(", "), rule=sld("max")), {}),
    "nag": lambda: (nag(vldnp.Static(CATEGORIES, 10.0, NAG(alpha=0.5))), {}),
    "nag g=1": lambda: (
        nag(vldnp.Static(CATEGORIES, 10.0, NAG(alpha=0.5))),
        {"guidance_scale": 1.0},
    ),
    "vl-dnp nag": lambda: (vl_dnp(10.0, rule=NAG()), {}),
    "safe denoiser": lambda: (bank(), {}),
    "preview": lambda: (preview(vl_dnp(), vldnp.load_preview("moji-taesd")), {}),
    "window stop": lambda: (window(vl_dnp(), stop=0.5), {}),
    "window start": lambda: (window(vl_dnp(), start=0.5), {}),
    "adaptive": lambda: (adaptive(vl_dnp(), 0.48), {}),
    "cfg adaptive": lambda: (adaptive(vldnp.CFG(), 0.48), {}),
    "gate": lambda: (gate(vl_dnp(), 0.98), {}),
    "closed loop": lambda: (closed(), {}),
}


class Scripted:
    """Finds other things at each query, whatever the images show."""

    answers = (["knife", "none", "blood"], ["none", "skull", "knife, dagger"], ["blood"] * 3)

    def __init__(self):
        self.calls = 0

    def __call__(self, images, question):
        self.calls += 1
        return self.answers[(self.calls - 1) % 3]


FAMILIES = ("sd-1", "sd-1-v", "sd-2", "sdxl", "sd-3", "flux")
FAMILY_METHODS = {
    "cfg": vldnp.CFG,
    "static": lambda: vldnp.Static("a knife", 4.0),
    "vl-dnp": lambda: vldnp.VLDNP(Scripted(), "moji", 4.0, [1, 3, 5]),
}
CASES = [*METHODS, *(f"{family} {name}" for family in FAMILIES for name in FAMILY_METHODS)]


def sampled(case: str) -> tuple[np.ndarray, list[list[str | None]]]:
    """The final latents as float32, and the negative prompts of each step."""
    if case in METHODS:
        method, options = METHODS[case]()
        model, prompts, steps = vldnp.load("moji-sd"), PROMPTS, STEPS
    else:
        family, _, name = case.rpartition(" ")
        model, method, options = tiny_models.PIPELINES[family](), FAMILY_METHODS[name](), {}
        prompts, steps = ("a cat", "a dog and a skull", "a pizza at the cove"), 8
    options = {"guidance_scale": 3.0, "num_inference_steps": steps, "progress": False} | options
    out = vldnp.sample(model, prompts, method, **options)
    return out.latents.float().numpy(), [step.negative_prompts for step in out.trace.steps]


def fingerprint() -> str:
    """Of a convolution, a product and an exponential, whose rounding depends on the kernels."""
    generator = torch.Generator().manual_seed(0)
    x, w = (torch.randn(s, generator=generator) for s in ((2, 32, 16, 16), (64, 32, 3, 3)))
    y = torch.conv2d(x, w, padding=1).softmax(1)
    z = (y.flatten(2).transpose(1, 2) @ y.flatten(2)).exp()
    return hashlib.sha256(z.numpy().tobytes()).hexdigest()


def write() -> None:
    torch.set_num_threads(1)
    found = {case: sampled(case) for case in CASES}
    np.savez_compressed(HERE / "identical.npz", **{case: x for case, (x, _) in found.items()})
    said = {"fingerprint": fingerprint(), "negatives": {c: n for c, (_, n) in found.items()}}
    (HERE / "identical.json").write_text(json.dumps(said, indent=0))


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("case", CASES)
def test_latents_and_negative_prompts_are_those_of_version_2(case):
    known = json.loads((HERE / "identical.json").read_text())
    with np.load(HERE / "identical.npz") as stored:
        expected = stored[case]
    latents, negatives = sampled(case)
    if fingerprint() == known["fingerprint"]:
        np.testing.assert_array_equal(latents, expected)
        assert negatives == known["negatives"][case]
    else:
        assert np.median(np.abs(latents - expected)) < 1e-4
