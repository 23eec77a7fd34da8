"""Runs that are killed, starved, damaged or doubled end in the same pixels and the same tables.

Bounded and seeded; `VLDNP_FAULTS=30` kills more often than the usual six times.
"""

import os
import random
import signal
import time

import pandas as pd
import pytest
import small_run
from tiny import sd_pipeline

from vldnp.methods import CFG
from vldnp.models import load
from vldnp.study.grid import Study, cells, plan_batches

KILLS = int(os.environ.get("VLDNP_FAULTS", "6"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The run folder of an undisturbed run, and how many seconds it took."""
    folder = tmp_path_factory.mktemp("whole")
    for _ in range(2):  # the first one waits for the fork server
        started = time.monotonic()
        finish(small_run.start(folder, "runs"))
        if not (folder / "again").exists():
            (folder / "runs").rename(folder / "again")
    return folder / "runs" / small_run.NAME, time.monotonic() - started


def finish(*processes) -> None:
    for process in processes:
        process.join(600)  # a busy machine takes a while to start workers
        assert process.exitcode == 0


def same(folder, whole) -> bool:
    """Whether two run folders hold the same."""
    for one, other in zip(small_run.tables(folder), small_run.tables(whole), strict=True):
        pd.testing.assert_frame_equal(one, other)
    return small_run.pictures(folder) == small_run.pictures(whole)


@pytest.mark.slow
def test_kills_at_random_moments(whole, tmp_path):
    undisturbed, seconds = whole
    chance = random.Random(20252)
    for _ in range(KILLS):
        process = small_run.start(tmp_path, "runs")
        process.join(chance.uniform(0, seconds))
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
        process.join()
    finish(small_run.start(tmp_path, "runs"))
    assert same(tmp_path / "runs" / small_run.NAME, undisturbed)


@pytest.mark.slow
def test_two_runs_in_one_folder_at_once(whole, tmp_path):
    undisturbed, seconds = whole
    for pair, delay in enumerate((0, random.Random(3).uniform(0, seconds / 2))):
        first = small_run.start(tmp_path, f"runs-{pair}")
        time.sleep(delay)
        finish(first, small_run.start(tmp_path, f"runs-{pair}"))
        assert same(tmp_path / f"runs-{pair}" / small_run.NAME, undisturbed)


@pytest.mark.slow
def test_a_full_disk(whole, tmp_path):
    """At each size, another file is the first that does not fit; nothing half-written stays."""
    undisturbed, _ = whole
    sizes = sorted({path.stat().st_size for path in undisturbed.rglob("*") if path.is_file()})
    folder = tmp_path / "runs" / small_run.NAME
    refused = set()
    # The largest file is a table with times in it: its size differs by bytes from run to run.
    assert sizes[-2] < sizes[-1] // 2
    for limit in (sizes[0] - 1, sizes[len(sizes) // 2], sizes[-1] // 2):
        process = small_run.start(tmp_path, "runs", limit)
        process.join(60)
        assert process.exitcode == 3
        said = (tmp_path / "error.txt").read_text()
        assert said.startswith(f"cannot write {folder}"[:limit]) and len(said.splitlines()) == 1
        refused.add(said)
        assert not [path for path in folder.rglob(".*")]
    assert len(refused) > 1
    finish(small_run.start(tmp_path, "runs"))
    assert same(folder, undisturbed)


@pytest.mark.slow
def test_files_damaged_at_random(whole, tmp_path):
    undisturbed, _ = whole
    finish(small_run.start(tmp_path, "runs"))
    folder, chance = tmp_path / "runs" / small_run.NAME, random.Random(7)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    for path in chance.sample(files, len(files) // 4):
        content = path.read_bytes()
        damages = [b"", content[: len(content) // 2], bytes(len(content)), content[::-1], None]
        damage = chance.choice(damages)
        path.unlink() if damage is None else path.write_bytes(damage)
    finish(small_run.start(tmp_path, "runs"))
    assert same(folder, undisturbed)


@pytest.mark.slow
def test_a_hundred_thousand_prompts(tmp_path):
    """Every one of them is in one batch, in order; none is lost, none comes twice."""
    count = 100_000
    table = tmp_path / "many.csv"
    rows = (f"{i},a cat {i % 50_000},{i % 75_000}\n" for i in range(count))
    table.write_text("prompt_id,prompt,seed\n" + "".join(rows))
    study = Study("many", (CFG(),), (table,))
    grid = cells(study, load.load(sd_pipeline()))
    assert grid["prompt_id"].tolist() == [str(i) for i in range(count)]
    batches = plan_batches(grid, study)
    planned = [key for _, rows, _ in batches for key in rows["key"]]
    assert planned == list(dict.fromkeys(grid["key"]))
    assert {len(rows) for _, rows, _ in batches[:-1]} == {32}
