"""Every scheduler class that diffusers exports: refused in one line, or it paints as it should."""

import copy
import inspect

import diffusers
import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, PNDMScheduler, SchedulerMixin
from diffusers.utils import DummyObject
from tiny import sd_pipeline
from tiny_models import sd3_pipeline

from vldnp.models.backbone import Backbone
from vldnp.models.families import SCHEDULERS
from vldnp.models.run import Run
from vldnp.sampler import denoise, sample

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # diffusers', of numpy

LATENT = {"clip_sample": False, "thresholding": False, "skip_prk_steps": True}
OWN_WAY = {"SASolverScheduler": {"algorithm_type": "data_prediction"}}
"""Settings that the config of a DPM-Solver cannot hand on."""
PAINTERS = {
    *("DDIMParallelScheduler", "DDIMScheduler", "DDPMParallelScheduler", "DDPMScheduler"),
    *("DEISMultistepScheduler", "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler"),
    *("EulerAncestralDiscreteScheduler", "EulerDiscreteScheduler", "LCMScheduler"),
    *("LMSDiscreteScheduler", "PNDMScheduler", "SASolverScheduler", "TCDScheduler"),
    "UniPCMultistepScheduler",
}
FLOW_PAINTERS = {
    *("DEISMultistepScheduler", "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler"),
    *("FlowMatchEulerDiscreteScheduler", "UniPCMultistepScheduler"),
}
CLASSES = sorted(
    name
    for name, kind in inspect.getmembers(diffusers, inspect.isclass)
    if not isinstance(kind, DummyObject)  # it stands for one that is not installed
    and issubclass(kind, SchedulerMixin)
    and kind is not SchedulerMixin
)
PROMPTS, SEEDS = ["a cat at the pirate cove", "a dog"], [3, 4]


@pytest.fixture(scope="module")
def sd():
    return Backbone(sd_pipeline())


@pytest.fixture(scope="module")
def sd3():
    return Backbone(sd3_pipeline())


def made(name, config, **settings):
    """One with the model's noise schedule; a bare object where it takes more than that."""
    kind = getattr(diffusers, name)
    try:
        return kind.from_config(config, **LATENT, **OWN_WAY.get(name, {}), **settings)
    except (TypeError, ValueError):
        return kind.__new__(kind)


def stock(pipe, scheduler, **asked):
    pipe = copy.copy(pipe)
    pipe.scheduler = copy.deepcopy(scheduler)
    generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    return pipe(PROMPTS, generator=generators, output_type="latent", **asked).images


def reported_x0(scheduler, pred, t, latents):
    """What the scheduler itself takes for the clean latents; None where it does not say."""
    scheduler, generators = copy.deepcopy(scheduler), [torch.Generator(), torch.Generator()]
    if hasattr(scheduler, "convert_model_output"):
        if scheduler.step_index is None:
            scheduler._init_step_index(t)
        if scheduler.config.get("algorithm_type") == "deis":  # it converts to ε
            return None
        return scheduler.convert_model_output(pred, sample=latents)
    accepted = inspect.signature(scheduler.step).parameters
    noise = {"generator": generators} if "generator" in accepted else {}
    return scheduler.step(pred, t, latents, **noise).get("pred_original_sample")


REPORTED = PAINTERS - {"DEISMultistepScheduler", "LCMScheduler", "PNDMScheduler", "TCDScheduler"}


def paints_as_stock(model, scheduler, paints, steps) -> bool:
    """What paints, paints as the stock pipeline; what does not is refused in one line."""
    name, asked = type(scheduler).__name__, {"num_inference_steps": steps, "guidance_scale": 3.0}
    if paints:
        own = sample(model, PROMPTS, seeds=SEEDS, scheduler=scheduler, progress=False, **asked)
        expected = stock(model.pipe, scheduler, **asked)
        torch.testing.assert_close(own.latents, expected, atol=1e-4, rtol=1e-4)
    else:
        with pytest.raises(ValueError, match=f"^{name} .*use one of dpm") as refusal:
            denoise(model, PROMPTS, scheduler=scheduler, **asked)
        assert "\n" not in str(refusal.value)
    return paints


@torch.no_grad()
@pytest.mark.parametrize("name", CLASSES)
def test_each_class_paints_as_the_stock_pipeline_or_is_refused(sd, name):
    scheduler = made(name, sd.pipe.scheduler.config)
    if not paints_as_stock(sd, scheduler, name in PAINTERS, 7):
        return

    run = Run(sd, 7, scheduler)
    latents, cond = run.initial_latents(SEEDS), run.encode(PROMPTS)
    generators, seen = [torch.Generator().manual_seed(seed) for seed in SEEDS], 0
    for t in run.timesteps:
        pred = run.predict(latents, t, cond)
        expected = reported_x0(run.scheduler, pred, t, latents)
        if expected is not None:
            torch.testing.assert_close(run.x0(pred, t, latents), expected, atol=1e-4, rtol=1e-4)
            seen += 1
        latents = run.step(pred, t, latents, generators)
    assert seen == (len(run.timesteps) if name in REPORTED else 0)


@pytest.mark.parametrize("name", CLASSES)
def test_each_class_with_a_flow_matching_model(sd3, name):
    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
    scheduler = made(name, {} if name.startswith("Flow") else flow)
    paints_as_stock(sd3, scheduler, name in FLOW_PAINTERS, 5)


def test_the_names_clip_nothing_whatever_the_pipelines_own_scheduler_does(sd):
    pipe = copy.copy(sd.pipe)
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(
        pipe.scheduler.config, thresholding=True, clip_sample=True
    )
    for name in SCHEDULERS:
        scheduler = Run(Backbone(pipe), 3, name).scheduler
        for option in {"thresholding", "clip_sample"} & inspect.signature(
            type(scheduler)
        ).parameters.keys():
            assert not scheduler.config[option], name
    with pytest.raises(ValueError, match="thresholding=False"):
        Run(Backbone(pipe), 3)


@pytest.mark.parametrize(
    ("kind", "settings", "advice"),
    [
        (DDIMScheduler, {}, "DDIMScheduler clips .* clip_sample=False"),
        (DDIMScheduler, {"thresholding": True}, "clip_sample=False, thresholding=False"),
        (
            DPMSolverMultistepScheduler,
            {"thresholding": True},
            r"DPMSolverMultistepScheduler clips .*config, thresholding=False\)",
        ),
        (PNDMScheduler, {}, "PNDMScheduler .*several evaluations.*skip_prk_steps=True"),
    ],
)
def test_what_to_set_instead(sd, kind, settings, advice):
    scheduler = kind.from_config(sd.pipe.scheduler.config, **settings)
    with pytest.raises(ValueError, match=advice) as refusal:
        denoise(sd, PROMPTS, scheduler=scheduler)
    line = str(refusal.value)
    assert "\n" not in line
    _, call = line.split("use ")
    mended = eval(call, {kind.__name__: kind, "scheduler": scheduler})
    assert Run(sd, 3, mended).scheduler.config == mended.config


def test_a_prediction_type_that_is_not_the_familys(sd, sd3):
    solver = DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    with pytest.raises(ValueError, match="'flow_prediction' does not fit Stable Diffusion 1/2"):
        Run(sd, 3, solver)
    with pytest.raises(ValueError, match="'epsilon' does not fit Stable Diffusion 3; .*flow_pred"):
        Run(sd3, 3, DPMSolverMultistepScheduler())


@pytest.mark.parametrize("wrong", [7, None.__class__, DDIMScheduler, object()])
def test_what_is_no_scheduler(sd, wrong):
    with pytest.raises(ValueError, match="does not fit Stable Diffusion 1/2; use one of dpm"):
        Run(sd, 3, wrong)
