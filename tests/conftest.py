"""Settings of the whole suite."""

import os

import pytest
import warm_kernel
from hypothesis import HealthCheck, settings

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before any test imports torch

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
def tiny_data(tmp_path_factory, warm_kernels):
    """The embedded world's names on tiny random models, for this process and its kernels."""
    import tiny_world  # brings torch, which not every file of tests needs

    folder = tiny_world.make(tmp_path_factory.mktemp("world"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLDNP_DATA", str(folder))
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield folder
