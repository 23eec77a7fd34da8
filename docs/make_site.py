"""`python docs/make_site.py [FOLDER]`: the pages and the executed notebooks as a site in
FOLDER/docs (default: build/docs), by zensical. A link to a missing page or anchor is an error.

README.md is the first page, and the API reference is made of the package's docstrings. A notebook
becomes a page with its stored outputs; the trajectory viewer in it needs no kernel. Outputs are put
into the page after the build, because Markdown would change their HTML.
"""

import html
import inspect
import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import nbformat

import vldnp

ROOT = Path(__file__).resolve().parents[1]
LINK = re.compile(r"(?<=\]\()(?!https?:|#)([^)#\s]+)")
LINKED = re.compile(r"\[([^]]+)\]\((?:\.\./)?CITATION\.cff\)")  # no page is made of this file
CSS = """.md-grid {max-width: 84rem}
.vldnp-output {overflow-x: auto; margin: 1em 0; font-size: .65rem}
.vldnp-output > img {max-width: 100%; height: auto; background: white}
.vldnp-output table {border: 0; border-collapse: collapse}
.vldnp-output :is(th, td) {border: 0; padding: .3em .5em; text-align: right; white-space: nowrap}
.vldnp-output tr {border-bottom: 1px solid var(--md-default-fg-color--lightest)}
"""


def sources() -> dict[Path, Path]:
    """Files of the repository → their places in the folder `pages`."""
    found = {ROOT / "README.md": "index.md", ROOT / "CONTRIBUTING.md": "contributing.md"}
    found |= {path: path.name for path in (ROOT / "docs").glob("*.md")}
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        found[path] = f"notebooks/{path.stem}.md"
    for path in sorted((ROOT / "notebooks" / "figures").iterdir()):
        found[path] = f"notebooks/figures/{path.name}"
    return {path: Path(place) for path, place in found.items()}


def linked(text: str, source: Path, places: dict[Path, Path]) -> str:
    """Links to files of the repository → links between the pages made of them."""

    def target(match: re.Match) -> str:
        place = places.get((source.parent / match[1]).resolve())
        return match[1] if place is None else relative(place, places[source].parent)

    return LINK.sub(target, LINKED.sub(r"`\1`", text))


def relative(place: Path, folder: Path) -> str:
    return Path(os.path.relpath(place, folder)).as_posix()


def page_of(notebook: Path) -> tuple[str, list[str]]:
    """A notebook's Markdown, with an empty element for each output, and the outputs' HTML."""
    parts, outputs = ["---\nhide: [toc]\n---"], []
    for cell in nbformat.read(notebook, as_version=4).cells:
        if cell.cell_type != "code":
            parts.append(cell.source)
            continue
        if cell.source.strip():
            parts.append(f"```python\n{cell.source}\n```")
        for output in cell.outputs:
            parts.append(f'<div class="vldnp-output" id="output-{len(outputs)}"></div>')
            outputs.append(html_of(output))
    return "\n\n".join(parts) + "\n", outputs


def html_of(output) -> str:
    """What JupyterLab would show of an output: HTML, else an image, else text."""
    data = output.get("data", {})
    if "text/html" in data:
        return data["text/html"]
    if "image/png" in data:
        image = data["image/png"].replace("\n", "")
        return f'<img alt="figure" src="data:image/png;base64,{image}">'
    text = output.get("text") or data.get("text/plain") or "\n".join(output.get("traceback", []))
    return f"<pre>{html.escape(text)}</pre>"


def api() -> str:
    """The public names of `vldnp` with signatures and docstrings, as Markdown."""
    parts = ["# API reference\n\nThe public names of `vldnp`, with their docstrings."]
    for name in sorted(vldnp.__all__, key=str.lower):
        thing = getattr(vldnp, name)
        parts.append(f"## {name}\n\n{documented(name, thing)}")
        for part, own in vars(thing).items() if inspect.isclass(thing) else ():
            own = getattr(own, "__func__", own)  # of a class method
            if not part.startswith("_") and inspect.isfunction(own) and own.__doc__:
                parts.append(f"### {name}.{part}\n\n{documented(part, own)}")
    return "\n\n".join(parts) + "\n"


def documented(name: str, thing) -> str:
    """Signature and docstring as blocks of text."""
    how = {"subsequent_indent": "    ", "break_long_words": False, "break_on_hyphens": False}
    signature = textwrap.fill(f"{name}{inspect.signature(thing)}", 88, **how)
    return f"```python\n{signature}\n```\n\n```text\n{inspect.getdoc(thing)}\n```"


def main(folder: Path) -> None:
    pages, places, outputs = folder / "pages", sources(), {}
    for old in (pages, folder / "docs"):
        shutil.rmtree(old, ignore_errors=True)
    for source, place in places.items():
        target = pages / place
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.suffix == ".png":
            shutil.copyfile(source, target)
            continue
        if source.suffix == ".ipynb":
            text, outputs[place] = page_of(source)
        else:
            text = source.read_text(encoding="utf-8")
        target.write_text(linked(text, source, places), encoding="utf-8")
    (pages / "api.md").write_text(api(), encoding="utf-8")
    (pages / "site.css").write_text(CSS, encoding="utf-8")
    shutil.copyfile(ROOT / "zensical.toml", folder / "zensical.toml")
    subprocess.run([sys.executable, "-m", "zensical", "build", "--strict"], cwd=folder, check=True)
    for place, found in outputs.items():
        page = folder / "docs" / place.with_suffix("") / "index.html"
        text = page.read_text(encoding="utf-8")
        for number, output in enumerate(found):
            empty = f'id="output-{number}">'
            assert text.count(empty) == 1, (page, empty)
            text = text.replace(empty, f'id="output-{number}">{output}')
        page.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else ROOT / "build"))
