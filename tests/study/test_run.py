import json
import os
import signal
import subprocess
import sys
import textwrap
import time
import warnings
from dataclasses import replace
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from tiny import ScriptedVLM, by_brightness, sd_pipeline
from tiny_published import WordLengthCLIP

import vldnp.study.grid
import vldnp.study.run
from moji.study.fid import fid_changes
from vldnp.methods import CFG, VLDNP, Static
from vldnp.metrics.fid import Inception
from vldnp.metrics.summary import TABLE, summary, table
from vldnp.models import load
from vldnp.models.judges import Judgement
from vldnp.sampler import sample
from vldnp.show.tables import results
from vldnp.study import measure
from vldnp.study.folder import load_images
from vldnp.study.grid import Study, batch_key, cells, plan_batches, setting_of
from vldnp.study.run import expected, run

PROMPTS = """prompt_id,prompt,seed,things,guidance_scale
a,a cat at the cove,0,cat,
b,a dog and a pizza,5,"dog, pizza",
c,a cat on a pizza,7,,9
"""


@pytest.fixture
def prompts(tmp_path):
    for name in ("benign", "implicit"):
        (tmp_path / f"{name}.csv").write_text(PROMPTS)
    return tmp_path / "benign.csv", tmp_path / "implicit.csv"


def vldnp_method(**options):
    return VLDNP(ScriptedVLM(by_brightness), "moji", query_steps=[0, 1], **options)


@pytest.fixture
def study(prompts):
    methods = (CFG(), Static("knife", omega=4), vldnp_method(omega=4))
    return Study("tiny", methods, prompts, sampling={"num_inference_steps": 3}, batch_size=2)


def counting(monkeypatch):
    """How many images are generated from here on."""
    made = []

    def counted(model, prompts, *args, **kwargs):
        made.extend(prompts)
        return sample(model, prompts, *args, **kwargs)

    monkeypatch.setattr(vldnp.study.run, "sample", counted)
    return made


def test_run_writes_tidy_tables(study, model, judge, tmp_path, monkeypatch):
    made = counting(monkeypatch)
    images = run(study, model, judge, WordLengthCLIP(), root=tmp_path, progress=False)
    folder = tmp_path / "tiny"
    assert len(images) == 3 * 2 * 3
    assert len(made) == 3 * 3, "the two sets hold the same prompts, so their images are shared"
    stored = pd.read_parquet(folder / "images.parquet")
    assert stored["key"].tolist() == images["key"].tolist()
    written = pd.read_csv(folder / "table.csv")
    assert list(written.columns) == TABLE and len(written) == 6
    assert written["method"].tolist() == ["cfg"] * 2 + ["static"] * 2 + ["vl-dnp"] * 2
    assert written["fid"].isna().all() and (written["n"] == 3).all()
    config = json.loads((folder / "config.json").read_text())
    assert config["model"]["revision"] == model.revision
    names = {method["name"] for method in config["methods"].values()}
    assert names == {"cfg", "static", "vl-dnp"} and config["sampling"] == dict(study.sampling)
    assert not list(folder.rglob(".*")), "no temporary file is left"


def test_rows_say_what_happened(study, model, judge, tmp_path):
    images = run(study, model, judge, WordLengthCLIP(), root=tmp_path, progress=False)
    row = images[(images["method"] == "vl-dnp") & (images["prompt_id"] == "b")].iloc[0]
    picture = load_images(images.loc[[row.name]], tmp_path / "tiny")[0]
    judgement = judge([picture])
    # the image is what the sampler alone makes
    asked = {"num_inference_steps": 3, "guidance_scale": 7.5, "progress": False}
    alone = sample(model, row["prompt"], study.methods[2], seeds=[5], **asked)
    difference = np.asarray(picture, int) - np.asarray(alone.images[0], int)
    assert abs(difference).max() <= 1
    assert row["negative_prompts"] == [s.negative_prompts[0] for s in alone.trace.steps]
    assert row["model_evaluations"] == alone.trace.model_evaluations[0]
    assert row["vlm_calls"] == 2 and row["query_steps"] == [0, 1]
    assert row["vlm"] == "scripted"
    # and is measured as by hand
    assert row["unsafe_probability"] == pytest.approx(judgement.unsafe_probability[0])
    assert row["unsafe"] == (row["unsafe_probability"] >= 0.6)
    found = [judgement.things[0][thing] >= 0.5 for thing in ("dog", "pizza")]
    assert row["retention"] == pytest.approx(np.mean(found))
    assert row["clip_score"] == pytest.approx(len("a dog and a pizza") / 100)
    # a prompt's own guidance scale wins; a prompt without things has nothing to keep
    own = images[images["prompt_id"] == "c"]
    assert (own["guidance_scale"] == 9).all() and own["retention"].isna().all()


def test_nothing_is_made_or_measured_twice(study, model, judge, tmp_path, monkeypatch):
    first = run(study, model, judge, WordLengthCLIP(), root=tmp_path, progress=False)
    made = counting(monkeypatch)
    WordLengthCLIP.calls = 0
    again = run(study, model, judge, WordLengthCLIP(), root=tmp_path, progress=False)
    assert not made and not WordLengthCLIP.calls
    pd.testing.assert_frame_equal(first, again)
    # a larger grid computes only what is new
    larger = replace(study, methods=(*study.methods, Static("knife", omega=5)))
    run(larger, model, judge, WordLengthCLIP(), root=tmp_path, progress=False)
    assert len(made) == 3


def test_key_changes_with_what_decides_the_image(study, model, tmp_path, prompts):
    def keys(study=study, model=model):
        return list(cells(study, model)["key"])

    base = keys()
    assert base == keys()
    assert keys(replace(study, batch_size=7, name="other", unsafe_threshold=0.1)) == base
    renamed = replace(CFG(), name="plain")
    assert keys(replace(study, methods=(renamed,))) == keys(replace(study, methods=(CFG(),)))
    for change in (
        {"sampling": study.sampling | {"num_inference_steps": 4}},
        {"sampling": study.sampling | {"guidance_scale": 3.0}},
        {"sampling": study.sampling | {"scheduler": "ddim"}},
        {"sampling": study.sampling | {"noise_device": "cuda"}},
        {"methods": (CFG(), Static("knife", omega=5), vldnp_method(omega=5))},
        {"methods": (CFG(), Static("skull", omega=4), vldnp_method(omega=4, lead="bad"))},
    ):
        changed = keys(replace(study, **change))
        assert changed != base and len(changed) == len(base)
    assert not set(base) & set(keys(model=load.load(sd_pipeline(seed=1))))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vldnp.study.grid, "SCHEMA", vldnp.study.grid.SCHEMA + 1)
        assert not set(base) & set(keys())


def test_seeds_count_up_from_the_prompts_own(study, model):
    grid = cells(replace(study, num_images_per_prompt=2, max_prompts=2), model)
    assert grid["seed"].tolist()[:4] == [0, 1, 7, 8]  # of a and c, which were drawn
    assert grid["key"].nunique() == 3 * 2 * 2


def test_a_failing_batch_leaves_no_half_result(study, model, judge, tmp_path, monkeypatch):
    calls = []

    def fails_second(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return sample(*args, **kwargs)

    monkeypatch.setattr(vldnp.study.run, "sample", fails_second)
    with pytest.raises(KeyboardInterrupt):
        run(study, model, judge, root=tmp_path, progress=False)
    folder = tmp_path / "tiny"
    assert len(list((folder / "cells").iterdir())) == 4, "two images, two records"
    assert not (folder / "table.csv").exists() and not (folder / "images.parquet").exists()
    monkeypatch.setattr(vldnp.study.run, "sample", sample)
    made = counting(monkeypatch)
    run(study, model, judge, root=tmp_path, progress=False)
    assert len(made) == 9 - 2


@pytest.fixture
def strong(tmp_path):
    """Ten images in batches of six and four, so strong that another batch shows in the pixels."""
    rows = "".join(f"{i},a cat {i},{i}\n" for i in range(10))
    (tmp_path / "ten.csv").write_text("prompt_id,prompt,seed\n" + rows)
    method = Static("knife", omega=1000)
    sampling = {"num_inference_steps": 3}
    return Study("strong", (method,), (tmp_path / "ten.csv",), sampling, batch_size=6)


def test_a_resumed_run_ends_in_the_same_pixels(strong, model, judge, tmp_path, monkeypatch):
    images = run(strong, model, judge, root=tmp_path, progress=False)
    paths = [tmp_path / "strong" / path for path in images["image"]]
    before = [path.read_bytes() for path in paths]
    times = [path.stat().st_mtime_ns for path in paths]
    for path in (paths[1], paths[2], paths[5]):
        path.unlink()
        path.with_suffix(".json").unlink()
    made = counting(monkeypatch)
    run(strong, model, judge, root=tmp_path, progress=False)
    assert [path.read_bytes() for path in paths] == before
    assert made == list(images["prompt"][:6]), "the planned batch, and no other"
    unchanged = [path.stat().st_mtime_ns == time for path, time in zip(paths, times, strict=True)]
    assert unchanged == [True, False, False, True, True, False, True, True, True, True]


def test_batches_follow_from_the_study_alone(study, model):
    grid = cells(study, model)
    batches = plan_batches(grid, study)
    assert [len(rows) for _, rows, _ in batches] == [2, 1] * 3
    planned = [key for _, rows, _ in batches for key in rows["key"]]
    assert planned == list(dict.fromkeys(grid["key"])), "each once, in order"
    assert all(set(rows["setting"]) == {setting_of(method)} for method, rows, _ in batches)
    less = replace(study, methods=(CFG(),))
    plain = plan_batches(cells(less, model), less)
    keys = [[batch_key(rows) for _, rows, _ in some] for some in (plain, batches)]
    assert keys[0] == keys[1][:2] and keys[0][0] != keys[0][1], "another method changes nothing"


def damage(folder, images, kind):
    """Break one file of a run folder; returns it."""
    picture = folder / images["image"][0]
    if kind.endswith("score"):
        path = sorted((folder / "scores").glob("*/*.json"))[0]
    else:
        path = picture.with_suffix(".json") if kind.endswith("record") else picture
    content = path.read_bytes()
    broken = {
        "missing picture": None,
        "truncated picture": content[: len(content) // 2],
        "altered picture": content[:80] + b"xx" + content[82:],
        "swapped picture": (folder / images["image"][1]).read_bytes(),
        "truncated record": content[:50],
        "binary record": b"\xff\xfe\x00",
        "foreign record": b"{}",
        "truncated score": content[:50],
        "foreign score": b'{"a": 1}',
        "altered record": content.replace(b'"seconds": ', b'"seconds": 1', 1),
        "altered score": content.replace(b'probability": ', b'probability": 1', 1),
    }[kind]
    assert broken != content
    path.unlink() if broken is None else path.write_bytes(broken)
    return path


DAMAGES = {"picture": "missing truncated altered swapped", "score": "truncated foreign altered"}
DAMAGES |= {"record": "truncated binary foreign altered"}
DAMAGES = [f"{how} {what}" for what, hows in DAMAGES.items() for how in hows.split()]


@pytest.mark.parametrize("kind", DAMAGES)
def test_what_is_damaged_is_made_again(strong, model, judge, tmp_path, kind):
    first = run(strong, model, judge, root=tmp_path, progress=False)
    path = damage(tmp_path / "strong", first, kind)
    with pytest.warns(UserWarning) as told:
        again = run(strong, model, judge, root=tmp_path, progress=False)
    told = [str(one.message) for one in told if one.category is UserWarning]
    assert len(told) == 1 and path.stem in told[0] and "\n" not in told[0]
    columns = [column for column in first if column != "seconds"]
    pd.testing.assert_frame_equal(first[columns], again[columns])
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        run(strong, model, judge, root=tmp_path, progress=False)


class Counting:
    """A judge without features that counts the pictures it saw, and does something at each call."""

    name, revision = "counting", "1"

    def __init__(self, meanwhile=lambda calls: None, unsafe=0.25):
        self.seen, self.calls, self.meanwhile, self.unsafe = 0, 0, meanwhile, unsafe

    def __call__(self, images):
        self.calls += 1
        self.meanwhile(self.calls)
        self.seen += len(images)
        return Judgement(np.full(len(images), self.unsafe), [{"knife": 0.5}] * len(images))


def test_scores_are_kept_batch_by_batch(strong, model, tmp_path):
    def fails(calls):
        if calls == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(strong, model, Counting(fails), root=tmp_path, progress=False)
    again = Counting()
    run(strong, model, again, root=tmp_path, progress=False)
    assert again.seen == 4, "the first batch is not measured again"


def test_a_folder_belongs_to_one_study(strong, model, judge, tmp_path):
    folder = tmp_path / "strong"
    run(strong, model, judge, root=tmp_path, progress=False)
    before = {name: (folder / name).read_bytes() for name in ("table.csv", "config.json")}
    for other, named in (
        (replace(strong, max_prompts=4), "max_prompts, prompts"),
        (replace(strong, batch_size=3), "batch_size"),
        (replace(strong, sampling=strong.sampling | {"guidance_scale": 3.0}), "sampling"),
        (replace(strong, methods=(CFG(),)), "methods"),
    ):
        with pytest.raises(ValueError, match=f"holds another study, with other {named}: ") as told:
            run(other, model, judge, root=tmp_path, progress=False)
        assert "\n" not in str(told.value)
    assert before == {name: (folder / name).read_bytes() for name in before}
    grown = replace(strong, methods=(*strong.methods, CFG()))
    run(grown, model, judge, root=tmp_path, progress=False)
    assert len(pd.read_csv(folder / "table.csv")) == 2
    (folder / "config.json").write_text("broken")
    with pytest.warns(UserWarning, match="config.json"):
        run(grown, model, judge, root=tmp_path, progress=False)


def test_a_dry_run_counts_images_and_evaluations(study):
    found = expected(study).set_index("method")
    assert found["images"].tolist() == [6, 6, 6]
    assert found.loc["cfg", "evaluations"] == 6 * 6 and found.loc["static", "evaluations"] == 6 * 9
    assert found.loc["vl-dnp", ["evaluations", "vlm_calls"]].tolist() == [6 * 9, 6 * 2]


def test_what_cannot_be_written_is_named_in_one_line(strong, model, judge, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError) as told:
        run(strong, model, judge, root=tmp_path / "file", progress=False)
    path = tmp_path / "file" / "strong" / "config.json"
    assert str(told.value) == f"cannot write {path}: Not a directory"


KILLED = """
    import sys
    from tiny import sd_pipeline
    from vldnp.methods import CFG
    from vldnp.models import load
    from vldnp.study.grid import Study, cells, plan_batches
    from vldnp.study.run import generate
    from pathlib import Path
    folder, prompts = Path(sys.argv[1]), sys.argv[2]
    study = Study("killed", (CFG(),), (prompts,), sampling={"num_inference_steps": 3}, batch_size=2)
    model = load.load(sd_pipeline())
    generate(model, plan_batches(cells(study, model), study), folder)
"""


def test_a_killed_run_loses_at_most_its_batch(model, judge, tmp_path):
    prompts = tmp_path / "many.csv"
    rows = "".join(f"{i},a cat {i},{i}\n" for i in range(400))
    prompts.write_text("prompt_id,prompt,seed\n" + rows)
    folder = tmp_path / "killed"
    path = os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])
    command = [sys.executable, "-c", textwrap.dedent(KILLED), folder, prompts]
    settings = {"env": os.environ | {"PYTHONPATH": path}, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command, **settings)
    deadline = time.monotonic() + 60
    while len(list(folder.glob("cells/[!.]*.json"))) < 6 and time.monotonic() < deadline:
        assert process.poll() is None, "the run ended by itself"
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    records = list(folder.glob("cells/[!.]*.json"))
    assert 6 <= len(records) < 400
    for record in records:  # every record is whole and has its whole image
        assert json.loads(record.read_text())["key"] == record.stem
        Image.open(record.with_suffix(".png")).load()
    unrecorded = len(list(folder.glob("cells/[!.]*.png"))) - len(records)
    assert 0 <= unrecorded <= 2
    short = Study("killed", (CFG(),), (prompts,), {"num_inference_steps": 3}, max_prompts=8)
    before = {record: record.stat().st_mtime_ns for record in records}
    images = run(short, model, judge, root=tmp_path, progress=False)
    assert len(images) == 8
    assert all(record.stat().st_mtime_ns == when for record, when in before.items())


def test_table_against_hand_computed_values():
    columns = {"prompt_id": list("aabb"), "unsafe": [True, False, False, False]}
    columns |= {"unsafe_probability": [0.8, 0.4, 0.2, 0.0], "retention": [1.0, 0.5, None, None]}
    columns |= {"model_evaluations": [75, 75, 75, 71], "seconds": [1.0, 1.0, 2.0, 2.0]}
    where = {"setting": "s", "method": "static", "omega": 4.0, "prompt_set": "implicit"}
    images = pd.DataFrame(columns).assign(**where, clip_score=0.3, vlm_calls=0)
    row = table(images).iloc[0]
    found = [row[name] for name in ("asr", "tr", "clip", "retention")]
    assert found == pytest.approx([0.25, 0.35, 0.3, 0.75])
    assert row["n"] == 4 and row["model_evaluations"] == 74 and row["seconds"] == 1.5
    assert (row["clip_low"], row["clip_high"]) == (0.3, 0.3)
    assert 0 <= row["asr_low"] <= 0.25 <= row["asr_high"] <= 0.5
    long = summary(images).set_index("metric")
    assert long.loc["asr", "value"] == 0.25 and long.loc["retention", "low"] <= 0.75


def test_fid_of_the_benign_set(study, model, judge, tmp_path):
    methods = (CFG(), Static("a knife", 1))
    study = replace(study, methods=methods, reference="moji.world.images:reference_images")
    images = run(study, model, judge, root=tmp_path, progress=False)
    written = pd.read_csv(tmp_path / "tiny" / "table.csv").set_index(["prompt_set", "method"])
    assert (written.loc["benign", "fid_features"] == judge.name).all()
    assert (written.loc["benign", "fid"] > 0).all()
    assert written.loc["implicit", "fid"].isna().all()
    settings = {method.name: setting_of(method) for method in methods}
    change = fid_changes(study, images, judge, settings, tmp_path / "tiny")
    cfg, static = (written.loc[("benign", m), "fid"] for m in settings)
    assert change["static"].value == pytest.approx(static - cfg, rel=1e-4)
    assert not fid_changes(replace(study, reference="none"), images, judge, settings, tmp_path)


class Corners(torch.nn.Module):
    """In the place of Inception's network: some of the pixels."""

    def forward(self, pixels):
        assert pixels.dtype == torch.uint8
        return (pixels[:, :, :2, :2].flatten(1).float(),)


def test_fid_with_a_judge_without_features(study, model, tmp_path, monkeypatch):
    (tmp_path / "real").mkdir()
    for n in range(5):
        pixels = np.random.default_rng(n).integers(0, 256, (40, 50, 3), dtype="uint8")
        Image.fromarray(pixels).save(tmp_path / "real" / f"{n}.jpg")
    network = Corners()
    network.weight = torch.nn.Parameter(torch.zeros(1))  # which says where it computes
    monkeypatch.setattr(measure, "Inception", lambda device: Inception(network))
    study = replace(study, methods=(CFG(), Static("a knife", 1)), reference=str(tmp_path / "real"))
    images = run(study, model, Counting(unsafe=0.6), root=tmp_path, progress=False)
    assert images["unsafe"].all(), "0.6 itself counts"
    written = pd.read_csv(tmp_path / "tiny" / "table.csv").set_index("prompt_set")
    assert written["fid"].notna().sum() == 2, "of the benign set alone"
    assert written.loc["benign", "fid"].notna().all()
    assert "FID (inception-v3, torch-fidelity)" in results(written.reset_index())


@pytest.mark.parametrize("lacking", ["images", "weights"])
def test_where_fid_cannot_be_had_one_line_says_why(study, model, tmp_path, monkeypatch, lacking):
    monkeypatch.setenv("VLDNP_CACHE", str(tmp_path / "cache"))
    if lacking == "weights":
        (tmp_path / "cache" / "reference" / "coco").mkdir(parents=True)
        Image.new("RGB", (9, 9)).save(tmp_path / "cache" / "reference" / "coco" / "a.png")

    def unreachable(device):
        raise URLError("no address associated with hostname")

    monkeypatch.setattr(measure, "Inception", unreachable)
    study = replace(study, methods=(CFG(),), reference="coco")
    why = {"images": "no real images 'coco'", "weights": "no address associated"}[lacking]
    with pytest.warns(UserWarning, match=f"FID stays empty: .*{why}") as told:
        run(study, model, Counting(), root=tmp_path, progress=False)
    assert "\n" not in str(told[0].message)
    assert pd.read_csv(tmp_path / "tiny" / "table.csv")["fid"].isna().all()


def test_the_pictures_size_is_part_of_a_cell(study, model, judge, tmp_path):
    study = replace(study, methods=(CFG(),), prompt_sets=study.prompt_sets[:1])
    small = replace(study, sampling=study.sampling | {"height": 16, "width": 24})
    keys = [set(cells(one, model)["key"]) for one in (study, small)]
    assert not keys[0] & keys[1]
    images = run(small, model, judge, root=tmp_path, progress=False)
    assert {image.size for image in load_images(images, tmp_path / "tiny")} == {(24, 16)}


def test_an_object_store_is_no_run_folder(study, model, judge, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="mounted file system, not 's3://bucket/runs'") as told:
        run(study, model, judge, root="s3://bucket/runs")
    assert "\n" not in str(told.value) and not (tmp_path / "s3:").exists()


def test_bad_studies_are_refused_in_one_line(study, model, judge, tmp_path, prompts):
    with pytest.raises(ValueError, match="study 'x' has no methods"):
        Study("x", (), prompts)
    with pytest.raises(ValueError, match="study 'x' has no prompt sets"):
        Study("x", (CFG(),), ())
    for name in ("", ".", "..", "a/../../b", "a/b", "a\\b", "/a", "a\nb", "a\0b"):
        with pytest.raises(ValueError, match="must be that of one folder, not ") as told:
            Study(name, (CFG(),), prompts)
        assert len(str(told.value).splitlines()) == 1
    for wrong in ({"batch_size": 0}, {"max_prompts": -3}, {"max_prompts": {"few": -3}}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))} must be . or more, not"):
            replace(study, **wrong)
    for threshold in (0, 1.5, float("nan"), "0.6", None):
        with pytest.raises(ValueError, match=r"unsafe_threshold must be in \(0, 1\], not"):
            replace(study, unsafe_threshold=threshold)
    for wrong in ({"height": "64"}, {"width": 0}, {"guidance_scale": float("nan")}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))} must be "):
            replace(study, sampling=wrong)
    with pytest.raises(ValueError, match="multiples of 4, not 33"):
        run(replace(study, sampling={"height": 33}), model, judge, root=tmp_path, progress=False)
    (tmp_path / "large.csv").write_text(f"prompt_id,prompt,seed\na,a cat,{2**63 - 1}\n")
    with pytest.raises(ValueError, match="seed is too large to count on from"):
        cells(replace(study, prompt_sets=[tmp_path / "large.csv"], num_images_per_prompt=2), None)
    twice = replace(study, prompt_sets=(prompts[0], prompts[0]))
    with pytest.raises(ValueError, match="two prompt sets of the same name"):
        cells(twice, model)
    with pytest.raises(ValueError, match="unknown sampling setting .*'num_steps': did you mean"):
        replace(study, sampling={"num_steps": 3})
    methods = (CFG(), vldnp_method(omega=1))
    late = replace(study, methods=methods, sampling={"num_inference_steps": 1})
    with pytest.raises(ValueError, match="outside the 1 denoising steps"):
        run(late, model, judge, root=tmp_path, progress=False)
    assert not (tmp_path / "tiny").exists()


def test_methods_that_would_share_images_are_refused(prompts):
    def method(vlm, name="vl-dnp"):
        return replace(VLDNP(vlm, "moji", omega=4), name=name)

    knife, none = (ScriptedVLM(lambda *_, said=said: said) for said in ("knife", "none"))
    for other in (method(none), method(none, "another name")):
        with pytest.raises(ValueError, match="two methods '.*' differ, but not in what describe"):
            Study("x", (method(knife), other), prompts)
    Study("x", (method(knife), method(knife, "another name")), prompts)  # the same images
