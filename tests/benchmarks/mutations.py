"""Forty changes of the code that a test must notice, one at a time.

    python tests/benchmarks/mutations.py            # all; about twenty minutes
    python tests/benchmarks/mutations.py guidance   # those whose file or words contain this

Each is a sign, an off-by-one or a dropped condition. A changed copy of the working tree is tested
with the tests named; the mutation is caught when they fail. The exit status says whether all were.
"""

import csv
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
FILE = Path(__file__).with_suffix(".csv")  # file, what is replaced (once), by what, tests
MUTATIONS = list(csv.DictReader(FILE.open(encoding="utf-8")))


def caught(file: str, old: str, new: str, tests: str, copy: Path) -> bool | None:
    """Whether the tests notice the change; None where the text is not there exactly once."""
    source = (ROOT / file).read_text(encoding="utf-8")
    if source.count(old) != 1:
        return None
    (copy / file).write_text(source.replace(old, new), encoding="utf-8")
    paths = [f"tests/{name}" for name in tests.split()]
    command = [sys.executable, *"-m pytest -xq -p no:cacheprovider -m".split(), "not ray", *paths]
    env = os.environ | {"PYTHONPATH": str(copy)}
    run = subprocess.run(command, cwd=copy, capture_output=True, env=env)
    (copy / file).write_text(source, encoding="utf-8")
    return run.returncode == 1


def main() -> int:
    words = sys.argv[1:]
    chosen = [one for one in MUTATIONS if all(word in " ".join(one.values()) for word in words)]
    with tempfile.TemporaryDirectory() as folder:
        copy, missed = Path(folder) / "copy", 0
        left_out = shutil.ignore_patterns(".venv", ".git", "runs", "__pycache__", "results")
        shutil.copytree(ROOT, copy, ignore=left_out, symlinks=True)
        shutil.copytree(ROOT / "data" / "results", copy / "data" / "results")
        for one in chosen:
            said = {True: "caught", False: "MISSED", None: "not applicable"}
            found = caught(**one, copy=copy)
            missed += found is not True
            print(f"{said[found]:14} {one['file']}: {one['old']} → {one['new']}", flush=True)
    print(f"{len(chosen) - missed} of {len(chosen)} caught")
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main())
