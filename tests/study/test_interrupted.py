"""A reproduction that is killed, and killed again, ends in the same table."""

import random
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import psutil
import pytest
import tiny_world

ROOT = Path(__file__).parents[2]
REPRODUCE = """
import sys
from pathlib import Path
from vldnp import __main__ as cli

cli.NOTEBOOKS = Path(sys.argv[1])
sys.exit(cli.main(["reproduce", "--profile", "tiny", "--quick", "--out", sys.argv[2]]))
"""


@pytest.fixture
def start(tmp_path, monkeypatch):
    """A function that starts a reproduction of 07_table, which runs all methods, in a folder."""
    monkeypatch.setenv("VLDNP_DATA", str(tiny_world.make(tmp_path / "world")))
    notebooks = tmp_path / "notebooks"
    notebooks.mkdir()
    (notebooks / "07_table.ipynb").write_bytes((ROOT / "notebooks/07_table.ipynb").read_bytes())
    started = []

    def begin(out: str) -> psutil.Popen:
        command = [sys.executable, "-c", REPRODUCE, str(notebooks), str(tmp_path / out)]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        started.append(psutil.Popen(command, **quiet))
        return started[-1]

    yield begin
    for process in started:
        if process.is_running():
            kill(process)


def kill(process: psutil.Popen) -> None:
    """With its kernel, which is a process of its own, and without a word of warning."""
    for one in [*process.children(recursive=True), process]:
        one.kill()
    process.wait()


def cells(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (folder / "cells").glob("*.png")}


def numbers(folder: Path, name: str) -> pd.DataFrame:
    """A table without what differs from run to run."""
    return pd.read_csv(folder / name).drop(columns="seconds", errors="ignore")


@pytest.mark.slow
def test_three_kills_at_random_do_not_change_a_number(start, tmp_path):
    assert start("whole").wait() == 0
    whole, broken = tmp_path / "whole/tiny-quick", tmp_path / "broken/tiny-quick"
    moments = sorted(random.Random(20251).sample(range(1, len(cells(whole)) - 1), 3))
    for moment in moments:
        process = start("broken")
        while process.is_running() and len(list((broken / "cells").glob("*.png"))) < moment:
            time.sleep(0.01)
        assert process.poll() is None, "it ended before it was killed"
        kill(process)
    assert len(cells(broken)) < len(cells(whole))
    assert start("broken").wait() == 0
    for name in ("table.csv", "verdicts.csv"):
        pd.testing.assert_frame_equal(numbers(broken, name), numbers(whole, name))
    assert cells(broken) == cells(whole)
