"""The notebooks' widgets in a real browser: the viewer in exported HTML, without a kernel.

Needed are Debian's `chromium` and, for exported HTML, the widget manager as `.ci/run` puts it into
`.cache/npm`. What is not there is skipped, with a word about it.
"""

import functools
import http.server
import shutil
import tarfile
import threading
from pathlib import Path

import pytest
import tiny_world

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
