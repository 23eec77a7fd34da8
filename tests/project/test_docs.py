"""The site that `make docs` builds; zensical refuses broken links and anchors of pages."""

import re
from pathlib import Path

import vldnp

ROOT = Path(__file__).parents[2]


def test_no_link_is_broken(site_folder):
    for page in site_folder.rglob("index.html"):
        for target in re.findall(r'(?:href|src)="([^"]+)"', page.read_text(encoding="utf-8")):
            if re.match(r"[a-z]+:|//|#", target):
                continue
            path = (page.parent / re.split("[?#]", target)[0]).resolve()
            assert (path / "index.html" if path.is_dir() else path).is_file(), (page, target)


def test_the_notebooks_are_a_gallery_with_their_outputs(site_folder):
    front = (site_folder / "index.html").read_text(encoding="utf-8")
    for notebook in (ROOT / "notebooks").glob("*.ipynb"):
        assert f'href="notebooks/{notebook.stem}/"' in front
        assert (site_folder / "notebooks" / notebook.stem / "index.html").stat().st_size > 20_000
    shown = (site_folder / "notebooks/03_omega/index.html").read_text(encoding="utf-8")
    assert "data:image/png;base64" in shown


def test_the_api_reference_has_every_public_name(site_folder):
    page = (site_folder / "api" / "index.html").read_text(encoding="utf-8")
    for name in vldnp.__all__:
        assert f'id="{name.lower()}"' in page


def test_nothing_is_asked_of_another_server(site_folder):
    for page in site_folder.rglob("index.html"):
        text = page.read_text(encoding="utf-8")
        assert not re.findall(r'<(?:script|img)[^>]+src="https?:', text)
        assert not re.findall(r'<link[^>]+rel="stylesheet"[^>]+href="https?:', text)
