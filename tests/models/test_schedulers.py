"""Every scheduler class that diffusers exports: refused in one line, or as the stock pipeline."""

import copy
import inspect
import warnings

import diffusers
import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, PNDMScheduler, SchedulerMixin
from diffusers.utils import DummyObject
from tiny_models import sd3_pipeline

from vldnp.models.backbone import Backbone
from vldnp.models.families import FLOW_STEPPERS, SCHEDULERS, STEPPERS
from vldnp.models.run import Run
from vldnp.sampler import denoise, sample

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # diffusers', of numpy

LATENT = {"clip_sample": False, "thresholding": False, "skip_prk_steps": True}
OWN_WAY = {"SASolverScheduler": {"algorithm_type": "data_prediction"}}
"""Settings that the config of a DPM-Solver cannot hand on."""
SILENT = {"DEISMultistepScheduler", "LCMScheduler", "PNDMScheduler", "TCDScheduler"}
"""They do not say what they take for x̂₀."""
CLASSES = sorted(
    name
    for name, kind in inspect.getmembers(diffusers, inspect.isclass)
    if not isinstance(kind, DummyObject)  # it stands for one that is not installed
    and issubclass(kind, SchedulerMixin)
    and kind is not SchedulerMixin
)
PROMPTS, SEEDS = ["a cat at the pirate cove", "a dog"], [3, 4]


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


def reported_x0(scheduler, pred, t, latents):
    """What the scheduler itself takes for the clean latents."""
    scheduler, generators = copy.deepcopy(scheduler), [torch.Generator(), torch.Generator()]
    if hasattr(scheduler, "convert_model_output"):
        if scheduler.step_index is None:
            scheduler._init_step_index(t)
        return scheduler.convert_model_output(pred, sample=latents)
    accepted = inspect.signature(scheduler.step).parameters
    noise = {"generator": generators} if "generator" in accepted else {}
    return scheduler.step(pred, t, latents, **noise).pred_original_sample


def is_as_stock(model, scheduler, known, steps) -> bool:
    """A known one gives the stock pipeline's latents; another is refused in one line."""
    name, asked = type(scheduler).__name__, {"num_inference_steps": steps, "guidance_scale": 3.0}
    if name.removesuffix("Scheduler") not in known.split():
        with pytest.raises(ValueError, match=f"^{name} .*use one of dpm") as refusal:
            denoise(model, PROMPTS, scheduler=scheduler, **asked)
        assert "\n" not in str(refusal.value)
        return False
    own = sample(model, PROMPTS, seeds=SEEDS, scheduler=scheduler, progress=False, **asked)
    pipe = copy.copy(model.pipe)
    pipe.scheduler = copy.deepcopy(scheduler)
    asked["generator"] = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    stock = pipe(PROMPTS, output_type="latent", **asked).images
    torch.testing.assert_close(own.latents, stock, atol=1e-4, rtol=1e-4)
    return True


@torch.no_grad()
@pytest.mark.parametrize("name", CLASSES)
def test_each_class_is_as_in_the_stock_pipeline_or_refused(model, name):
    scheduler = made(name, model.pipe.scheduler.config)
    if not is_as_stock(model, scheduler, STEPPERS, 7) or name in SILENT:
        return
    run = Run(model, 7, scheduler)
    latents, cond = run.initial_latents(SEEDS), run.encode(PROMPTS)
    generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    for t in run.timesteps:
        pred = run.predict(latents, t, cond)
        expected = reported_x0(run.scheduler, pred, t, latents)
        torch.testing.assert_close(run.x0(pred, t, latents), expected, atol=1e-4, rtol=1e-4)
        latents = run.step(pred, t, latents, generators)


@pytest.mark.parametrize("name", CLASSES)
def test_each_class_with_a_flow_matching_model(sd3, name):
    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
    is_as_stock(sd3, made(name, {} if name.startswith("Flow") else flow), FLOW_STEPPERS, 5)


def test_the_known_classes_exist():
    assert {f"{name}Scheduler" for name in (STEPPERS + " " + FLOW_STEPPERS).split()} <= {*CLASSES}
    assert (len(STEPPERS.split()), len(FLOW_STEPPERS.split())) == (15, 5)


def test_the_names_clip_nothing_whatever_the_pipelines_own_scheduler_does(model):
    pipe, clipping = copy.copy(model.pipe), {"thresholding": True, "clip_sample": True}
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config, **clipping)
    for name in SCHEDULERS:
        scheduler = Run(Backbone(pipe), 3, name).scheduler
        for option in clipping.keys() & inspect.signature(type(scheduler)).parameters.keys():
            assert not scheduler.config[option], name
    with pytest.raises(ValueError, match="thresholding=False"):
        Run(Backbone(pipe), 3)


@pytest.mark.parametrize(
    ("kind", "settings", "advice"),
    [
        (DDIMScheduler, {}, "DDIMScheduler clips .* clip_sample=False"),
        (DDIMScheduler, {"thresholding": True}, "clip_sample=False, thresholding=False"),
        (DPMSolverMultistepScheduler, {"thresholding": True}, r"config, thresholding=False\)"),
        (PNDMScheduler, {}, "PNDMScheduler .*several evaluations.*skip_prk_steps=True"),
    ],
)
def test_what_to_set_instead(model, kind, settings, advice):
    scheduler = kind.from_config(model.pipe.scheduler.config, **settings)
    with pytest.raises(ValueError, match=advice) as refusal:
        denoise(model, PROMPTS, scheduler=scheduler)
    _, call = str(refusal.value).split("use ")
    mended = eval(call, {kind.__name__: kind, "scheduler": scheduler})
    assert Run(model, 3, mended).scheduler.config == mended.config


@pytest.mark.parametrize("kind", [PNDMScheduler, DDIMScheduler])
def test_a_spacing_that_save_pretrained_wrote_out_is_warned_about(model, kind, tmp_path):
    """The published configs have no spacing; DPM-Solver++ then starts at 999."""
    pipe, own = copy.copy(model.pipe), {"clip_sample": False, "skip_prk_steps": True}
    published = {"beta_schedule": "scaled_linear", "steps_offset": 1, **own}
    pipe.scheduler = kind.from_config(published)
    assert Run(Backbone(pipe), 50, "dpm++").timesteps[0] == 999
    pipe.scheduler.save_pretrained(tmp_path)
    pipe.scheduler = kind.from_pretrained(tmp_path)
    message = f"starts at t = 951 by the timestep_spacing of .*{kind.__name__}, 'leading', .* 999"
    with pytest.warns(UserWarning, match=message):
        Run(Backbone(pipe), 50, "dpm++")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        Run(Backbone(pipe), 20)
        pipe.scheduler = kind.from_config({**published, "timestep_spacing": "trailing"})
        Run(Backbone(pipe), 50, "dpm++")  # someone's choice, as SDXL's "leading"


def test_what_does_not_fit(model, sd3):
    solver = DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    with pytest.raises(ValueError, match="not fit Stable Diffusion 1/2.*'flow_prediction'"):
        Run(model, 3, solver)
    with pytest.raises(ValueError, match="not fit Stable Diffusion 3; .*'epsilon'"):
        Run(sd3, 3, DPMSolverMultistepScheduler())
    with pytest.raises(ValueError, match="unknown scheduler 'ddim'.*known are dpm\\+\\+, euler"):
        Run(sd3, 4, "ddim")
    for wrong in (7, DDIMScheduler, object()):
        with pytest.raises(ValueError, match="does not fit Stable Diffusion 1/2; use one of dpm"):
            Run(model, 3, wrong)
