"""Settings of the whole suite."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import warm_kernel
from hypothesis import HealthCheck, settings

ROOT = Path(__file__).parents[1]

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before any test imports torch
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
# Bits are compared, so all computes on the CPU; with this variable set, as it says.
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

# A busy machine is no failure: properties are tested for what they say, not for how long it takes.
settings.register_profile("steady", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("steady")


def pytest_collection_modifyitems(items):
    """Files with slow tests come first, so that in the end no process is left with one alone."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(scope="session", autouse=True)
def own_jupyter(tmp_path_factory):
    """No test changes what this user's Jupyter trusts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JUPYTER_DATA_DIR", str(tmp_path_factory.mktemp("jupyter")))
        yield


@pytest.fixture(scope="session")
def warm_kernels(tmp_path_factory):
    """Notebooks' kernels start with the large packages imported."""
    with warm_kernel.kernels(tmp_path_factory.mktemp("warm")):
        yield


@pytest.fixture(scope="module")
def model():
    """A tiny Stable Diffusion 1."""
    import tiny

    from vldnp.models.backbone import Backbone

    return Backbone(tiny.sd_pipeline())


@pytest.fixture(scope="module")
def exact():
    """The same in float64, where no threshold is passed by rounding."""
    import tiny
    import torch

    from vldnp.models.backbone import Backbone

    return Backbone(tiny.sd_pipeline().to(dtype=torch.float64))


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory):
    """The Moji benchmark's names on tiny random models, for this process."""
    import tiny_world  # brings torch, which not every file of tests needs

    folder = tiny_world.make(tmp_path_factory.mktemp("world"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLDNP_DATA", str(folder))
        yield folder


@pytest.fixture(scope="module")
def tiny_data(warm_kernels, tiny_folder):
    """The folder of `tiny_folder`, for this process and its kernels."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield tiny_folder


@pytest.fixture(scope="module")
def site_folder(tmp_path_factory):
    """The documentation, as `make docs` builds it."""
    folder = tmp_path_factory.mktemp("site")
    subprocess.run([sys.executable, ROOT / "docs" / "make_site.py", folder], check=True)
    return folder / "docs"


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    """A tiny random CLIP in open_clip's folder format, with open_clip's own tokenizer."""
    import tiny_world
    import torch

    folder = tmp_path_factory.mktemp("clip") / "tiny-clip"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tiny_world.clip(folder)
    return folder
