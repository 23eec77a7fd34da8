"""The site that `make docs` builds."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "-d", str(folder)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    subprocess.run(command, cwd=ROOT, env=environment, check=True, timeout=300)
    return folder


def test_no_link_is_broken(site):
    for page in site.rglob("index.html"):
        for target in re.findall(r'(?:href|src)="([^"]+)"', page.read_text(encoding="utf-8")):
            if re.match(r"[a-z]+:|//|#", target):
                continue
            path = (page.parent / re.split("[?#]", target)[0]).resolve()
            assert (path / "index.html" if path.is_dir() else path).is_file(), (page, target)


def test_the_notebooks_are_a_gallery_with_their_outputs(site):
    front = (site / "index.html").read_text(encoding="utf-8")
    for notebook in (ROOT / "notebooks").glob("*.ipynb"):
        assert f'href="notebooks/{notebook.stem}.html"' in front
        assert (site / "notebooks" / f"{notebook.stem}.html").stat().st_size > 10_000
    shown = (site / "notebooks" / "03_pareto.html").read_text(encoding="utf-8")
    assert "data:image/png;base64" in shown


def test_nothing_is_asked_of_another_server(site):
    for page in [*site.glob("*/index.html"), *site.glob("notebooks/*.html")]:
        text = page.read_text(encoding="utf-8")
        assert not re.findall(r'<(?:script|img)[^>]+src="https?:', text)
        assert not re.findall(r'<link[^>]+rel="stylesheet"[^>]+href="https?:', text)
