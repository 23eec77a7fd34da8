"""Fetching public prompt sets, with files and loopback servers in place of the real ones."""

import functools
import hashlib
import json
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pandas as pd
import pytest
import yaml

from vldnp.__main__ import main
from vldnp._files import data_folder
from vldnp.study import public as datasets
from vldnp.study.prompts import REQUIRED, fetch_prompts, load_prompts

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
    """Files of any number of prompts are taken for the published ones."""
    counted = datasets.public_sets()
    free = {name: {**known, "prompts": None} for name, known in counted.items()}
    monkeypatch.setattr(datasets, "public_sets", lambda: free)


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
    """A loopback web server of `tmp_path / "web"`."""
    folder = tmp_path / "web"
    folder.mkdir()

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    handler = functools.partial(Quiet, directory=str(folder))
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield SimpleNamespace(folder=folder, address=f"http://127.0.0.1:{server.server_port}")
    server.shutdown()
    server.server_close()


def test_every_public_set_is_described_and_pinned():
    assert set(datasets.public_sets()) == set(SAMPLES)
    for name, known in datasets.public_sets().items():
        assert {"about", "home", "licence"} <= known.keys(), name
        if (url := known.get("url", "hub://")).startswith("hub://"):
            assert "url" not in known or datasets.ADDRESS.fullmatch(url)
        else:
            assert any(len(part) == 40 for part in url.split("/")), "a fixed commit"


@pytest.mark.parametrize("name", SAMPLES)
def test_every_published_format_is_read(name, cache, tmp_path, any_number):
    (tmp_path / "given.csv").write_text(SAMPLES[name])
    fetch_prompts(name, tmp_path / "given.csv")
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


def test_fetched_over_http_and_recorded(cache, public, server):
    data = b"prompt,seed\na cat,1\na cat,2\n"
    (server.folder / "set.csv").write_bytes(data)
    public(cats={"url": f"{server.address}/set.csv"})
    with pytest.raises(FileNotFoundError, match="python -m vldnp data fetch cats"):
        load_prompts("cats")
    assert main(["data", "fetch", "cats"]) == 0
    record = json.loads((cache / "fetched.json").read_text())["cats"]
    assert record["sha256"] == hashlib.sha256(data).hexdigest()
    assert load_prompts("cats")["seed"].tolist() == [1, 2]
    assert {p.name for p in cache.iterdir()} == {"cats.csv", "fetched.json"}


def test_what_was_recorded_first_is_what_must_come_again(cache, public, tmp_path, capsys):
    file = tmp_path / "set.csv"
    file.write_text("prompt,seed\na cat,1\n")
    public(cats={"url": file.as_uri()})
    assert main(["data", "fetch", "cats"]) == main(["data", "fetch", "cats"]) == 0
    file.write_text("prompt,seed\na dog,1\n")
    assert main(["data", "fetch", "cats"]) == 2
    assert "that published or first fetched" in capsys.readouterr().err
    assert load_prompts("cats")["prompt"].tolist() == ["a cat"]
    (cache / "cats.csv").write_text("prompt,seed\na bird,1\n")
    with pytest.raises(ValueError, match="was changed since it was fetched"):
        load_prompts("cats")
    public(dogs={"url": file.as_uri(), "sha256": "0" * 64})
    with pytest.raises(ValueError, match="has SHA-256 .*, not 0{64}, that published or first"):
        fetch_prompts("dogs")
    assert not (cache / "dogs.csv").exists()


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (
            "page.csv",
            "<html>\n<p>Please, log in</p>\n</html>\n",
            "cats.csv is no table.* Expected 1 fields in line 2, saw 2",
        ),
        ("other.csv", "words,seed\na cat,1\n", "lacks prompt"),
        (
            "set.txt",
            "prompt,seed\na cat,1\n",
            "cats.txt is no table, CSV or TSV in UTF-8, or Parquet",
        ),
    ],
)
def test_what_is_no_prompt_set_is_not_kept(cache, public, tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    public(cats={"url": (tmp_path / name).as_uri()})
    with pytest.raises(ValueError, match=message) as error:
        fetch_prompts("cats")
    assert "\n" not in str(error.value) and not list(cache.glob("*"))


def test_a_given_file_with_another_number_of_prompts_is_refused(cache, public, tmp_path, capsys):
    public(cats={"prompts": 2})
    file = tmp_path / "given.csv"
    for rows, status in (1, 2), (3, 2), (2, 0):
        file.write_text("prompt,seed\n" + "a cat,1\n" * rows)
        assert main(["data", "fetch", "cats", "--from", str(file)]) == status
        told = capsys.readouterr().err
        if status:
            assert f"it has {rows} prompts, not 2" in told and told.count("\n") == 1
            assert not list(cache.glob("*"))
    assert len(load_prompts("cats")) == 2


def test_failures_are_one_line(cache, public, server, capsys):
    public(gone={"url": f"{server.address}/gone.csv"}, asked={"columns": {"prompt": ["x"]}})
    for arguments, message in (
        (["gone"], "'gone' cannot be fetched from http://127.0.0.1"),
        (["asked"], "from https://example.org and give it with --from"),
        (["gon"], "unknown public prompt set 'gon': did you mean 'gone'"),
        (["gone", "asked", "--from", "x.csv"], "fetch one at a time"),
        ([], "data fetch takes one or more"),
        (["gone", "--from", "nowhere.csv"], "nowhere.csv"),
    ):
        assert main(["data", "fetch", *arguments]) == 2
        told = capsys.readouterr().err
        assert message in told and told.count("\n") == 1


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A stand-in for the hub that holds files by name; remembers the revisions asked for."""
    asked = []

    def download(repository, repo_type, allow_patterns, revision):
        asked.append(revision)
        if hub.files is None:
            raise OSError(f"403 Forbidden: {repository} is gated.\nSee its page.")
        folder = tmp_path / "snapshots" / ("a" * 40)
        for name, text in hub.files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text)
        return str(folder)

    hub = SimpleNamespace(files=None, asked=asked)
    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    return hub


def test_hub_sets(cache, hub, any_number):
    with pytest.raises(ValueError, match="403 Forbidden.*set HF_TOKEN") as error:
        fetch_prompts("mma")
    assert "\n" not in str(error.value)
    hub.files = {"README.md": "", "data/Nudity_eta_3_K_16.csv": "prompt\nfoo\n"}
    fetch_prompts("ring-a-bell-16")
    assert load_prompts("ring-a-bell-16")["prompt"].tolist() == ["foo"]
    given = f"hub://Someone/else/Nudity_eta_3_K_16.csv@{'a' * 40}"
    fetch_prompts("ring-a-bell-38", given)
    assert hub.asked[-2:] == [None, "a" * 40]
    hub.files = {"a.csv": "", "b.csv": ""}
    with pytest.raises(ValueError, match=r"@newest: that should be one file, not .*a.csv, b.csv"):
        fetch_prompts("mma")


COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    """A hub's cache as `huggingface_hub` lays it out, with one data set, and no connection."""
    snapshot = tmp_path / "datasets--someone--prompts" / "snapshots" / COMMIT
    (snapshot / "data").mkdir(parents=True)
    table = pd.DataFrame({"text": ["a cat", "a dog"], "n": [4, 5], "g": [7.5, 3.0]})
    table.to_parquet(snapshot / "data" / "train.parquet")
    (snapshot / "plain.csv").write_text("prompt,seed\na cat,1\n")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return f"hub://someone/prompts/{{}}@{COMMIT}"


def test_a_data_set_of_the_hub_is_read_with_a_column_map(hub_cache):
    columns = {"prompt": "text", "seed": "n", "guidance_scale": "g"}
    table = load_prompts(hub_cache.format("data/train.parquet"), columns)
    assert table["prompt"].tolist() == ["a cat", "a dog"]
    assert table["seed"].tolist() == [4, 5] and table["guidance_scale"].tolist() == [7.5, 3]
    assert load_prompts(hub_cache.format("plain.csv"))["seed"].tolist() == [1]


@pytest.mark.parametrize(
    ("address", "message"),
    [
        (f"hub://someone/prompts/other.csv@{COMMIT}", f"cannot fetch .*other.csv@{COMMIT}: "),
        ("hub://someone/prompts/plain.csv", "write hub://owner/name/file@commit"),
        ("hub://someone/prompts/plain.csv@main", "the commit's 40 digits"),
        ("hub://someone/prompts/plain.csv@newest", "the commit's 40 digits"),
    ],
)
def test_what_the_hub_does_not_give_is_one_line(hub_cache, address, message):
    with pytest.raises(ValueError, match=message) as error:
        load_prompts(address)
    assert "\n" not in str(error.value)


def test_the_list_says_what_there_is(cache, tmp_path, capsys, any_number):
    (tmp_path / "given.csv").write_text(SAMPLES["mma"])
    fetch_prompts("mma", tmp_path / "given.csv")
    assert main(["data", "list"]) == 0
    listed = capsys.readouterr().out
    for name, known in datasets.public_sets().items():
        assert f"{name} (" in listed and known["home"] in listed and known["licence"] in listed
    assert "mma (fetched)" in listed and "i2p (not fetched)" in listed
    assert str(cache) in listed
