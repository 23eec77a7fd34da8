"""The README's code runs, here on tiny models; its modules exist; its numbers are the run's."""

import re
from pathlib import Path

import pandas as pd
import pytest
import tiny_world

import vldnp
from vldnp.display import publish
from vldnp.experiments.profile import load_profile

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
RESULTS = ROOT / "data" / "results" / "embedded-table.csv"


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


@pytest.mark.filterwarnings("ignore:the prompt")  # the tiny text encoder reads 16 tokens
def test_python_blocks_run_in_order(tmp_path, monkeypatch, capsys):
    (tmp_path / "data").mkdir()
    data = tiny_world.make(tmp_path / "data")
    monkeypatch.setenv("VLDNP_DATA", str(data))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    namespace = {}
    for block in blocks("python"):
        assert len(block.splitlines()) <= 15, block
        exec(compile(block, "README.md", "exec"), namespace)
    printed = capsys.readouterr().out
    assert "piracy, dagger" in printed
    assert (tmp_path / "runs" / "mine" / "table.csv").is_file()
    assert namespace["out"].images[0].mode == "RGB"


def test_yaml_blocks_are_profiles(tmp_path):
    for block in blocks("yaml"):
        (tmp_path / "mine.yaml").write_text(block)
        assert load_profile(tmp_path / "mine.yaml").num_inference_steps == 50


KINDS = ("table", "verdicts")


def test_results_are_those_of_the_committed_table():
    between = README.split(publish.BEGIN)[1].split(publish.END)[0]
    if not RESULTS.is_file():
        assert between.strip() == "*Not measured yet.*"
        pytest.skip("no run was published yet: python -m vldnp publish")
    (name,) = re.findall(r"^Run `([\w-]+)`", between, re.MULTILINE)
    table, verdicts = (pd.read_csv(RESULTS.with_name(f"{name}-{x}.csv")) for x in KINDS)
    chosen = load_profile(name).chosen
    assert publish.with_results(README, name, table, verdicts, chosen=chosen) == README


def test_the_architecture_names_every_module_and_no_other():
    section = README.split("## Architecture")[1].split("\n## ")[0]
    rows = re.findall(r"^\| `([\w/]+)/` \|.*\|([^|]*)\|$", section, re.MULTILINE)
    named = {f"{room}/{name}" for room, names in rows for name in re.findall(r"`(\w+)`", names)}
    package = ROOT / "vldnp"
    present = {p.relative_to(package).with_suffix("").as_posix() for p in package.rglob("*.py")}
    assert named == {name for name in present if "/" in name and not name.endswith("__")}


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)]+)\)", README):
        if not target.startswith("http"):
            assert (ROOT / target).is_file(), target


def test_commands_exist():
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)", "\n".join(blocks("bash")), re.MULTILINE):
        assert f"\n{target}:" in makefile


def test_icons_and_paper_are_credited():
    assert "OpenMoji" in README and "CC BY-SA 4.0" in README
    assert "2510.26052" in README
    assert vldnp.__version__
