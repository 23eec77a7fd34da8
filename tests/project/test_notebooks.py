"""The notebooks: prose, parameters and calls, no logic; each runs alone, here on tiny models."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import papermill
import pytest

from vldnp.study.reproduce import notebooks_in, reproduce

ROOT = Path(__file__).parents[2]
SOURCES = notebooks_in(ROOT / "notebooks")
PARAMETER = re.compile(r"\w+: (str|bool|int|float|list) = .+  # \w.+")
COMMON = {"profile": '"moji"', "out": '"../runs"', "quick": "False"}

each = pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
ALL = sorted((ROOT / "notebooks").glob("*.ipynb"))  # with the report, which reads a run
every = pytest.mark.parametrize("source", ALL, ids=lambda path: path.stem)


def cells(source: Path, kind: str):
    return [cell for cell in nbformat.read(source, 4).cells if cell.cell_type == kind]


def outputs(source: Path):
    return [output for cell in cells(source, "code") for output in cell.outputs]


def has_tag(cell, tag: str) -> bool:
    return tag in cell.metadata.get("tags", [])


def test_the_notebooks_are_there():
    assert [path.stem for path in SOURCES] == [
        "00_quickstart",
        "01_trajectories",
        "02_omega",
        "03_pareto",
        "04_query_schedule",
        "05_vlm_size",
        "06_guidance_rule",
        "07_table",
        "08_cost",
        "09_explorer",
        "10_fast",
    ]


@each
def test_parameters_are_typed_and_commented(source):
    (parameters,) = [c for c in cells(source, "code") if has_tag(c, "parameters")]
    for line in parameters.source.splitlines():
        assert PARAMETER.fullmatch(line), line
    inferred = papermill.inspect_notebook(source)
    assert len(inferred) == len(parameters.source.splitlines())
    assert {name: inferred[name]["default"] for name in COMMON} == COMMON
    assert all(p["help"] and p["inferred_type_name"] != "None" for p in inferred.values())


def is_plain(code: str) -> bool:
    """At most 15 lines, in which nothing is defined, branches or loops."""
    logic = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda, ast.For, ast.While)
    logic += (ast.If, ast.Try, ast.With)
    found = [node for node in ast.walk(ast.parse(code)) if isinstance(node, logic)]
    return len(code.splitlines()) <= 15 and not found


@every
def test_no_logic(source):
    assert len(nbformat.read(source, 4).cells) <= (30 if source.stem == "12_report" else 25)
    for cell in cells(source, "code"):
        assert is_plain(cell.source), cell.source


def test_what_a_notebook_may_not_hold():
    assert is_plain("x = 1\n" * 15) and not is_plain("x = 1\n" * 16)
    for code in ("def f(): ...", "class A: ...", "f = lambda: 1", "for x in y: print(x)"):
        assert not is_plain(code)
    assert PARAMETER.fullmatch("seed: int = 0  # of the noise")
    for line in ("seed = 0  # of the noise", "seed: int = 0", "seed: int = 0  #", "seed: int"):
        assert not PARAMETER.fullmatch(line)


@every
def test_title_and_question_come_first(source):
    notebook = nbformat.read(source, 4)
    first, second = notebook.cells[:2]
    assert first.source.startswith("# ") and "**The question.**" in first.source
    assert has_tag(second, "parameters")


@every
def test_prose_holds_no_measured_number(source):
    # Numbers are computed, so that the text cannot disagree with the run.
    for cell in cells(source, "markdown"):
        for number in re.findall(r"\d+\.\d+|\d+ ?%", cell.source):
            assert number in ("95 %",), cell.source


@each
def test_committed_outputs(source):
    if not (ROOT / "data" / "results" / "moji-table.csv").is_file():
        pytest.skip("no run was published yet: python -m vldnp publish")
    for cell in cells(source, "code"):
        assert cell.execution_count, "the committed notebook must show a run"
    kinds = {kind for output in outputs(source) for kind in output.get("data", {})}
    assert "text/markdown" in kinds
    # 07's only figure shows failures, of which there may be none.
    assert "image/png" in kinds or source.stem == "07_table"
    assert_clean(source)
    assert not any(has_tag(cell, "injected-parameters") for cell in cells(source, "code"))
    assert "papermill" not in nbformat.read(source, 4).metadata
    # The largest holds two viewers of 25 steps × 3 methods, about 1 MB each.
    assert source.stat().st_size < 2_500_000


def assert_clean(source: Path, *forbidden: str):
    """No warning, no error and no absolute path in what a notebook shows."""
    shown = outputs(source)
    assert not [o for o in shown if o.output_type in ("error", "stream")], shown
    text = "\n".join(
        str(value)
        for output in shown
        for kind, value in output.get("data", {}).items()
        if kind.startswith("text/")
    )
    assert "Warning" not in text
    for path in (str(ROOT), str(Path.home()) + "/", sys.prefix, *forbidden):
        assert path not in text


@pytest.fixture
def one(tmp_path):
    """A function that executes one notebook alone into `tmp_path`, and gives its copy."""

    def execute(source: Path, **parameters):
        folder = tmp_path / source.stem
        folder.mkdir()
        (folder / source.name).write_bytes(source.read_bytes())
        (executed,) = reproduce(
            "tiny", tmp_path / "runs", quick=True, parameters=parameters, notebooks=folder
        )
        return executed

    return execute


SMALL = {
    "00_quickstart": {"omega": 2.0},
    "01_trajectories": {"prompt": "a <b>cat", "seed": 3, "schedule": "uniform"},
    "02_omega": {"max_prompts": 2},
    "03_pareto": {"omegas": [2.0]},
    "04_query_schedule": {"counts": [0, 1]},
    # With false answers there would be more words than the tiny text encoder reads.
    "05_vlm_size": {"detection_prompts": 2, "precisions": [1.0], "dial_queries": [1]},
    "08_cost": {"demonstrations": 1, "sequential_answer_tokens": 3},
}


@pytest.mark.slow
@each
def test_runs_alone(source, one, tiny_data, tmp_path):
    executed = one(source, **SMALL.get(source.stem, {}))
    assert_clean(executed, str(tmp_path), str(tiny_data))
    kinds = {kind for output in outputs(executed) for kind in output.get("data", {})}
    assert "text/markdown" in kinds
    # 07's only figure shows failures, of which there may be none.
    assert "image/png" in kinds or source.stem == "07_table"
    if source.stem == "01_trajectories":
        assert "<b>cat" not in "".join(
            output.data.get("text/html", "") + output.data.get("text/markdown", "")
            for output in outputs(executed)
            if "data" in output
        )
        assert (tmp_path / "runs" / "tiny-quick" / "figures" / "trajectory.webp").is_file()
        kept = [p.name for p in (tmp_path / "runs" / "tiny-quick" / "trajectories").iterdir()]
        assert {"a-b-cat-3.json", "a-cat-in-the-park-3.json", "a-b-cat-3-3-vl-dnp.png"} <= set(kept)
    if source.stem == "07_table":
        assert (tmp_path / "runs" / "tiny-quick" / "verdicts.csv").is_file()
    if source.stem == "03_pareto":
        run = tmp_path / "runs" / "tiny-quick"
        assert (run / "table.csv").is_file()
        assert {p.name for p in run.glob("figures/*")} >= {"pareto.png", "examples.png"}
        made = {path: path.stat().st_mtime_ns for path in run.glob("cells/*")}
        one(source.with_name("02_omega.ipynb"), **SMALL[source.stem])  # finds all its pictures here
        assert made and made == {p: p.stat().st_mtime_ns for p in run.glob("cells/*")}


@pytest.mark.slow
def test_help_of_a_notebook_lists_its_parameters():
    found = subprocess.run(
        [sys.executable, "-m", "papermill", "--help-notebook", SOURCES[0]],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert "prompt: str" in found and "what is painted" in found
