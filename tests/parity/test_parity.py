"""The methods against the numbers of their authors' own scripts, on the same weights.

`authors.npz` and `authors.json` hold what the scripts gave for the model of `formula.py`, in
float64, with the VLM's answers fixed beforehand: VL-DNP at commit 66ab574, SAFREE at b8b2c3f, SLD
at a42923c, CASG at 9281cfe, functions of Perp-Neg and Safe Denoiser at 347c203 and 223415b. The
latents are kept as float32, hence the tolerance.
"""

import json
from itertools import cycle
from pathlib import Path

import formula
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler

import vldnp
from vldnp import guidance
from vldnp.baselines import safe_denoiser
from vldnp.baselines.sld import sld
from vldnp.concepts import load_concepts
from vldnp.models.run import Run
from vldnp.study.profile import load_profile

HERE = Path(__file__).parent
THEIRS = np.load(HERE / "authors.npz")
JOB = json.loads((HERE / "authors.json").read_text(encoding="utf-8"))
SAFETY = (
    "hate, harassment, violence, suffering, humiliation, harm, suicide, sexual, nudity, bodily "
    "fluids, blood, obscene gestures, illegal activity, drug use, theft, vandalism, weapons, child "
    "abuse, brutality, cruelty"
)
CATEGORIES = [
    "hate",
    "harassment",
    "violence, blood, brutality, cruelty",
    "self-harm, suicide",
    "sexual, nudity, bodily fluids, obscene gestures",
    "shocking images, suffering, humiliation, harm",
    "illegal activity, drug use, theft, vandalism, weapons, child abuse",
]
BEACH = "a naked woman lying on the beach, photo"


PAPER = {method["kind"]: method["given"] for method in load_profile("paper").methods[:3]}
PHRASES = PAPER["Static"]["negative_prompt"]  # seventeen


@pytest.fixture(scope="module")
def model():
    return vldnp.Backbone(formula.pipeline(), name="parity")


def close(ours, name: str):
    theirs = THEIRS[name]
    assert np.abs(np.asarray(ours) - theirs).max() <= 1e-6 * np.abs(theirs).max()


def steps(model, method):
    how = {"seeds": JOB["seeds"], "guidance_scale": JOB["guidance"], "scheduler": "dpm++"}
    how |= {"num_inference_steps": JOB["steps"], "height": JOB["size"], "width": JOB["size"]}
    return list(vldnp.denoise(model, JOB["prompts"], method, **how))


def latents(found) -> np.ndarray:
    return np.stack([step.latents.numpy() for step in found], 1)


def test_vl_dnp(model):
    """At all steps, with both images in one batch; theirs are generated one by one."""
    rounds = zip(*(cycle(answers) for answers in JOB["answers"]), strict=True)
    how = {**PAPER["VLDNP"], "omega": JOB["omega"], "query_steps": JOB["queries"]}
    found = steps(model, vldnp.VLDNP(lambda images, question: next(rounds), "nudity", **how))
    close(latents(found), "dyn_latents")
    queried = [step for step in found if step.queried]
    close(np.stack([s.x0.numpy() for s in queried], 1).reshape(-1, 4, 8, 8), "dyn_x0")
    said = [step.negative_prompts[k] for k in range(2) for step in queried]
    assert [prompt for prompt in said if prompt] == JOB["neg"]
    shown = np.stack([np.asarray(step.x0_images[0]) for step in queried][:4]).astype(int)
    apart = shown - THEIRS["dyn_vlm_pictures"]  # they truncate, we round
    assert set(np.unique(apart)) == {0, 1}


def test_static(model):
    close(latents(steps(model, vldnp.Static(PHRASES, JOB["omega"]))), "static_latents")


@pytest.mark.parametrize(("answer", "negative"), JOB["read"])
def test_the_official_reading(answer, negative):
    """Their search also finds the terms capitalised; it reads a refusal as nothing found."""
    concepts = load_concepts("nudity", "official")
    assert concepts.negative_prompt(concepts.parse(answer)) == negative


def test_safree_as_released(model):
    space = PHRASES.split(", ")
    how = {"negative_prompt": ", ".join(space), "re_attention": False, "upper": 50.0}
    method = vldnp.SAFREE(space, **how)
    (found,) = method.conditioning.filtered(Run(model, 10, "dpm++", 64, 64), [BEACH])
    assert found.beta == pytest.approx(float(THEIRS["safree_beta"]), abs=1e-9)
    assert found.last_step == int(THEIRS["safree_last"])
    assert (found.triggers.nonzero().flatten() + 1).tolist() == THEIRS["safree_triggers"].tolist()
    close(found.embeds[:12], "safree_embeds")
    how = {"seeds": [42], "num_inference_steps": 10, "scheduler": "dpm++"}
    close(
        latents(vldnp.denoise(model, BEACH, method, **how, height=64, width=64))[0],
        "safree_latents",
    )


@pytest.mark.parametrize("name", ["sld_weak", "sld_medium", "sld_strong", "sld_max", "casg"])
def test_sld_and_casg(model, name):
    scheduler = DDIMScheduler.from_config(model.pipe.scheduler.config, clip_sample=False)
    method = vldnp.SLD(SAFETY, name[4:]) if name != "casg" else None
    method = method or vldnp.CASG(CATEGORIES, rule=sld("medium"))
    how = {"seeds": [7], "height": 64, "width": 64, "scheduler": scheduler}
    found = latents(vldnp.denoise(model, BEACH, method, **how))[0]
    close(found[THEIRS["keep"]], "casg_sld_medium" if name == "casg" else name)


def test_perp_neg():
    u, c, n = (torch.from_numpy(THEIRS[f"perp_{k}"]).double() for k in "ucn")
    close(guidance.perp_neg(u, c, n, 7.5, 7.5 * 1.5), "perp_out")  # their weight is −1.5


def test_safe_denoiser():
    """Their kernel has the distance itself: ours at σ = 3.15 / d^¼, d the latents' dimensions."""
    bank, x0 = (torch.from_numpy(THEIRS[f"sd_{k}"]).double() for k in ("bank", "x0"))
    sigma = 3.15 / x0.numel() ** 0.25
    log_k = safe_denoiser.log_kernel(x0, bank, sigma, safe_denoiser.KERNELS["laplacian"])
    close(safe_denoiser.unsafe_mean(log_k, bank), "sd_mean")
