"""Public prompt sets, with files and loopback servers in place of the real ones."""

import functools
import hashlib
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest
import yaml

from vldnp._files import data_folder
from vldnp.study import prompts
from vldnp.study.prompts import REQUIRED, load_prompts, public_sets

SAMPLES = {  # header and a row of each published format
    "coco": "case_number,source,prompt,evaluation_seed,coco_id\n5,coco-30k,a bicycle,4133,203\n",
    "coco-100": "case_number,source,prompt,evaluation_seed,coco_id\n5,coco,a bicycle,4133,203\n",
    "ring-a-bell-16": "prompt,case_number,evaluation_seed\nfoo bar,0,7\n",
    "ring-a-bell-38": ",prompt\n0,foo bar\n",
    "ring-a-bell-77": "prompt\nfoo bar\n",
    "ring-a-bell-sensitive": "clean prompt,sensitive prompt\na person,foo bar\n",
    "p4d": "prompt,evaluation_seed,evaluation_guidance\nfoo bar,7,7.5\n",
    "unlearn-diff": "prompt,evaluation_seed,evaluation_guidance\nfoo bar,7,7.5\n",
    "mma": "target_prompt,adv_prompt\nplain,foo bar\n",
    "i2p": "case_number,prompt,categories,evaluation_seed,evaluation_guidance\n"
    '1,x,"hate, sexual",7,7\n2,y,violence,8,7\n',
}


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("VLDNP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "prompts"


@pytest.fixture
def any_number(monkeypatch):
    """Files of any content and number of prompts are taken for the published ones."""
    free = {"prompts": None, "sha256": None}
    free = {n: {k: v for k, v in (known | free).items() if v} for n, known in public_sets().items()}
    monkeypatch.setattr(prompts, "public_sets", lambda: free)


@pytest.fixture
def public(tmp_path, monkeypatch):
    """Replaces the descriptions: `public(name={...})`."""

    def describe(**sets):
        (tmp_path / "data" / "prompts").mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / "profiles").mkdir(exist_ok=True)
        known = {"about": "a set", "home": "https://example.org", "licence": "MIT"}
        text = yaml.safe_dump({name: known | described for name, described in sets.items()})
        (tmp_path / "data" / "prompts" / "public.yaml").write_text(text)
        monkeypatch.setenv("VLDNP_DATA", str(tmp_path / "data"))

    return describe


@pytest.fixture
def server(tmp_path):
    """A loopback web server of `tmp_path / "web"`; half of what is called `short` is cut off."""
    folder = tmp_path / "web"
    folder.mkdir()

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

        def copyfile(self, source, outputfile):
            content = source.read()
            outputfile.write(content[: len(content) // (2 if "short" in self.path else 1)])

    handler = functools.partial(Quiet, directory=str(folder))
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield SimpleNamespace(folder=folder, address=f"http://127.0.0.1:{server.server_port}")
    server.shutdown()
    server.server_close()


def test_every_public_set_is_described_and_pinned():
    assert set(public_sets()) == set(SAMPLES)
    for name, known in public_sets().items():
        assert {"about", "home", "licence"} <= known.keys(), name
        pinned = any(len(part) == 40 for part in known.get("url", "").split("/"))  # by its commit
        assert pinned or "url" not in known


@pytest.mark.parametrize("name", SAMPLES)
def test_every_published_format_is_read(name, cache, any_number):
    cache.mkdir(parents=True)
    (cache / f"{name}.csv").write_text(SAMPLES[name])  # by hand
    table = load_prompts(name)
    assert all(table[column].notna().all() for column in REQUIRED)
    assert table["prompt"][0] in {"foo bar", "a bicycle", "x"}
    if name == "i2p":
        assert load_prompts("i2p:violence")["prompt"].tolist() == ["y"]
        assert load_prompts("i2p:hate")["guidance_scale"].tolist() == [7]
        with pytest.raises(ValueError, match="'sexy': did you mean 'sexual'.*hate, sexual, viol"):
            load_prompts("i2p:sexy")
    if "seed" not in SAMPLES[name]:
        assert table["seed"].tolist() == [1], "as in the scripts of arXiv 2510.26052"
    if name == "p4d":
        assert table.loc[0, ["seed", "guidance_scale"]].tolist() == [7, 7.5]
    assert not list((data_folder() / "prompts").glob(f"{name}.csv"))


def test_a_set_is_downloaded_once(cache, public, server):
    file = server.folder / "set.csv"
    file.write_text("prompt,seed\na cat,1\na cat,2\n")
    known = {"url": f"{server.address}/set.csv", "prompts": 2}
    public(cats=known | {"sha256": hashlib.sha256(file.read_bytes()).hexdigest()})
    assert load_prompts("cats")["seed"].tolist() == [1, 2]
    assert [path.name for path in cache.iterdir()] == ["cats.csv"]
    file.unlink()
    assert load_prompts("cats")["seed"].tolist() == [1, 2]
    (cache / "cats.csv").write_text("prompt,seed\na cat,1\na cat,3\n")
    with pytest.raises(ValueError, match="cats.csv has SHA-256 .*, not the published "):
        load_prompts("cats")
    public(cats=known)
    assert load_prompts("cats")["seed"].tolist() == [1, 3]
    (cache / "cats.csv").write_text("prompt,seed\na cat,1\n")
    with pytest.raises(ValueError, match="cats.csv has 1 prompts, not the published 2"):
        load_prompts("cats")
    with pytest.raises(ValueError, match="unknown prompt set 'cat': did you mean 'cats'"):
        load_prompts("cat")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("page.csv", "<html>\n<p>Please, log in</p>\n", "cats.csv is no table.* fields in line 2"),
        ("other.csv", "words,seed\na cat,1\n", "lacks prompt"),
        ("more.csv", "prompt,seed\na cat,1\na cat,2\n", "has 2 prompts, not the published 1"),
        ("short.csv", "prompt,seed\na cat,1\n", "IncompleteRead"),
        ("gone.csv", None, "HTTP Error 404"),
        (None, None, "no address is public"),
    ],
)
def test_what_is_no_prompt_set_is_not_kept(cache, public, server, name, text, message):
    if text:
        (server.folder / name).write_text(text)
    public(cats={"prompts": 1} | ({"url": f"{server.address}/{name}"} if name else {}))
    message = f"'cats' cannot be downloaded: .*{message}"
    with pytest.raises(FileNotFoundError, match=message) as told:
        load_prompts("cats")
    assert "\n" not in str(told.value) and not list(cache.glob("*"))
    there = f"; get it from https://example.org and save it as {cache / 'cats'}"
    assert there in str(told.value)


def test_what_is_given_on_request_is_named(cache):
    with pytest.raises(FileNotFoundError, match=r"get Nudity_eta_3_K_16.csv from https://") as told:
        load_prompts("ring-a-bell-16")
    assert str(told.value).endswith(f"save it as {cache / 'ring-a-bell-16.csv'}")
