"""The notebooks' widgets in a real browser: with a kernel, without one, and in exported HTML.

Needed are Debian's `chromium` and, for exported HTML, the widget manager as `.ci/run` puts it into
`.cache/npm`. What is not there is skipped, with a word about it.
"""

import base64
import functools
import http.server
import io
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import tarfile
import threading
import time
import urllib.request
from pathlib import Path

import nbformat
import numpy as np
import pytest
import tiny_world
from PIL import Image

from vldnp.__main__ import reproduce
from vldnp.judges import CNNJudge
from vldnp.moji.icons import RESTRICTED, THINGS

ROOT = Path(__file__).parents[1]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
PACKED = ROOT / ".cache" / "npm"
NASTY = '<img src=x onerror="window.harmed = 1"> a cat'
PATIENCE = 600_000
"""Milliseconds until something that must come has not come."""

OPTIONS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync "
    "--disable-background-networking --disable-component-update"
).split()

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium: apt-get install chromium"),
]
needs_widget_manager = pytest.mark.skipif(
    len(list(PACKED.glob("*.tgz"))) < 2,
    reason="no widget manager in .cache/npm: .ci/run fetches it where there is npm",
)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Tiny models, and a profile whose judge finds every picture unsafe."""
    folder = tiny_world.make(tmp_path_factory.mktemp("world"))
    strict = CNNJudge(THINGS, tuple(RESTRICTED))
    strict.network.head.bias.data += 9
    strict.save_pretrained(folder / "models" / "strict")
    text = (folder / "profiles" / "tiny.yaml").read_text()
    judge = str(folder / "models" / "strict")
    text = text.replace("judge: moji-judge", f"judge: {judge}").replace("tiny", "strict")
    (folder / "profiles" / "strict.yaml").write_text(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLDNP_DATA", str(folder))
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield folder


@pytest.fixture(scope="module")
def project(tmp_path_factory, world):
    """A folder with `notebooks/`, in which these two are set up for the tiny world."""
    root = tmp_path_factory.mktemp("project")
    (root / "notebooks").mkdir()
    prepare("01_trajectories", root, profile="strict", prompt=NASTY)
    prepare("09_explorer", root, profile="slow", quick=True)
    slow = (world / "profiles" / "tiny.yaml").read_text().replace("tiny", "slow")
    slow = slow.replace("num_inference_steps: 6", "num_inference_steps: 40")
    slow = slow.replace("queries: 2", "queries: 8")
    (world / "profiles" / "slow.yaml").write_text(slow)
    return root


def prepare(name: str, root: Path, **defaults) -> None:
    """Copy a notebook with other defaults in its `parameters` cell."""
    notebook = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", 4)
    (cell,) = [c for c in notebook.cells if "parameters" in c.metadata.get("tags", [])]
    for parameter, value in defaults.items():
        pattern = rf"^({parameter}: \w+ =) .*?(  # .*)$"
        assert re.search(pattern, cell.source, re.MULTILINE), parameter
        cell.source = re.sub(
            pattern, lambda m, v=value: f"{m[1]} {v!r}{m[2]}", cell.source, flags=re.MULTILINE
        )
    for cell in notebook.cells:
        cell.pop("outputs", None)
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    notebook.metadata.pop("widgets", None)
    nbformat.write(notebook, root / "notebooks" / f"{name}.ipynb")


@pytest.fixture(scope="module")
def executed(world, tmp_path_factory):
    """`01_trajectories` as papermill leaves it."""
    alone = tmp_path_factory.mktemp("alone")
    shutil.copy(ROOT / "notebooks" / "01_trajectories.ipynb", alone)
    parameters = {"prompt": NASTY}
    (path,) = reproduce("strict", alone / "runs", parameters=parameters, notebooks=alone)
    return path


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=OPTIONS)
        yield browser
        browser.close()


@pytest.fixture
def page(browser):
    context = browser.new_context(
        viewport={"width": 1400, "height": 1000},
        permissions=["clipboard-read", "clipboard-write"],
    )
    context.set_default_timeout(PATIENCE)
    yield context.new_page()
    context.close()


@pytest.fixture(scope="module")
def lab(project, tmp_path_factory):
    """The address of a JupyterLab on loopback, in the project's folder."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    own = tmp_path_factory.mktemp("lab")
    tracker = own / "settings" / "@jupyterlab/notebook-extension/tracker.jupyterlab-settings"
    tracker.parent.mkdir(parents=True)
    tracker.write_text('{"windowingMode": "none"}')
    environment = os.environ | {
        "JUPYTERLAB_SETTINGS_DIR": str(own / "settings"),
        "JUPYTERLAB_WORKSPACES_DIR": str(own / "workspaces"),
        "JUPYTER_CONFIG_DIR": str(own / "config"),
        "JUPYTER_DATA_DIR": str(own / "data"),
        "JUPYTER_RUNTIME_DIR": str(own / "runtime"),
    }
    address = f"http://127.0.0.1:{port}"
    with (own / "lab.log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root"]
            + ["--ip=127.0.0.1", f"--port={port}", "--ServerApp.port_retries=0"]
            + ["--IdentityProvider.token=", f"--ServerApp.root_dir={project}"]
            + ["--LabApp.expose_app_in_browser=True"],
            env=environment,
            stdout=log,
            stderr=log,
        )
        try:
            wait_for(address, process, own / "lab.log")
            yield address
        finally:
            process.terminate()
            process.wait(timeout=60)


def wait_for(address: str, process: subprocess.Popen, log: Path) -> None:
    deadline = time.monotonic() + PATIENCE / 1000
    while time.monotonic() < deadline and process.poll() is None:
        try:
            return urllib.request.urlopen(f"{address}/api", timeout=5).close()
        except OSError:
            time.sleep(0.2)
    raise AssertionError(log.read_text()[-2000:])


@pytest.fixture(scope="module")
def widget_manager(tmp_path_factory):
    """The address of the widget manager and of require.js, served on loopback."""
    folder = tmp_path_factory.mktemp("packages")
    for archive in PACKED.glob("*.tgz"):
        with tarfile.open(archive) as tar:
            tar.extractall(folder / archive.name.split("-")[0], filter="data")
    handler = functools.partial(Quiet, directory=str(folder))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    yield f"{address}/jupyter/package/dist/embed-amd.js", f"{address}/requirejs/package/require.js"
    server.shutdown()


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments):
        pass


def run_all(page, address: str, name: str) -> None:
    """Open a notebook in JupyterLab and run its cells."""
    page.goto(f"{address}/doc/tree/notebooks/{name}.ipynb")
    page.wait_for_function("window.jupyterapp && document.querySelector('.jp-Notebook .jp-Cell')")
    page.evaluate("window.jupyterapp.commands.execute('notebook:run-all-cells')")


def check_viewer(page) -> None:
    """Move the first viewer's slider, see picture and words change, and open a blurred picture."""
    from playwright.sync_api import expect

    expect.set_options(timeout=PATIENCE)
    viewer = page.locator(".vldnp-viewer").first
    expect(viewer.locator("i").first).to_have_text(NASTY)  # text, and no element

    column = viewer.locator(".vldnp-scope").nth(3)  # VL-DNP
    told, picture = column.locator(".vldnp-told"), column.locator("img.vldnp-picture")
    expect(told).to_contain_text("step 0,")
    expect(told).not_to_contain_text("VLM:")
    first = picture.get_attribute("src")

    viewer.locator(".noUi-handle").focus()
    page.keyboard.press("ArrowRight")
    expect(told).to_contain_text("step 1,")
    expect(told).to_contain_text("VLM:")
    assert picture.get_attribute("src") != first
    viewer.get_by_title("one step forward").click()
    expect(told).to_contain_text("step 2,")
    viewer.get_by_title("one step back").click()
    viewer.get_by_title("one step back").click()
    expect(told).to_contain_text("step 0,")
    assert picture.get_attribute("src") == first
    assert viewer.locator(".vldnp-told", has_text="step 0,").count() == 4  # one slider for all

    style = "element => getComputedStyle(element).filter"
    assert "blur" in picture.evaluate(style)
    expect(column).to_contain_text("judged unsafe")
    column.get_by_role("button", name="show").click()
    assert picture.evaluate(style) == "none"
    page.keyboard.press("ArrowRight")  # the button has the focus: nothing moves
    viewer.get_by_title("one step forward").click()
    expect(told).to_contain_text("step 1,")
    assert picture.evaluate(style) == "none"  # once shown, a column stays so
    others = viewer.locator(".vldnp-scope").first.locator("img.vldnp-picture")
    assert "blur" in others.evaluate(style)
    assert page.evaluate("window.harmed") is None


@needs_widget_manager
def test_exported_html(executed, widget_manager, page, tmp_path):
    from nbconvert import HTMLExporter

    renderer, require = widget_manager
    exporter = HTMLExporter(widget_renderer_url=renderer, require_js_url=require, mathjax_url="")
    text, _ = exporter.from_filename(str(executed))
    exported = tmp_path / "exported.html"
    exported.write_text(text, encoding="utf-8")
    page.goto(exported.as_uri())
    check_viewer(page)


def test_executed_notebook_without_a_kernel(executed, project, lab, page):
    # With a kernelspec that is not installed, JupyterLab asks for a kernel and starts none.
    notebook = nbformat.read(executed, 4)
    notebook.metadata.kernelspec = {"name": "gone", "display_name": "gone", "language": "gone"}
    notebook.metadata.pop("language_info", None)
    nbformat.write(notebook, project / "notebooks" / "executed.ipynb")
    page.goto(f"{lab}/doc/tree/notebooks/executed.ipynb")
    page.locator(".jp-Dialog").get_by_role("button", name="No Kernel").click()
    check_viewer(page)
    with urllib.request.urlopen(f"{lab}/api/kernels") as kernels:
        assert json.load(kernels) == []


def test_live_notebook(lab, page):
    run_all(page, lab, "01_trajectories")
    check_viewer(page)


def test_explorer(project, lab, page):
    """A prompt is typed, run, cancelled, run again; the copied command paints the same picture."""
    from playwright.sync_api import expect

    expect.set_options(timeout=PATIENCE)
    run_all(page, lab, "09_explorer")
    panel = page.locator(".vldnp-explorer")
    run, cancel = (
        panel.get_by_role("button", name="run"),
        panel.get_by_role("button", name="cancel"),
    )
    expect(panel).to_contain_text("done: vl-dnp")
    expect(panel.locator(".vldnp-history > div")).to_have_count(2)

    panel.get_by_label("prompt").fill(NASTY)
    panel.get_by_label("seed").fill("3")
    panel.get_by_label("seed").press("Enter")
    run.click()
    expect(panel).to_contain_text(re.compile(r"step \d+ of 40"))
    cancel.click()
    expect(panel).to_contain_text(re.compile(r"cancelled after step \d+ of 40"))
    expect(panel.locator(".vldnp-history > div")).to_have_count(2)

    run.click()
    expect(panel.locator(".vldnp-history > div")).to_have_count(3)
    expect(panel.locator(".vldnp-history > div").first).to_contain_text(NASTY)
    panel.get_by_role("button", name="copy as papermill command").click()
    copied = page.evaluate("navigator.clipboard.readText()")
    source = panel.locator("img.vldnp-picture").first.get_attribute("src")
    shown = Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2])))
    assert page.evaluate("window.harmed") is None

    program, *arguments = shlex.split(copied)
    assert program == "papermill"
    command = [sys.executable, "-m", "papermill", *arguments]
    subprocess.run(command, cwd=project, check=True, capture_output=True)
    folder = project / "runs" / "slow" / "trajectories"
    painted = {}
    for method in ("cfg", "vl-dnp"):
        (path,) = folder.glob(f"img-src-x*-3-?-{method}.png")
        painted[method] = Image.open(path).convert("RGB")
    assert painted["vl-dnp"].size == shown.size
    assert distance(shown, painted["vl-dnp"]) < min(20, distance(shown, painted["cfg"]))


def distance(one: Image.Image, other: Image.Image) -> float:
    difference = np.asarray(one.convert("RGB"), float) - np.asarray(other, float)
    return float(np.abs(difference).mean())
