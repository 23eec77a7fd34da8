"""All notebooks under nbmake and nbconvert; a file of its own, which runs beside others."""

import subprocess
import sys

import nbformat
import pytest
from papermill.iorw import load_notebook_node
from papermill.parameterize import parameterize_notebook
from test_notebooks import SMALL, SOURCES, assert_clean, cells


@pytest.fixture
def copies(tmp_path, tiny_data):
    """Copies of the notebooks with small parameters, whose profile is that of the tiny world."""
    folder = tmp_path / "notebooks"
    folder.mkdir()
    for source in SOURCES:
        small = {"quick": True} | SMALL.get(source.stem, {})
        if source.stem in ("02_omega", "03_pareto"):  # their studies are other than that of 07
            small["out"] = f"../runs/{source.stem}"
        notebook = parameterize_notebook(load_notebook_node(str(source)), small)
        nbformat.write(notebook, folder / source.name)
    return folder


@pytest.mark.slow
def test_nbmake_passes_and_nbconvert_executes(copies):
    """The second finds the pictures of the first in the run folder."""
    nbmake = [sys.executable, "-m", "pytest", "--nbmake", "-q", "-p", "no:cacheprovider", "."]
    found = subprocess.run(nbmake, cwd=copies, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout[-2000:]
    assert f"{len(SOURCES)} passed" in found.stdout

    names = [source.name for source in SOURCES]
    nbconvert = "-m jupyter nbconvert --to notebook --execute --inplace".split()
    found = subprocess.run(
        [sys.executable, *nbconvert, *names], cwd=copies, capture_output=True, text=True
    )
    assert found.returncode == 0, found.stderr[-2000:]
    for name in names:
        assert all(cell.execution_count for cell in cells(copies / name, "code"))
        assert_clean(copies / name, str(copies))
