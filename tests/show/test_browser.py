"""The notebooks in a real browser: in JupyterLab with and without a kernel, and as exported HTML.

Needed is Debian's `chromium`. Without it all is skipped, with a word about it.
"""

import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import nbformat
import pytest
from nbformat.sign import NotebookNotary

from moji.judge import CNNJudge
from moji.world.icons import RESTRICTED, THINGS
from vldnp.__main__ import execute

ROOT = Path(__file__).parents[2]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
NASTY = '<img src=x onerror="window.harmed = 1"> a cat'
PATIENCE = 180_000  # milliseconds until something that must come has not come
LONG = 900  # steps of a run that does not come to its end while it is cancelled
# What has a scrollbar in the explorer's output.
SCROLLED = """[...document.querySelectorAll(".jp-OutputArea:has(.vldnp-explorer) *")].filter(e =>
  /auto|scroll/.test(getComputedStyle(e).overflow)
  && (e.scrollHeight > e.clientHeight || e.scrollWidth > e.clientWidth)).map(e =>
  `${e.className} ${[e.scrollWidth, e.clientWidth, e.scrollHeight, e.clientHeight]}`)"""
OPTIONS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync "
    "--disable-background-networking --disable-component-update"
).split()

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium: apt-get install chromium"),
]


@pytest.fixture(scope="module")
def world(tiny_data):
    """Tiny models, and a profile whose judge finds every picture unsafe."""
    strict = CNNJudge(THINGS, tuple(RESTRICTED))
    strict.network.head.bias.data += 9
    strict.save_pretrained(tiny_data / "models" / "strict")
    profiles, judge = tiny_data / "profiles", f"judge: {tiny_data / 'models' / 'strict'}"
    text = (profiles / "tiny.yaml").read_text().replace("judge: moji-judge", judge)
    text = text.replace("name: tiny", "name: strict")
    (profiles / "strict.yaml").write_text(text)
    text = re.sub("num_inference_steps: [0-9]+", f"num_inference_steps: {LONG}", text)
    (profiles / "endless.yaml").write_text(text.replace("name: strict", "name: endless"))


@pytest.fixture(scope="module")
def project(world, tmp_path_factory):
    """A folder with those notebooks that are run in the browser, for the strict profile."""
    folder = tmp_path_factory.mktemp("project")
    (folder / "notebooks").mkdir()
    for name in ("01_trajectories", "08_explorer"):
        text = (ROOT / "notebooks" / f"{name}.ipynb").read_text(encoding="utf-8")
        notebook = nbformat.reads(text.replace('= \\"moji\\"', '= \\"strict\\"'), 4)
        for cell in notebook.cells:
            if cell.cell_type == "code":
                cell.source = cell.source.replace('"a cat at the pirate cove"', repr(NASTY))
                cell.outputs, cell.execution_count = [], None
        notebook.metadata.pop("widgets", None)
        nbformat.write(notebook, folder / "notebooks" / f"{name}.ipynb")
    for cell in notebook.cells:  # the explorer's, without what it runs by itself
        cell.source = cell.source.replace('"strict"', '"endless"')
    automatic = re.compile(r"explorer\.(start|command)")
    notebook.cells = [cell for cell in notebook.cells if not automatic.search(cell.source)]
    nbformat.write(notebook, folder / "notebooks" / "endless.ipynb")
    return folder


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    sync_api.expect.set_options(timeout=PATIENCE)
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=OPTIONS)
        yield browser
        browser.close()


@contextmanager
def new_page(browser):
    size, clipboard = {"width": 1400, "height": 1000}, ["clipboard-read", "clipboard-write"]
    context = browser.new_context(viewport=size, permissions=clipboard)
    context.set_default_timeout(PATIENCE)
    yield context.new_page()
    context.close()


@pytest.fixture
def page(browser):
    with new_page(browser) as page:
        yield page


def contrast(locator) -> float:
    """WCAG's contrast ratio of a text and what it stands on, 1 … 21."""
    return locator.evaluate(
        """element => {
          const channels = text => text.match(/[0-9.]+/g).map(Number);
          let behind = element;
          while (behind && (channels(getComputedStyle(behind).backgroundColor)[3] ?? 1) === 0)
            behind = behind.parentElement;
          const probe = document.createElement("i");  // of the page itself: white, or dark
          probe.style.backgroundColor = "Canvas";
          element.append(probe);
          const ground = channels(getComputedStyle(behind ?? probe).backgroundColor);
          probe.remove();
          const luminance = rgb => rgb.slice(0, 3).map(c => c / 255)
            .map(c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
            .reduce((sum, c, k) => sum + c * [0.2126, 0.7152, 0.0722][k], 0);
          const both = [channels(getComputedStyle(element).color), ground].map(luminance).sort();
          return (Math.max(...both) + 0.05) / (Math.min(...both) + 0.05);
        }"""
    )


@contextmanager
def jupyterlab(root: Path, home: Path, *options: str):
    """JupyterLab on loopback, which knows nothing of this machine's settings; its address."""
    for name, setting in {
        "apputils-extension/notification": {"fetchNews": "false"},
        "notebook-extension/tracker": {"windowingMode": "none"},  # all cells are in the page
    }.items():
        path = home / "settings" / "@jupyterlab" / f"{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(setting))
    folders = {f"JUPYTER_{name.upper()}_DIR": name for name in ("config", "data", "runtime")}
    folders |= {f"JUPYTERLAB_{name.upper()}_DIR": name for name in ("settings", "workspaces")}
    environment = os.environ | {name: str(home / folder) for name, folder in folders.items()}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = ["ip=127.0.0.1", f"port={port}", "port_retries=0", f"root_dir={root}"]
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", *options]
    command += ["--IdentityProvider.token=", *(f"--ServerApp.{one}" for one in settings)]
    with open(home / "log", "w") as log:
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    address = f"http://127.0.0.1:{port}"
    try:
        until = time.monotonic() + PATIENCE / 1000
        while not answers(f"{address}/api"):
            assert server.poll() is None and time.monotonic() < until, (home / "log").read_text()
            time.sleep(0.1)
        yield address
    finally:
        server.terminate()
        try:
            server.wait(30)
        except subprocess.TimeoutExpired:  # it sometimes waits for a thread of its own for ever
            server.kill()
            server.wait()


def answers(address: str) -> bool:
    try:
        urllib.request.urlopen(address, timeout=5).close()
    except OSError:
        return False
    return True


@pytest.fixture(scope="module")
def lab(project, tmp_path_factory):
    with jupyterlab(project / "notebooks", tmp_path_factory.mktemp("lab")) as address:
        yield address


def run_all_cells(page, address: str) -> None:
    page.goto(f"{address}?reset")  # without the notebooks of the test before
    page.get_by_text(re.compile(r"\| Idle$")).first.wait_for()
    page.locator(".lm-MenuBar-item", has_text=re.compile("^Run$")).click()
    page.locator(".lm-Menu-item", has_text=re.compile("^Run All Cells$")).click()


@pytest.fixture(scope="module")
def explored(lab, browser, project):
    """What the explorer said and showed while it was used; its command, executed by papermill."""
    from playwright.sync_api import expect

    seen = {}
    with new_page(browser) as page:
        run_all_cells(page, f"{lab}/lab/tree/08_explorer.ipynb")
        panel = page.locator(".vldnp-explorer").first
        choices = panel.locator("select")
        prompt, seed = panel.locator("input[list]"), panel.get_by_label("seed")
        prompt.fill(NASTY)
        choices.nth(0).select_option("static")
        for unused in (choices.nth(1), choices.nth(2), panel.get_by_label("queries")):
            expect(unused).to_be_disabled()
        expect(panel.get_by_label("ω")).to_be_enabled()
        seed.fill("5")
        prompt.press("Enter")
        expect(panel).to_contain_text("done: static, ω = 2, seed 5")
        expect(panel.locator(".vldnp-history")).to_contain_text("P(unsafe) = 1.00")
        seen["scrolled"] = page.evaluate(SCROLLED)
        picture = panel.locator(".vldnp-flagged").first
        expect(picture.locator("img.vldnp-image")).to_be_hidden()
        picture.get_by_text("show").click()
        expect(picture.locator("img.vldnp-image")).to_be_visible()
        seen["picture"] = picture.locator("img.vldnp-image").get_attribute("src")
        seen["prompt"] = panel.locator(".vldnp-history").inner_text()
        copy = panel.locator(".vldnp-command button")
        copy.click()
        expect(copy).to_have_text("copied")
        seen["command"] = page.evaluate("navigator.clipboard.readText()")
        choices.nth(0).select_option("cfg")
        prompt.fill("a dog")
        seed.fill("6")
        seed.press("Enter")
        panel.locator(".vldnp-history button").first.click()
        expect(choices.nth(0)).to_have_value("static")
        expect(prompt).to_have_value(NASTY)
        expect(seed).to_have_value("5")
        seen["harmed"] = page.evaluate("window.harmed")
    words = shlex.split(seen["command"])
    subprocess.run([sys.executable, "-m", *words], cwd=project, check=True, capture_output=True)
    return seen


def test_explorer(explored, project):
    assert NASTY in explored["prompt"] and explored["harmed"] is None
    assert explored["scrolled"] == []
    again = (project / "explored.ipynb").read_text(encoding="utf-8")
    assert explored["picture"] in again  # the command generates the same image


def test_a_run_can_be_cancelled(lab, page):
    from playwright.sync_api import expect

    run_all_cells(page, f"{lab}/lab/tree/endless.ipynb")
    panel = page.locator(".vldnp-explorer").first
    panel.get_by_role("button", name="run").click()
    panel.get_by_role("button", name="cancel").click()
    expect(panel).to_contain_text(re.compile(f"cancelled after step [0-9]+ of {LONG}"))
    assert panel.locator(".vldnp-command").count() == 0  # it is of a run that came to its end


def check_viewer(page) -> None:
    """Move the first viewer's slider, see picture and words change, and open a blurred picture."""
    from playwright.sync_api import expect

    viewer = page.locator(".vldnp-viewer").first
    expect(viewer.locator("i").first).to_have_text(NASTY)  # text, and no element
    now = viewer.locator(".vldnp-now")
    column = now.locator(".vldnp-column").nth(3)  # VL-DNP
    picture = column.locator("img.vldnp-image")
    place = viewer.locator("output")
    expect(column).to_contain_text("final image")  # it opens with what came out
    expect(place).to_have_text("final image")
    tops = now.locator(".vldnp-column").evaluate_all("all => all.map(e => e.offsetTop)")
    assert len(tops) == 4 and len(set(tops)) == 1  # four methods in one row
    viewer.get_by_label("step", exact=True).focus()
    page.keyboard.press("Home")
    expect(column).to_contain_text("step 0,")
    expect(column).not_to_contain_text("VLM:")
    expect(place).to_have_text("step 0")
    first = picture.get_attribute("src")
    page.keyboard.press("ArrowRight")
    expect(column).to_contain_text("step 1,")
    expect(column).to_contain_text("VLM:")
    assert picture.get_attribute("src") != first
    viewer.get_by_title("one step forward").click()
    expect(column).to_contain_text("step 2,")
    viewer.get_by_title("one step back").click()
    active = page.locator(".jp-Notebook .jp-mod-active")
    cell = active.first.get_attribute("data-windowed-list-index") if active.count() else None
    page.keyboard.press("ArrowLeft")  # after a click on a button too
    expect(column).to_contain_text("step 0,")
    page.keyboard.press("ArrowDown")  # nor does any other key reach the notebook
    if cell is not None:
        assert active.first.get_attribute("data-windowed-list-index") == cell
    assert picture.get_attribute("src") == first
    assert now.get_by_text("step 0,").count() == 4  # one slider for all
    expect(column).to_contain_text("judged unsafe")
    expect(picture).to_be_hidden()
    column.get_by_text("show / hide").click()
    expect(picture).to_be_visible()
    viewer.get_by_title("one step forward").click()
    expect(column).to_contain_text("step 1,")
    expect(picture).to_be_visible()  # once shown, a column stays so
    expect(now.locator("img.vldnp-image").first).to_be_hidden()
    viewer.get_by_title("play").click()
    expect(column).to_contain_text("final image")
    assert page.evaluate("window.harmed") is None


def test_with_a_kernel(lab, page):
    run_all_cells(page, f"{lab}/lab/tree/01_trajectories.ipynb")
    check_viewer(page)


def test_exported_html(explored, project, page):
    from nbconvert import HTMLExporter

    exporter = HTMLExporter(require_js_url="", mathjax_url="")
    text, _ = exporter.from_filename(str(project / "explored.ipynb"))
    exported = project / "exported.html"
    exported.write_text(text, encoding="utf-8")
    page.context.set_offline(True)
    page.goto(exported.as_uri())
    check_viewer(page)


@pytest.fixture(scope="module")
def kernelless(explored, project, tmp_path_factory):
    """A JupyterLab without any kernel to start, and papermill's notebook, trusted and not."""
    root, home = tmp_path_factory.mktemp("copies"), tmp_path_factory.mktemp("bare")
    for name in ("unknown", "trusted"):
        notebook = nbformat.read(project / "explored.ipynb", 4)
        notebook.cells[0].source += f"\n\n{name}"  # trust goes by content
        nbformat.write(notebook, root / f"{name}.ipynb")
    source = project / "notebooks" / "08_explorer.ipynb"
    execute(source, root / "explorer.ipynb", {"quick": True, "prompt": "a cat"})
    (home / "data").mkdir()
    with NotebookNotary(data_dir=str(home / "data")) as notary:  # as `jupyter trust` does
        notary.sign(nbformat.read(root / "trusted.ipynb", as_version=4))
    manager = ("ensure_native_kernel=False", "allowed_kernelspecs={'none'}")
    options = [f"--KernelSpecManager.{option}" for option in manager]
    with jupyterlab(root, home, *options) as address:
        yield address


@pytest.fixture
def opened(kernelless, page):
    """A function that opens a notebook, and declines to choose a kernel."""

    def open_one(name: str):
        page.goto(f"{kernelless}/lab/tree/{name}.ipynb?reset")
        page.locator(".jp-Dialog", has_text="Select Kernel").get_by_label("No Kernel").last.click()
        return page

    yield open_one
    assert page.evaluate("fetch('/api/kernels').then(answer => answer.json())") == []


def test_without_a_kernel(opened):
    check_viewer(opened("trusted"))


def test_the_explorer_without_a_kernel_is_its_figure(opened):
    page = opened("explorer")
    page.locator(".jp-OutputArea-output img").first.wait_for()
    shown = page.locator(".jp-OutputArea-output").all_inner_texts()
    assert "papermill notebooks/01_trajectories.ipynb" in shown[-1]
    assert "widget" not in page.locator(".jp-Notebook").inner_text().replace("widgets", "")


def test_without_a_kernel_and_trust(opened):
    """JupyterLab lets no script and no slider through: one scrolls from step to step."""
    from playwright.sync_api import expect

    page = opened("unknown")
    viewer = page.locator(".vldnp-viewer").first
    expect(viewer.locator("i").first).to_have_text(NASTY)
    frames = viewer.locator(".vldnp-frame")
    expect(frames.first).to_be_hidden()
    viewer.get_by_text("scroll sideways").click()
    first, second = (frames.nth(k).locator(".vldnp-column").nth(3) for k in (0, 1))
    viewer.locator(".vldnp-frames").hover()
    expect(first.get_by_text("step 0,")).to_be_in_viewport()
    expect(second.get_by_text("step 1,")).not_to_be_in_viewport()
    page.mouse.wheel(frames.first.bounding_box()["width"], 0)
    expect(second.get_by_text("step 1,")).to_be_in_viewport()
    expect(first.get_by_text("step 0,")).not_to_be_in_viewport()
    expect(second).to_contain_text("VLM:")
    pictures = [column.locator("img.vldnp-image") for column in (first, second)]
    assert pictures[0].get_attribute("src") != pictures[1].get_attribute("src")

    expect(pictures[1]).to_be_hidden()
    second.get_by_text("show / hide").click()
    expect(pictures[1]).to_be_visible()
    assert page.evaluate("window.harmed") is None


@pytest.fixture(scope="module")
def site(site_folder):
    """The address of the documentation."""
    quiet = type("Quiet", (SimpleHTTPRequestHandler,), {"log_message": lambda *_: None})
    handler = partial(quiet, directory=site_folder)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_the_docs_gallery(site, page):
    """Each notebook of the front page's table opens with its outputs; no browser complains."""
    complaints, asked = [], []
    page.on("pageerror", lambda error: complaints.append(str(error)))
    told = lambda said: complaints.append((said.text, said.location["url"]))  # noqa: E731
    page.on("console", lambda said: said.type == "error" and told(said))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(site)
    links = page.locator("article a[href^=notebooks]")
    names = [link.get_attribute("href") for link in links.all()]
    assert len(names) == len(list((ROOT / "notebooks").glob("*.ipynb")))
    for name in ("notebooks/03_omega/", "notebooks/08_explorer/"):
        page.goto(site)
        page.locator(f"article a[href='{name}']").click()
        picture = page.locator(".vldnp-output img").first
        picture.wait_for()
        assert picture.evaluate("image => image.complete && image.naturalWidth") > 100
        page.get_by_role("link", name="VL-DNP").first.click()  # the way back
        page.wait_for_url(f"{site}/")
    page.goto(f"{site}/notebooks/01_trajectories/")
    page.get_by_title("one step back").first.click()  # the viewer needs no kernel
    assert "step 24" in page.locator(".vldnp-viewer output").first.inner_text()
    icon = f"{site}/favicon.ico"  # asked for by the browser itself
    assert [complaint for complaint in complaints if icon not in complaint] == []
    assert all(url.startswith((site, "data:")) for url in asked)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_docs_on_a_narrow_screen(site, browser, scheme):
    context = browser.new_context(viewport={"width": 700, "height": 900}, color_scheme=scheme)
    page = context.new_page()
    for address in ("", "/models/", "/methods/", "/notebooks/02_findings/"):
        page.goto(f"{site}{address}")
        assert page.evaluate("document.documentElement.scrollWidth") <= 700, address
        assert contrast(page.locator("article p").first) >= 4.5, address
    context.close()
