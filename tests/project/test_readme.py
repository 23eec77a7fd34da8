"""The README's code runs, here on tiny models; its modules exist; its numbers are the run's."""

import base64
import json
import re
import shlex
import tomllib
from pathlib import Path

import pandas as pd
import pytest
import tiny_world

import vldnp.__main__ as cli
from vldnp.study.profile import load_profile

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = {path.stem: path.read_text(encoding="utf-8") for path in (ROOT / "docs").glob("*.md")}
GOES_ON = "](../README.md#start)"  # says a page whose examples go on from the README's


def blocks(language: str, text: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def every_block(language: str) -> list[str]:
    return [block for text in (README, *PAGES.values()) for block in blocks(language, text)]


def run(code: list[str], namespace: dict, folder: Path) -> None:
    """Run blocks of code in a folder with the tiny world's models in the shipped ones' place."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLDNP_DATA", str(folder / "data"))
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.chdir(folder)
        for block in code:
            assert len(block.splitlines()) <= 15, block
            exec(compile(block, "a page", "exec"), namespace)


@pytest.fixture(scope="module")
def after_the_readme(tmp_path_factory):
    """What the README's example leaves, and the folder that it ran in."""
    folder, namespace = tmp_path_factory.mktemp("readme"), {}
    (folder / "data").mkdir()
    tiny_world.make(folder / "data")
    run(blocks("python", README), namespace, folder)
    return namespace, folder


@pytest.mark.filterwarnings("ignore:the prompt")  # the tiny text encoder reads 16 tokens
def test_the_readme_ends_with_the_viewer(after_the_readme):
    namespace, _ = after_the_readme
    (block,) = blocks("python", README)
    assert block.rstrip().endswith("vldnp.view(out)")
    assert namespace["out"].images[0].mode == "RGB"
    assert len(README.split()) <= 700, "the rest is in docs"


@pytest.mark.filterwarnings("ignore:the prompt")
@pytest.mark.parametrize("page", [name for name, text in PAGES.items() if GOES_ON in text])
def test_a_pages_blocks_run_after_the_readmes(page, after_the_readme, capsys):
    namespace, folder = after_the_readme
    run(blocks("python", PAGES[page]), dict(namespace), folder)
    if page == "concepts":
        assert "piracy, skull, dagger" in capsys.readouterr().out
    if page == "running":
        assert (folder / "runs" / "mine" / "table.csv").is_file()


def test_all_blocks_are_python():
    for block in every_block("python"):
        compile(block, "a page", "exec")


def test_yaml_blocks_are_profiles(tmp_path):
    assert every_block("yaml")
    for block in every_block("yaml"):
        (tmp_path / "mine.yaml").write_text(block)
        assert load_profile(tmp_path / "mine.yaml").sampling["num_inference_steps"] == 50


def test_the_architecture_names_every_room():
    page = PAGES["architecture"]
    for folder in {path.parent for path in (ROOT / "vldnp").rglob("*.py")}:
        assert f"`{folder.relative_to(ROOT).as_posix()}/`" in page
    assert len(page.split()) <= 700


def test_pages_are_short_and_their_times_are_the_measured_ones():
    assert [name for name, text in PAGES.items() if len(text.split()) > 1500] == ["papers"]
    cost = pd.read_csv(ROOT / "data/results/cost-h200.csv", index_col="way")
    said = f"{cost.seconds['plain CFG']:.2f} s an image and VL-DNP {cost.ratio['VL-DNP']:.1f} times"
    assert said in " ".join(PAGES["real-models"].split())


@pytest.mark.parametrize("figure, notebook", [("pareto", "03_omega"), ("images", "02_findings")])
def test_figures_of_the_pages_are_those_of_the_notebooks(figure, notebook):
    data = base64.b64encode((ROOT / f"notebooks/figures/{figure}.png").read_bytes()).decode()
    shown = (ROOT / f"notebooks/{notebook}.ipynb").read_text(encoding="utf-8")
    assert data in shown.replace("\\n", "") and f"notebooks/figures/{figure}.png" in README


@pytest.mark.parametrize("notebook", ["04_queries", "05_vlm", "06_rules"])
def test_ablations_are_answered_as_in_the_notebooks(notebook):
    cells = json.loads((ROOT / f"notebooks/{notebook}.ipynb").read_text(encoding="utf-8"))["cells"]
    assert "".join(cells[-1]["source"]) in PAGES["ablations"]


def test_every_page_is_in_the_contents():
    contents = tomllib.loads((ROOT / "zensical.toml").read_text())["project"]["nav"]
    listed = set(re.findall(r"([\w/-]+)\.md", str(contents)))
    notebooks = {f"notebooks/{path.stem}" for path in (ROOT / "notebooks").glob("*.ipynb")}
    assert listed == set(PAGES) | notebooks | {"index", "contributing", "api"}


def test_commands_exist():
    makefile = (ROOT / "Makefile").read_text()
    shown, targets = "\n".join(every_block("bash")), re.findall(r"^([a-z]+):", makefile, re.M)
    assert {*re.findall(r"^make (\w+)", shown, re.M)} <= {*targets}
    assert all(f"| `make {target}` | " in PAGES["running"] for target in targets)
    for line in re.findall(r"^python -m vldnp ([^#\n]*)", shown, re.MULTILINE):
        cli._parser().parse_args(shlex.split(line))
