"""What a busy neighbour costs: U-Net evaluations a second, alone and beside another process.

    python tests/benchmarks/contention.py

GNU OpenMP's threads wait by spinning unless `OMP_WAIT_POLICY=PASSIVE` says otherwise. Where two
processes share the cores, a spinning thread keeps the one that it waits for from running; where a
process is alone, threads that never spin have to be woken up all the time. `hardly` is between the
two, and what `import vldnp` sets. All processes here have two threads and are kept on the same two
cores.
"""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

THREADS = 2
IMAGES = 8
UNET = Path(__file__).parents[2] / "data" / "models" / "moji-sd" / "unet"
POLICIES = {
    "hardly": {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "1000"},
    "never": {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0"},
    "default": {},
}
"""How long threads spin → the variables that say so."""


def evaluations(seconds: float) -> Iterator[float]:
    """U-Net evaluations a second, image by image, in one span of `seconds` after another."""
    import torch  # here and not above: the parent needs no torch
    from diffusers import UNet2DConditionModel

    network = UNet2DConditionModel.from_pretrained(UNET, torch_dtype=torch.float32).eval()
    size, width = network.config.sample_size, network.config.cross_attention_dim
    latents = torch.zeros(IMAGES, network.config.in_channels, size, size)
    prompt = torch.zeros(IMAGES, 32, width)
    with torch.inference_mode():
        network(latents, 500, prompt)
        while True:
            start, count = time.perf_counter(), 0
            while time.perf_counter() < start + seconds:
                network(latents, 500, prompt)
                count += IMAGES
            yield count / (time.perf_counter() - start)


@contextmanager
def process(policy: str, seconds: float):
    """A child with that policy that prints `evaluations` line by line; it ends with the block."""
    unset = {k: v for k, v in os.environ.items() if k not in POLICIES["hardly"]}
    environment = unset | {"OMP_NUM_THREADS": str(THREADS)} | POLICIES[policy]
    command = [sys.executable, __file__, "--child", "--seconds", str(seconds)]
    child = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    try:
        yield child
    finally:
        child.kill()
        child.wait()
        child.stdout.close()


def measured(policy: str, seconds: float) -> float:
    """The first span's evaluations a second of a new process."""
    with process(policy, seconds) as child:
        return float(child.stdout.readline())


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--seconds", type=float, default=8, help="of each measurement")
    options.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = options.parse_args()
    if options.child:
        for speed in evaluations(options.seconds):
            print(speed, flush=True)
    if hasattr(os, "sched_setaffinity"):  # children stay on these cores too
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:THREADS])
    print("this process  neighbour  evaluations/s  of undisturbed")
    for own in POLICIES:
        alone = measured(own, options.seconds)
        print(f"{own:13} {'none':9} {alone:14.1f}            1.00")
        for theirs in POLICIES:
            with process(theirs, 0.1) as neighbour:
                neighbour.stdout.readline()  # it is at work
                speed = measured(own, options.seconds)
            print(f"{own:13} {theirs:9} {speed:14.1f} {speed / alone:15.2f}", flush=True)


if __name__ == "__main__":
    main()
