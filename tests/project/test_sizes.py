"""Sizes are bounds: what cannot be had within them is left out."""

import ast
import json
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BOUNDS = {"vldnp": 7_000, "moji": 3_700, "tests/": 12_000}  # lines
METHOD = "sampler guider guidance negatives schedules concepts methods".split()
MODULES = [*(ROOT / "vldnp").rglob("*.py"), *(ROOT / "moji").rglob("*.py")]


def lines(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


@pytest.mark.parametrize("folder", BOUNDS)
def test_packages(folder):
    listed = subprocess.run(
        ["git", "ls-files", folder], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    texts = {".py", ".pyi", ".html", ".css", ".js", ".svg"}
    files = [ROOT / name for name in listed if Path(name).suffix in texts]
    total = sum(lines(path) for path in files if path.is_file())
    assert 0 < total <= BOUNDS[folder]


def test_the_method():
    assert sum(lines(ROOT / "vldnp" / f"{name}.py") for name in METHOD) <= 900


def test_modules_and_functions():
    for path in MODULES:
        assert lines(path) <= 300, path
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert node.end_lineno - node.lineno + 1 <= 60, (path, node.name)


def test_notebooks():
    total = 0
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
        assert max(len(cell.splitlines()) for cell in code) <= 25, path
        total += sum(len(cell.splitlines()) for cell in code)
    assert total <= 900
