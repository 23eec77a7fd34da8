"""Workers and their parent are killed at random: the same pixels, the same tables, no litter.

Bounded and seeded. `VLDNP_FAULTS=50` kills more often than three times.
"""

import os
import random
import time
from pathlib import Path

import psutil
import pytest
import small_run
from test_campaign import finish, same
from tiny import sd_pipeline

KILLS = int(os.environ.get("VLDNP_FAULTS", "3"))

LOST = 8  # a kill comes after so many new images: two workers have then finished a batch of 4


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "small-sd"
    sd_pipeline().save_pretrained(folder)
    return folder


def workers_of(process: psutil.Process) -> list[psutil.Process]:
    found = []
    for child in process.children(recursive=True):
        try:
            named = " ".join(child.cmdline())
        except psutil.Error:  # it has just ended
            continue
        found += [child] if "LokyProcess" in named else []
    return found


@pytest.mark.slow
def test_kills_of_workers_and_of_the_parent(source, tmp_path):
    """The parent every third time, else a worker, in the middle of batches."""
    options = {"source": source, "count": 8 + 6 * KILLS}
    for folder in ("whole", "broken"):
        (tmp_path / folder).mkdir()
    finish(small_run.start(tmp_path / "whole", "runs", **options))
    chance, broken = random.Random(20253), tmp_path / "broken/runs" / small_run.NAME
    options |= {"workers": 2, "backend": "loky"}

    def images() -> int:
        return len(list(broken.glob("cells/*.png")))

    process, killed = None, 0
    while killed < KILLS:
        if process is None:
            process = small_run.start(tmp_path / "broken", "runs", **options)
        enough = images() + chance.randrange(LOST, 2 * LOST)
        while images() < enough and process.is_alive():
            time.sleep(0.01)
        assert process.is_alive(), f"it ended by itself after {killed} kills"
        killed += 1
        if killed % 3 == 2:
            process.kill()
            process.join()
            process = None
        elif found := workers_of(psutil.Process(process.pid)):
            chance.choice(found).kill()
        else:
            raise AssertionError("there are no workers")
    process = process or small_run.start(tmp_path / "broken", "runs", **options)
    process.join(300)
    assert process.exitcode == 0
    assert same(broken, tmp_path / "whole/runs" / small_run.NAME)


@pytest.mark.slow
def test_two_runs_with_workers_in_one_folder_at_once(source, tmp_path):
    (tmp_path / "whole").mkdir()
    finish(small_run.start(tmp_path / "whole", "runs", source=source))
    both = [
        small_run.start(tmp_path, "runs", source=source, workers=2, backend="loky")
        for _ in range(2)
    ]
    finish(*both)
    assert same(tmp_path / "runs" / small_run.NAME, tmp_path / "whole/runs" / small_run.NAME)
