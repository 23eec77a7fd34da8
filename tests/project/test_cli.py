import os
import subprocess
import sys
from types import SimpleNamespace

import nbformat
import pytest

import vldnp
from vldnp import __main__ as cli
from vldnp.study import published
from vldnp.study.grid import setting_of
from vldnp.study.profile import load_profile, profile_methods


def notebook(path, parameters, body):
    cells = [
        nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]}),
        nbformat.v4.new_code_cell(body),
    ]
    metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=metadata), path)


WRITES_RESULTS = """
from pathlib import Path
assert Path(run) == Path(out) / (profile + "-quick" * quick)
run = Path(run)
(run / "table.csv").write_text(f"{quick} {prompt}")
"""


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A folder with two notebooks and one that is not to be executed."""
    folder = tmp_path / "notebooks"
    folder.mkdir()
    notebook(folder / "00_first.ipynb", "profile = 'x'", "print(profile)")
    parameters = "profile = 'x'\nout = 'runs'\nquick = False\nprompt = 'a dog'"
    parameters += "\nimages = 0\nsafety_set = 'implicit'\nrun = 'x'"
    notebook(folder / "01_second.ipynb", parameters, WRITES_RESULTS)
    notebook(folder / "extra.ipynb", "", "raise SystemError")
    monkeypatch.setattr(cli, "NOTEBOOKS", folder)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_reproduce_executes_the_notebooks_in_order(project, capfd):
    status = cli.main(["reproduce", "--quick", "--out", "results", "-p", "prompt", "1984"])
    printed, progress = capfd.readouterr()
    assert status == 0, progress
    run = project / "results" / "moji-quick"
    assert (run / "table.csv").read_text() == "True 1984"
    for line in ("table.csv", "notebooks/00_first.ipynb"):
        assert os.path.join("results", "moji-quick", line) in printed
    assert progress.index("00_first.ipynb") < progress.index("01_second.ipynb")
    executed = (run / "notebooks" / "01_second.ipynb").read_text()
    assert str(project) not in executed, "no machine path in what may be committed"
    assert not (run / "notebooks" / "extra.ipynb").exists()


def test_what_is_published_is_verified_first(project, monkeypatch, capsys):
    asked = []

    def verified(name, *made, images, workers):
        asked.append((name, images))
        return "9 of 9 recomputed images identical"

    own = {setting_of(method): {} for method in profile_methods(load_profile("moji"))}
    runs = {"study-7": SimpleNamespace(methods=own), "other": SimpleNamespace(methods={})}
    monkeypatch.setattr(published, "published_runs", lambda: [*runs])
    monkeypatch.setattr(published, "open_run", runs.get)
    monkeypatch.setattr(cli, "execute", lambda source, target, *args, **kwargs: target)
    monkeypatch.setattr("vldnp.study.published.verify", verified)
    command = ["reproduce", "--out", "results"]
    assert cli.main([*command, "--images", "40"]) == 0
    assert asked == [("study-7", 40)]
    assert capsys.readouterr().out.startswith("9 of 9 recomputed images identical")
    assert cli.main([*command, "--quick"]) == cli.main([*command, "--images", "0"]) == 0
    monkeypatch.setenv("RECOMPUTE", "all")
    assert cli.main(command) == 0
    monkeypatch.setenv("RECOMPUTE", "no")
    assert cli.main(command) == 2
    assert len(asked) == 1


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--profile", "mojji"], "unknown profile 'mojji': did you mean 'moji'?"),
        (["-p", "promt", "x"], "unknown notebook parameter 'promt': did you mean 'prompt'?"),
        (["-p", "quick", "true"], "give 'quick' as --quick, not with -p"),
        (["--profile", "nosuch.yaml"], "no profile nosuch.yaml: there is no such file"),
        (["-p", "images", "-3"], "images must be a whole number, 0 or more, not '-3'"),
        (["-p", "safety_set", "implid"], "unknown prompt set of profile 'moji' 'implid': did"),
    ],
)
def test_bad_arguments_give_one_line(project, capsys, arguments, message):
    assert cli.main(["reproduce", *arguments]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith(f"vldnp: {message}") and printed.count("\n") == 1
    assert not (project / "runs").exists()


def test_a_prompt_set_that_is_not_there_fails_before_anything_runs(project, capsys):
    (project / "mine.yaml").write_text("extends: moji\nprompt_sets: [benign, implicit, other]\n")
    for command in "reproduce", "run":
        assert cli.main([command, "--profile", "mine.yaml"]) == 2
        told = capsys.readouterr().err
        assert told.startswith("vldnp: unknown prompt set 'other'") and told.count("\n") == 1
    assert not (project / "runs").exists()


def test_a_wrong_option_gives_one_line(capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["run", "--workers", "many"])
    told = capsys.readouterr().err
    assert stopped.value.code == 2 and told.count("\n") == 1
    assert told.startswith("vldnp: argument --workers: invalid int value: 'many'")


def test_the_version(capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["--version"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out == f"vldnp {vldnp.__version__}\n"


def test_a_failing_notebook_gives_one_line(project, capfd):
    notebook(project / "notebooks" / "00_first.ipynb", "profile = 'x'", "import vldnp\nvldnp.loda")
    assert cli.main(["reproduce", "--images", "0"]) == 1
    last = capfd.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("vldnp: 00_first.ipynb failed in cell 3: AttributeError: No vldnp")
    copies = project / "runs" / "moji" / "notebooks"
    assert "AttributeError" in (copies / "00_first.ipynb").read_text()
    assert [path.name for path in copies.rglob("*")] == ["00_first.ipynb"]


def test_no_notebooks_is_said(tmp_path):
    with pytest.raises(FileNotFoundError, match="no notebooks in"):
        cli.reproduce(notebooks=tmp_path)


@pytest.mark.parametrize(
    "what",
    ["vldnp", "vldnp.__main__ as v; v.main(['run', '--profile', 'mojji'])", "moji.__main__"],
)
def test_help_and_typing_errors_import_nothing_large(what):
    code = f"import sys, {what}; assert not {{'torch', 'numpy', 'pandas'}} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_exported_names_are_there():
    for name in vldnp.__all__:
        assert getattr(vldnp, name) is not None
        assert name in dir(vldnp)
    with pytest.raises(AttributeError, match="No vldnp attribute loda"):
        vldnp.loda  # noqa: B018
