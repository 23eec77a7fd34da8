"""The notebooks: a question, parameters, what is studied, an answer; each runs alone."""

import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pandas as pd
import papermill
import pytest
from nbconvert import HTMLExporter

from vldnp.__main__ import reproduce

ROOT = Path(__file__).parents[2]
SOURCES = sorted((ROOT / "notebooks").glob("*.ipynb"))
PARAMETER = re.compile(r"\w+: (str|bool|int|float|list) = .+  # \w.+")
NAMES = "quickstart trajectories findings omega queries vlm rules cost explorer report".split()

each = pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)


def cells(source: Path, kind: str):
    return [cell for cell in nbformat.read(source, 4).cells if cell.cell_type == kind]


def outputs(source: Path):
    return [output for cell in cells(source, "code") for output in cell.outputs]


def test_the_notebooks_are_there():
    assert [path.stem for path in SOURCES] == [f"{k:02}_{name}" for k, name in enumerate(NAMES)]


@each
def test_question_parameters_and_what_is_studied(source):
    first, second = nbformat.read(source, 4).cells[:2]
    assert re.match(r"# .*\?", first.source)
    assert "parameters" in second.metadata.get("tags", [])
    assert "## What is studied" in "\n".join(cell.source for cell in cells(source, "markdown"))
    for line in second.source.splitlines():
        assert PARAMETER.fullmatch(line), line
    inferred = papermill.inspect_notebook(source)
    assert len(inferred) == len(second.source.splitlines())
    assert all(p["help"] and p["inferred_type_name"] != "None" for p in inferred.values())


@each
def test_committed_outputs(source):
    for cell in cells(source, "code"):
        assert cell.execution_count, "the committed notebook must show a run"
    assert_clean(source)
    assert "papermill" not in nbformat.read(source, 4).metadata
    assert source.stat().st_size < 2_500_000


def assert_clean(source: Path, *forbidden: str):
    """No error and no absolute path in what a notebook shows."""
    shown = outputs(source)
    assert not [o for o in shown if o.output_type == "error"], shown
    said = [o["text"] for o in shown if o.get("name") == "stderr"]
    assert not [text for text in said if "longer than the text encoder's 16" not in text]  # tiny
    values = (value for output in shown for value in output.get("data", {}).items())
    text = "\n".join(str(value) for kind, value in values if kind.startswith("text/"))
    for path in (str(ROOT), str(Path.home()) + "/", sys.prefix, *forbidden):
        assert path not in text


SMALL = {
    "00_quickstart": {"images": 2},
    "01_trajectories": {"prompt": "a <b>cat", "seed": 3, "schedule": "uniform", "queries": 2},
    "03_omega": {"omegas": [2.0], "max_prompts": 2},
    "04_queries": {"counts": [0, 1], "max_prompts": 2},
    "05_vlm": {"max_prompts": 2},
    "06_rules": {"max_prompts": 2},
    "07_cost": {"images": 2, "repetitions": 1},
}


SCRIPT = "<script>alert(1)</script>"


@pytest.mark.slow
@each
def test_runs_alone(source, tiny_data, tmp_path):
    folder = tmp_path / source.stem
    folder.mkdir()
    (folder / source.name).write_bytes(source.read_bytes())
    given = SMALL.get(source.stem, {})
    if source.stem == "09_report":
        one = tmp_path / "02_findings"
        one.mkdir()
        (one / "02_findings.ipynb").write_bytes(SOURCES[2].read_bytes())
        reproduce("tiny", tmp_path / "runs", quick=True, notebooks=one)
        given, table = {"run": "../runs/tiny-quick"}, tmp_path / "runs/tiny-quick/images.parquet"
        rows = pd.read_parquet(table).assign(prompt=SCRIPT)
        for column, name in (("method", "static"), ("prompt_set", "implicit")):
            rows[column] = rows[column].replace(name, SCRIPT)
        rows.to_parquet(table)
    (executed,) = reproduce(
        "tiny", tmp_path / "runs", quick=True, parameters=given, notebooks=folder
    )
    assert_clean(executed, str(tmp_path), str(tiny_data))
    kinds = {kind for output in outputs(executed) for kind in output.get("data", {})}
    assert kinds & {"image/png", "text/html"}
    page, _ = HTMLExporter(exclude_input=True).from_filename(str(executed))
    assert SCRIPT not in page and ("&lt;script&gt;alert" in page) == (source.stem == "09_report")
    if source.stem == "01_trajectories":
        shown = (output.get("data", {}).get("text/html", "") for output in outputs(executed))
        assert "<b>cat" not in "".join(shown)


@pytest.mark.slow
def test_help_of_a_notebook_lists_its_parameters():
    command = [sys.executable, "-m", "papermill", "--help-notebook", SOURCES[0]]
    found = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "prompt: str" in found and "names nothing restricted" in found
