"""OpenMP waits without spinning wherever PyTorch starts."""

import os
import re
import subprocess
import sys

import pytest

STARTS = {
    "package": "import vldnp; assert 'torch' not in sys.modules; vldnp.sample",
    "training": "import vldnp.moji.__main__",
    "commands": "import vldnp.__main__",
}
SEEN = """
import os, sys
class Spy:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            print("torch finds", os.environ.get("OMP_WAIT_POLICY"))
            sys.exit()
sys.meta_path.insert(0, Spy())
"""


def policy(code: str, **own: str) -> str:
    """What torch finds, when `code` first asks for it, in an environment that says no more."""
    environment = {k: v for k, v in os.environ.items() if k != "OMP_WAIT_POLICY"} | own
    command = [sys.executable, "-c", f"{SEEN}\n{code}\nimport torch"]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return ended.stdout.strip()


@pytest.mark.parametrize("start", STARTS)
def test_torch_finds_the_passive_policy(start):
    assert policy(STARTS[start]) == "torch finds PASSIVE"


def test_a_users_own_policy_stays():
    assert policy(STARTS["package"], OMP_WAIT_POLICY="ACTIVE") == "torch finds ACTIVE"


def test_gnu_openmp_does_not_spin():
    """By its own report, which it writes when torch loads it."""
    environment = {k: v for k, v in os.environ.items() if k != "OMP_WAIT_POLICY"}
    environment["OMP_DISPLAY_ENV"] = "verbose"
    command = [sys.executable, "-c", "import vldnp, torch"]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    spins = re.findall(r"GOMP_SPINCOUNT = '(\d+)'", ended.stderr)
    if not spins:
        pytest.skip("this PyTorch was not built with GNU OpenMP")
    assert set(spins) == {"0"}
