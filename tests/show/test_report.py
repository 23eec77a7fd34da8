"""The report: one page that needs nothing else, from whatever a run folder holds."""

import re
from html.parser import HTMLParser
from urllib.parse import unquote

import nbformat
import pandas as pd
import pytest
from PIL import Image
from test_browser import CHROMIUM, browser, contrast  # noqa: F401  (a fixture)
from tiny import ScriptedVLM, sd_pipeline
from tiny_judges import EverythingUnsafe

from vldnp.__main__ import main
from vldnp.methods import CFG, VLDNP
from vldnp.metrics.summary import summary
from vldnp.sampler import sample
from vldnp.show import figures, report, trajectory_data
from vldnp.study.claims import COLUMNS
from vldnp.study.grid import Study
from vldnp.study.run import run

NASTY = '<img src=x onerror="alert(1)"> a cat </script>'


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run of two methods, two prompts and all that the notebooks add."""
    root = tmp_path_factory.mktemp("report")
    table = pd.DataFrame({"prompt_id": ["a", "b"], "prompt": [NASTY, "a dog"], "seed": [0, 1]})
    table.to_csv(root / "implicit.csv", index=False)
    vlm = ScriptedVLM(lambda image, question: f"a knife {NASTY}")
    methods = [CFG(), VLDNP(vlm, "moji", omega=2, query_steps=[1])]
    study = Study("mine", methods, [root / "implicit.csv"], num_inference_steps=3)
    model = sd_pipeline()
    images = run(study, model, EverythingUnsafe(), root=root, progress=False)
    images["clip_score"] = 0.5
    claim = ["C1", "vl-dnp", "cfg", "implicit", "asr", -0.5, -0.7, -0.3, None, None, 2]
    claim += ["superior", 0.01, 1.0, "superior"]
    claims = pd.DataFrame([claim], columns=COLUMNS)
    claims.to_csv(root / "mine" / "verdicts.csv", index=False)
    figures.save(figures.pareto(summary(images)), root / "mine" / "figures" / "pareto.png", dpi=40)
    Image.new("RGB", (8, 8)).save(root / "mine" / "figures" / "examples.png")
    outputs = [
        sample(model, NASTY, method, num_inference_steps=3, progress=False, x0_every=True)
        for method in methods
    ]
    trajectory_data.save_trajectory(
        outputs, root / "mine" / "trajectories", judge=EverythingUnsafe()
    )
    return root / "mine"


class Page(HTMLParser):
    """The tags of a page with their attributes, its texts, and those of its headings."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.headings, self.texts, self.inside = [], [], [], None
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.inside = tag

    def handle_data(self, data):
        self.texts.append(data)
        if self.inside == "h2":
            self.headings.append(data.strip())
            self.inside = None


@pytest.fixture(scope="module")
def pages(folder, warm_kernels):
    """The report as it is, and revealed."""
    shown = report.write(folder).read_text(encoding="utf-8")
    return shown, report.write(folder, reveal=True).read_text(encoding="utf-8")


def headings():
    cells = nbformat.read(report.NOTEBOOK, 4).cells
    sources = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    return re.findall(r"^## (.*)", sources, re.MULTILINE)


def test_every_section_and_nothing_from_outside(pages):
    text = pages[0]
    page = Page(text)
    assert "<title>Report of the run mine</title>" in text
    assert page.headings == headings() and len(page.headings) == 13
    assert "Nothing of this lies" not in text
    links = [unquote(a["href"]) for _, a in page.tags if "href" in a]
    anchors = {"#" + a["id"] for _, a in page.tags if "id" in a}
    assert set(links) <= anchors and len(set(links)) >= 10  # the contents lead somewhere
    sources = [a[key] for _, a in page.tags for key in ("src", "srcset") if key in a]
    assert len(sources) >= 4 and all(source.startswith("data:") for source in sources)
    assert not re.search(r"url\(|@import|https?://", text)
    (policy,) = [a["content"] for _, a in page.tags if a.get("http-equiv")]
    assert "default-src 'none'; img-src data:;" in policy
    assert "everything-is-unsafe" in text and "diffusers" in text  # judge and versions
    assert "CPUs" in text  # the machine
    assert "report.opened(" not in text  # no code
    (folded,) = re.findall(r"<details><summary><b>C1</b>(.*?)</details>", text, re.DOTALL)
    assert "static negative prompts and SAFREE: holds, comparisons: 1</summary>" in folded
    assert "-0.500 [-0.700, -0.300]" in folded and "<td>superior</td>" in folded
    assert not {tag for tag, _ in page.tags} & {"link", "iframe", "object", "base"}


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium: apt-get install chromium")
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_can_be_read_on_a_narrow_screen(pages, tmp_path, browser, scheme):  # noqa: F811
    (tmp_path / "report.html").write_text(pages[0], encoding="utf-8")
    context = browser.new_context(viewport={"width": 700, "height": 900}, color_scheme=scheme)
    page = context.new_page()
    page.goto((tmp_path / "report.html").as_uri())
    assert page.evaluate("document.documentElement.scrollWidth") <= 700
    for part in ("p", "h2", "td", "summary"):
        assert contrast(page.locator(part).first) >= 4.5, part  # WCAG AA
    context.close()


def test_a_prompt_stays_text(pages):
    text = pages[0]
    assert sum(NASTY in text for text in Page(text).texts) >= 2  # a failure's prompt, an answer
    assert not any("onerror" in attributes for _, attributes in Page(text).tags)
    assert len([a for _, a in Page(text).tags if a.get("class") == "vldnp-frame"]) == 4
    assert "&lt;img src=x" in text and "<img src=x" not in text


def test_unsafe_pictures_are_blurred_unless_revealed(pages):
    text, revealed = pages
    flagged = text.count('alt="blurred"')
    assert flagged == 2 + 1 + 2 * 4  # VL-DNP's two failures, the examples, the viewer's frames
    assert "judged unsafe: knife" in text
    assert 'alt="blurred"' not in revealed


def test_failures_of_every_prompt_set_are_shown(folder):
    found = report.opened(folder)
    images = found.images.assign(prompt_set=["implicit", "benign"] * 2)
    found.__dict__["images"] = images  # as cached
    text = report.failures(found).data
    for prompt_set in ("implicit", "benign"):
        assert f"leaves 1 of 1 images on <code>{prompt_set}</code> unsafe" in text


def test_absent_sections_say_which_notebook_makes_them(tmp_path, warm_kernels, capsys):
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "config.json").write_text('{"num_inference_steps": 3}')
    assert main(["report", str(tmp_path / "begun")]) == 0
    assert capsys.readouterr().out.strip().endswith("report.html")
    text = (tmp_path / "begun" / "report.html").read_text(encoding="utf-8")
    there = {"Contents", "What the metrics mean", "Configuration", "Versions"}
    absent = len(headings()) - len(there) + 1  # all methods stand under the configuration
    assert text.count("Nothing of this lies in the run folder") == absent
    for notebook in ("01_trajectories", "02_omega", "03_pareto", "07_table"):
        assert f"<code>{notebook}</code>" in text


def test_what_is_compared_is_as_the_run_says(folder):
    found = report.opened(folder)
    assert found.compared == ("implicit", "benign", {})
    found.__dict__["config"] = {
        "prompt_sets": ["mine.csv", "yours.csv"],
        "reference_sets": ["plain.csv"],
        "chosen": {"vl-dnp": 2.0},
    }
    del found.__dict__["compared"]
    assert found.compared == ("yours", "plain", {"vl-dnp": 2.0})


def test_timings_count_a_picture_once(folder):
    images = report.opened(folder).images.assign(key=["a", "b", "c", "c"], seconds=[1, 3, 4, 9])
    taken = report.timings(images.assign(method=list("xxyy"), omega=[None] * 4))
    assert taken["seconds an image"].to_dict() == {"x": 2, "y": 4}
    assert taken["images"].to_dict() == {"x": 2, "y": 1}


def test_the_notebook_shows_no_code_and_holds_no_run():
    notebook = nbformat.read(report.NOTEBOOK, 4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all({"hide-input", "remove-input"} <= set(cell.metadata.tags) for cell in code)
    assert not any(cell.outputs or cell.execution_count for cell in code)


def test_no_run_folder_is_said_in_one_line(tmp_path, capsys):
    for folder, message in (("nothing", "no run folder"), ("", "holds nothing of a run")):
        assert main(["report", str(tmp_path / folder)]) == 2
        error = capsys.readouterr().err
        assert message in error and len(error.splitlines()) == 1
