"""All notebooks under nbmake, one under nbconvert; a file of its own, which runs beside others."""

import subprocess
import sys

import nbformat
import pytest
from papermill.iorw import load_notebook_node
from papermill.parameterize import parameterize_notebook
from test_notebooks import SMALL, SOURCES, assert_clean


@pytest.fixture
def copies(tmp_path, tiny_data):
    """Copies of the notebooks with small parameters, whose profile is that of the tiny world."""
    folder = tmp_path / "notebooks"
    folder.mkdir()
    for source in SOURCES:
        small = {"quick": True} | SMALL.get(source.stem, {})
        notebook = parameterize_notebook(load_notebook_node(str(source)), small)
        nbformat.write(notebook, folder / source.name)
    return folder


@pytest.mark.slow
def test_nbconvert_executes(copies, source=SOURCES[0]):
    subprocess.run(
        [sys.executable, "-m", "jupyter", "nbconvert", "--to", "notebook", "--execute", "--inplace"]
        + [source.name],
        cwd=copies,
        check=True,
        capture_output=True,
    )
    assert_clean(copies / source.name, str(copies))


@pytest.mark.slow
def test_nbmake_passes(copies):
    found = subprocess.run(
        [sys.executable, "-m", "pytest", "--nbmake", "-q", "-p", "no:cacheprovider", "."],
        cwd=copies,
        capture_output=True,
        text=True,
    )
    assert found.returncode == 0, found.stdout[-2000:]
    assert f"{len(SOURCES)} passed" in found.stdout
