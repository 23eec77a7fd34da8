"""The report: one page that needs nothing else, from whatever a run folder holds."""

import re
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from tiny import ScriptedVLM, sd_pipeline

from vldnp.__main__ import main
from vldnp.analysis.claims import COLUMNS
from vldnp.core.methods import CFG, VLDNP
from vldnp.core.sampler import sample
from vldnp.display import figures, report, trajectory_data
from vldnp.experiments.grid import Study
from vldnp.experiments.run import run
from vldnp.metrics.summary import summary
from vldnp.models.judges import Judgement

NASTY = '<img src=x onerror="alert(1)"> a cat </script>'


class Judge:
    name, revision = "everything-is-unsafe", "1"

    def __call__(self, images):
        return Judgement(np.full(len(images), 0.9), [{"knife": 0.9}] * len(images))


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
    images = run(study, model, Judge(), root=root, progress=False)
    images["clip_score"] = 0.5
    claim = ["C1", "vl-dnp", "cfg", "implicit", "asr", -0.5, -0.7, -0.3, 2, "holds"]
    claims = pd.DataFrame([claim], columns=COLUMNS)
    claims.to_csv(root / "mine" / "verdicts.csv", index=False)
    figures.save(figures.pareto(summary(images)), root / "mine" / "figures" / "pareto.png", dpi=40)
    Image.new("RGB", (8, 8)).save(root / "mine" / "figures" / "examples.png")
    outputs = [
        sample(model, NASTY, method, num_inference_steps=3, progress=False, x0_every=True)
        for method in methods
    ]
    trajectory_data.save_trajectory(outputs, root / "mine" / "trajectories", judge=Judge())
    return root / "mine"


class Page(HTMLParser):
    """The tags of a page with their attributes, and the text of its headings."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.headings, self.inside = [], [], None
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.inside = tag

    def handle_data(self, data):
        if self.inside == "h2":
            self.headings.append(data.strip())
            self.inside = None


def test_every_section_and_nothing_from_outside(folder, capsys):
    assert main(["report", str(folder)]) == 0
    assert capsys.readouterr().out.strip().endswith("report.html")
    text = (folder / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert page.headings == [heading for heading, *_ in report.SECTIONS]
    assert "Nothing of this lies" not in text
    sources = [a[key] for _, a in page.tags for key in ("src", "href", "srcset") if key in a]
    assert len(sources) >= 4 and all(source.startswith("data:") for source in sources)
    assert not re.search(r"url\(|@import|https?://", text)
    assert "everything-is-unsafe" in text and "diffusers" in text  # judge and versions


def test_a_prompt_stays_text(folder):
    text = report.write(folder).read_text(encoding="utf-8")
    assert "onerror=&quot;alert" in text or "onerror=&quot;alert(1)&quot;" in text
    assert not any("onerror" in attributes for _, attributes in Page(text).tags)
    assert len([a for _, a in Page(text).tags if a.get("class") == "vldnp-frame"]) == 4
    assert "&lt;img src=x" in text and "<img src=x" not in text


def test_unsafe_pictures_are_blurred_unless_revealed(folder):
    text = report.write(folder).read_text(encoding="utf-8")
    flagged = text.count('alt="blurred"')
    assert flagged == 2 + 1 + 2 * 4  # VL-DNP's two failures, the examples, the viewer's frames
    assert "judged unsafe: knife" in text
    assert 'alt="blurred"' not in report.write(folder, reveal=True).read_text(encoding="utf-8")


def test_absent_sections_say_which_notebook_makes_them(folder, tmp_path):
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "config.json").write_text('{"num_inference_steps": 3}')
    text = report.write(tmp_path / "begun").read_text(encoding="utf-8")
    there = {"Configuration", "Versions"}
    assert text.count("Nothing of this lies in the run folder") == len(report.SECTIONS) - len(there)
    for notebook in ("01_trajectories", "02_omega", "03_pareto"):
        assert f"<code>{notebook}</code>" in text


def test_no_run_folder_is_said_in_one_line(tmp_path, capsys):
    assert main(["report", str(tmp_path / "nothing")]) == 2
    error = capsys.readouterr().err
    assert "no run folder" in error and len(error.splitlines()) == 1
