"""OpenMP waits without spinning for long wherever PyTorch starts."""

import os
import subprocess
import sys

import pytest

STARTS = {
    "package": "import vldnp; assert 'torch' not in sys.modules; vldnp.sample",
    "training": "import moji.__main__",
    "commands": "import vldnp.__main__",
}
SEEN = """
import os, sys
class Spy:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            print(*map(os.environ.get, ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")))
            sys.exit()
sys.meta_path.insert(0, Spy())
"""


def policy(code: str, **own: str) -> str:
    """What torch finds, when `code` first asks for it, in an environment that says no more."""
    waiting = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
    environment = {k: v for k, v in os.environ.items() if k not in waiting} | own
    command = [sys.executable, "-c", f"{SEEN}\n{code}\nimport torch"]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return ended.stdout.strip()


@pytest.mark.parametrize("start", STARTS)
def test_torch_finds_the_passive_policy(start):
    assert policy(STARTS[start]) == "PASSIVE 1000"


def test_a_users_own_policy_stays():
    assert policy(STARTS["package"], OMP_WAIT_POLICY="ACTIVE") == "ACTIVE None"
    assert policy(STARTS["package"], GOMP_SPINCOUNT="7") == "PASSIVE 7"
