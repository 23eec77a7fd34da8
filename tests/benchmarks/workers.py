"""What workers bring: images a second by two processes with one thread, and by one with two.

    python tests/benchmarks/workers.py [--neighbour]

Both make the same batches with the moji models, in turn, on the same two cores; with
`--neighbour` beside a process that keeps one of them busy. The time counts from the first finished
batch to the last, after all workers have opened their models: a run of hours, not its start.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

CORES = 2
WAYS = {"one process": {}, "two workers": {"workers": 2, "backend": "loky"}}
BUSY = "while True: pass"


def rate(workers: dict, root: Path, batch_size: int, batches: int) -> float:
    """Images a second of VL-DNP in a run folder of its own."""
    from vldnp.study.profile_methods import dynamic, study_of

    from vldnp.models import load
    from vldnp.study.grid import cells, plan_batches
    from vldnp.study.profile import load_profile
    from vldnp.study.run import compute_batch
    from vldnp.study.workers import finished

    profile = load_profile("moji")
    model = load.load(profile.model)
    study = study_of(profile, [dynamic(profile)], max_prompts=batch_size * batches)
    planned = plan_batches(cells(study, model), study)
    planned = [batch for batch in planned if len(batch.cells) == profile.batch_size]
    opening, measured = planned[:CORES], planned[CORES : CORES + batches]
    for _ in finished(compute_batch, model, opening, root, **workers):
        pass  # every worker opens its models
    started = time.perf_counter()
    images = sum(
        len(batch.cells) for batch in finished(compute_batch, model, measured, root, **workers)
    )
    return images / (time.perf_counter() - started)


def child(way: str, batches: int) -> None:
    warnings.simplefilter("ignore")
    import torch

    from vldnp.study.profile import load_profile

    torch.set_num_threads(CORES)
    size = load_profile("moji").batch_size
    with tempfile.TemporaryDirectory() as root:
        print(rate(WAYS[way], Path(root), size, batches))


def measured(way: str, batches: int) -> float:
    command = [sys.executable, __file__, "--child", way, "--batches", str(batches)]
    waiting = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "1000"}  # as vldnp sets them
    environment = os.environ | waiting | {"OMP_NUM_THREADS": str(CORES)}
    ended = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return float(ended.stdout.split()[-1])


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--batches", type=int, default=4, help="of each measurement (%(default)s)")
    options.add_argument("--rounds", type=int, default=3, help="of both in turn (%(default)s)")
    options.add_argument("--neighbour", action="store_true", help="beside a busy process too")
    options.add_argument("--child", choices=WAYS, help=argparse.SUPPRESS)
    options = options.parse_args()
    if options.child:
        return child(options.child, options.batches)
    if hasattr(os, "sched_setaffinity"):  # children stay on these cores too
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:CORES])
    print("neighbour  way           images/s (median)  of one process alone", flush=True)
    alone = None
    for neighbour in (False, True) if options.neighbour else (False,):
        busy = subprocess.Popen([sys.executable, "-c", BUSY]) if neighbour else None
        try:
            speeds = {way: [] for way in WAYS}
            for _ in range(options.rounds):
                for way, found in speeds.items():
                    found.append(measured(way, options.batches))
        finally:
            if busy is not None:
                busy.kill()
                busy.wait()
        for way, found in speeds.items():
            speed = statistics.median(found)
            alone = alone or speed
            beside = "busy" if neighbour else "none"
            print(f"{beside:9}  {way:12} {speed:18.2f} {speed / alone:21.2f}", flush=True)


if __name__ == "__main__":
    main()
