import nbformat
import pandas as pd
import pytest
from nbformat.v4 import new_code_cell, new_notebook, new_output
from tiny import sd_pipeline

from moji.judge import CNNJudge
from vldnp.methods import CFG
from vldnp.metrics.summary import TABLE as TABLE_COLUMNS
from vldnp.show import publish as module
from vldnp.show.publish import BEGIN, END, publish
from vldnp.study.claims import COLUMNS as CLAIM_COLUMNS
from vldnp.study.grid import Study
from vldnp.study.reproduce import VIEW
from vldnp.study.run import run as run_study

TABLE = pd.DataFrame({"method": ["cfg"], "omega": [None], "prompt_set": ["implicit"], "n": [3]})
VERDICTS = pd.DataFrame(
    [
        ["C1", "vl-dnp", "cfg", "implicit", "asr", -0.5, -0.7, -0.3, None, None, 3]
        + ["superior", 0.01, 1.0, "superior"]
    ],
    columns=CLAIM_COLUMNS,
)
COLUMNS = "asr retention clip tr fid kid model_evaluations vlm_calls seconds".split()


def view(model_id, text):
    return new_output("display_data", {VIEW: {"model_id": model_id}, "text/plain": text})


@pytest.fixture
def project(tmp_path):
    """A checkout with one notebook, and a run of it."""
    cells = [
        new_code_cell('out: str = "../runs"  # where', metadata={"tags": ["parameters"]}, id="a"),
        new_code_cell("show()", id="b"),
    ]
    (tmp_path / "notebooks").mkdir()
    nbformat.write(new_notebook(cells=cells), tmp_path / "notebooks" / "00_one.ipynb")
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "results.md").write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")

    run = tmp_path / "runs" / "moji"
    (run / "notebooks").mkdir(parents=True)
    (run / "figures").mkdir()
    for name in module.FIGURES:
        (run / "figures" / name).write_bytes(b"png")
    TABLE.reindex(columns=[*TABLE, *COLUMNS]).to_csv(run / "table.csv", index=False)
    VERDICTS.to_csv(run / "verdicts.csv", index=False)
    (run / "config.json").write_text('{"published": "moji", "chosen": {"vl-dnp": 8.0}}')
    write_executed(run, '# Parameters\nout = "../runs"\n')
    return tmp_path


def write_executed(run, injected, source="show()", **output):
    cells = [
        new_code_cell('out: str = "../runs"  # where', metadata={"tags": ["parameters"]}, id="a"),
        new_code_cell(injected, metadata={"tags": ["injected-parameters"]}, id="x"),
        new_code_cell(source, id="b", metadata={"papermill": {"duration": 3}}, execution_count=3),
    ]
    cells[2].outputs = [
        view("bar", "  0%|          | 0/5 [00:00<?, ?it/s]"),
        view("bar", "images: 0image [00:00, ?image/s]"),
        view("box", "VBox(children=(Slider(), ))"),
        new_output("display_data", {"text/plain": output.get("text", "a figure")}),
    ]
    metadata = {"papermill": {"version": "2"}, "widgets": {"state": {"bar": {}, "box": {}}}}
    notebook = new_notebook(cells=cells, metadata=metadata)
    nbformat.write(notebook, run / "notebooks" / "00_one.ipynb")


def test_a_run_is_put_into_the_checkout(project):
    written = publish(project / "runs" / "moji", project)
    assert {p.relative_to(project).as_posix() for p in written} == {
        "notebooks/00_one.ipynb",
        "docs/results.md",
        "data/results/moji-table.csv",
        "data/results/moji-verdicts.csv",
        "notebooks/figures/pareto.png",
        "notebooks/figures/examples.png",
        "notebooks/figures/dial.png",
        "notebooks/figures/trajectory.webp",
    }
    notebook = nbformat.read(project / "notebooks" / "00_one.ipynb", 4)
    assert [cell.id for cell in notebook.cells] == ["a", "b"]
    assert "papermill" not in notebook.metadata and not notebook.cells[1].metadata
    shown = [output.data["text/plain"] for output in notebook.cells[1].outputs]
    assert shown == ["a figure"] and "widgets" not in notebook.metadata
    page = (project / "docs" / "results.md").read_text()
    assert page.startswith(f"before\n{BEGIN}\n") and page.endswith(f"{END}\nafter\n")
    assert "Run `moji`, prompts: `implicit` 3." in page
    assert "| `cfg` |" in page and "**C1**" in page and "\nold\n" not in page


def test_outputs_of_another_profile_say_so(project):
    run = project / "runs" / "moji"
    source = project / "notebooks" / "00_one.ipynb"
    written, executed = nbformat.read(source, 4), nbformat.read(run / "notebooks" / source.name, 4)
    default = '\nprofile: str = "moji"  # models'
    written.cells[0].source += default
    executed.cells[0].source += default
    for profile, notes in {"moji": 0, "moji-full": 1}.items():
        executed.cells[1].source = f'out = "../runs"\nprofile = "{profile}"'
        outputs = module.with_outputs(written, executed, source.name).cells[0].outputs
        assert len(outputs) == notes
    assert "profile `moji-full`; this cell asks for `moji`" in outputs[0].data["text/markdown"]


def test_what_was_computed_becomes_the_published_run(project):
    run = project / "runs" / "moji"
    model, judge = sd_pipeline(), CNNJudge(("cat", "knife"), ("knife",))
    (project / "implicit.csv").write_text("prompt_id,prompt,seed\na,a cat,0\nb,a dog,1\n")
    study = Study("moji", [CFG()], [project / "implicit.csv"], num_inference_steps=2)
    images = run_study(study, model, judge, root=run.parent, progress=False, recompute=True)
    (run.parent / "moji-tuning").mkdir()
    (run.parent / "moji-tuning" / "tuning.csv").write_text("method\n")
    published = project / "data" / "results" / "moji"
    (published / "images-gone.parquet").parent.mkdir(parents=True)
    (published / "images-gone.parquet").touch()
    written = publish(run, project)
    names = "images.parquet table.csv config.json verdicts.csv tuning.csv methods.json meta.json"
    assert {published / name for name in names.split()} == set(published.iterdir())
    assert set(published.iterdir()) <= set(written)
    rows = pd.read_parquet(published / "images.parquet")
    assert rows["key"].tolist() == images["key"].tolist() and "pixels" in rows
    (run / images["image"][0]).unlink()
    page = project / "docs" / "results.md"
    page.write_text(page.read_text().replace("**C1**", "changed"))
    with pytest.raises(FileNotFoundError, match=images["key"][0]):
        publish(run, project)
    assert "changed" in page.read_text(), "nothing was written"


@pytest.mark.parametrize(
    "executed, message",
    [
        ({"injected": 'out = "elsewhere"'}, "executed with out = 'elsewhere'; .* '../runs'"),
        ({"injected": "", "source": "other()"}, "executed from another version; run it again"),
        ({"injected": "", "text": "{checkout}/x"}, "an output names a path of this machine"),
    ],
)
def test_what_does_not_fit_is_refused_whole(project, executed, message):
    run = project / "runs" / "moji"
    if "text" in executed:
        executed["text"] = executed["text"].format(checkout=project)
    write_executed(run, **executed)
    before = {p: p.read_bytes() for p in project.rglob("*") if p.is_file()}
    with pytest.raises(ValueError, match=message):
        publish(run, project)
    assert before == {p: p.read_bytes() for p in project.rglob("*") if p.is_file()}


def test_an_incomplete_run_is_named(project):
    (project / "runs" / "moji" / "table.csv").unlink()
    with pytest.raises(FileNotFoundError, match="the run is not complete: .*table.csv is missing"):
        publish(project / "runs" / "moji", project)


def test_the_runs_own_sets_are_published(project):
    run = project / "runs" / "moji"
    rows = pd.DataFrame(
        [
            ["cfg", None, "attack", 3, 0.7],
            ["vl-dnp", 8.0, "attack", 3, 0.1],
            ["cfg", None, "x", 3, 0],
        ],
        columns=["method", "omega", "prompt_set", "n", "asr"],
    )
    rows.reindex(columns=TABLE_COLUMNS).to_csv(run / "table.csv", index=False)
    (run / "config.json").write_text(
        '{"published": "moji", "safety_set": "attack", "reference_sets": ["x"]}'
    )
    publish(run, project)
    page = (project / "docs" / "results.md").read_text()
    assert "ASR 0.70 on `attack`" in page and "ASR x" not in page


def test_a_page_without_markers_is_named():
    with pytest.raises(ValueError, match="must hold <!-- results --> and <!-- /results --> once"):
        module.with_results("nothing", "moji", TABLE, VERDICTS)
