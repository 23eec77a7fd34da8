"""What `make docs` adds to the pages: the README as the first one, the notebooks as a gallery.

Pages link to files of the repository, so that the same links work where the Markdown is read.
"""

import re
from pathlib import Path

import nbformat
from mkdocs.structure.files import File
from nbconvert import HTMLExporter

ROOT = Path(__file__).parents[1]


def on_files(files, config):
    readme = (ROOT / "README.md").read_text(encoding="utf-8").replace("](docs/", "](")
    contributing = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").replace("](docs/", "](")
    files.append(File.generated(config, "index.md", content=readme))
    files.append(File.generated(config, "contributing.md", content=contributing))
    for path in sorted((ROOT / "notebooks" / "figures").iterdir()):
        name = f"notebooks/figures/{path.name}"
        files.append(File.generated(config, name, abs_src_path=str(path)))
    exporter = HTMLExporter(require_js_url="", mathjax_url="")  # nothing from another server
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        page, _ = exporter.from_notebook_node(nbformat.read(path, as_version=4))
        files.append(File.generated(config, f"notebooks/{path.stem}.html", content=page))
    files.remove(files.get_file_from_path("hooks.py"))
    return files


def on_page_markdown(markdown, page, **_):
    """Links to files of the repository → links to the pages made of them."""
    markdown = re.sub(r"\]\((\.\./)?(notebooks/\w+)\.ipynb\)", r"](\2.html)", markdown)
    markdown = re.sub(r"\]\((\.\./)?(notebooks/figures/[\w.]+)\)", r"](\2)", markdown)
    markdown = re.sub(r"\]\((\.\./)?README\.md(#[\w-]+)?\)", r"](index.md\2)", markdown)
    markdown = re.sub(r"\]\((\.\./)?CONTRIBUTING\.md\)", "](contributing.md)", markdown)
    return re.sub(r"\[([^]]+)\]\((\.\./)?CITATION\.cff\)", r"`\1`", markdown)
