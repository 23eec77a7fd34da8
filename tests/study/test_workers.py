"""Images made by workers are those of one process, and what goes wrong is said in one line."""

import gc
import os
import pickle
import signal
import sys
import threading

import numpy as np
import pandas as pd
import pytest
import tiny_world
import torch
from joblib.externals.loky import get_reusable_executor
from tiny import sd_pipeline

import vldnp
from vldnp import __main__ as cli
from vldnp.models import load
from vldnp.models.load import ModelSpec
from vldnp.models.vlm import VLMError
from vldnp.study import workers
from vldnp.study.grid import Study

SPEC = ModelSpec("moji-vlm-l", {"max_new_tokens": 5, "answers": "free"})


@pytest.fixture(scope="module", autouse=True)
def world(tmp_path_factory):
    folder = tiny_world.make(tmp_path_factory.mktemp("world"))
    get_reusable_executor().shutdown()  # processes of other tests have another data folder
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLDNP_DATA", str(folder))
        with workers.one_thread():
            yield folder
    get_reusable_executor().shutdown()  # its processes have this data folder
    workers._opened.cache_clear()
    gc.collect()  # models stay open while anything holds them
    if "ray" in sys.modules:
        sys.modules["ray"].shutdown()


def home_made(act=lambda: None):
    """A VLM that no other process can import: it has to travel itself."""

    class HomeMade:
        name, revision = "home-made", "1"

        def __call__(self, images, question):
            act()
            bands = [int(np.asarray(image).mean() / 1.5) % 2 for image in images]
            return [("none", "a knife")[band] for band in bands]

    return HomeMade()


def study(*methods, name="small") -> Study:
    methods = methods or (
        vldnp.CFG(),
        vldnp.Static("knife", 1000),
        vldnp.VLDNP(home_made(), "moji", 1000, query_steps=[0, 1]),
        vldnp.VLDNP(load.load_vlm(SPEC), "moji", 1000, query_steps=[0]),
    )
    sampling = {"num_inference_steps": 3, "scheduler": "dpm++"}
    return Study(name, methods, ("benign",), sampling, batch_size=2)


def pictures(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("cells/*.png")}


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """The tables and pictures of this process alone."""
    root = tmp_path_factory.mktemp("here")
    images = vldnp.run(study(), "moji-sd", "moji-judge", root=root, progress=False)
    return images.drop(columns="seconds"), pictures(root / "small")


@pytest.fixture(params=["loky", pytest.param("ray", marks=pytest.mark.ray), "dask"])
def backend(request):
    """As a user registers or starts it."""
    if request.param == "ray":
        pytest.importorskip("ray.util.joblib").register_ray()
    if request.param == "dask":
        local = {"n_workers": 2, "threads_per_worker": 1, "dashboard_address": None}
        with pytest.importorskip("distributed").Client(**local):
            yield "dask"
    else:
        yield request.param


@pytest.mark.slow
def test_two_workers_make_the_same_pixels(backend, here, tmp_path):
    settings = {"workers": 2, "backend": backend, "progress": False}
    images = vldnp.run(study(), "moji-sd", "moji-judge", root=tmp_path, **settings)
    pd.testing.assert_frame_equal(images.drop(columns="seconds"), here[0])
    assert pictures(tmp_path / "small") == here[1] and len(here[1]) == 12
    assert not list(tmp_path.rglob(".*"))


@pytest.mark.slow
def test_the_command_makes_a_profiles_whole_grid(tmp_path, capsys):
    run = ["run", "--profile", "tiny", "--quick", "--out", str(tmp_path), "--workers"]
    assert cli.main([*run, "2"]) == 0
    table = tmp_path / "tiny-quick" / "table.csv"
    assert capsys.readouterr().out.splitlines() == [str(table)]
    assert {"cfg", "static", "vl-dnp", "safree", "sld-max"} <= set(pd.read_csv(table)["method"])
    by_two = pictures(table.parent)
    table.parent.rename(tmp_path / "two")
    assert cli.main([*run, "1"]) == 0
    assert pictures(table.parent) == by_two and by_two


def test_a_model_travels_as_what_it_was_opened_from(world):
    backbone, vlm = load.load("moji-sd"), load.load_vlm(SPEC)
    sent = workers._packed((backbone, vlm, vldnp.VLDNP(vlm, "moji")))
    assert len(sent) < 5000
    other, its_vlm, method = pickle.loads(sent)
    assert other is not backbone and other.revision == backbone.revision
    assert its_vlm.describe() == vlm.describe() and method.negatives.vlm is its_vlm
    assert pickle.loads(sent)[0] is other  # opened once
    for own, its in zip(backbone.network.parameters(), other.network.parameters(), strict=True):
        assert torch.equal(own, its)


def test_what_was_changed_after_it_was_opened_is_not_opened_as_it_was():
    vlm = load.load_vlm("moji-vlm-s", answers="free")
    vlm.max_new_tokens = 3
    with pytest.raises(ValueError, match="a worker has opened another moji-vlm-s"):
        pickle.loads(workers._packed((vlm,)))
    backbone, vlm = load.load("moji-sd"), load.load_vlm("moji-vlm-s", answers="free")
    for model, network in ((backbone, backbone.pipe.vae), (vlm, vlm.model)):
        next(network.parameters()).data += 1
        with pytest.raises(ValueError, match=f"a worker has opened another {model.name}"):
            pickle.loads(workers._packed((model,)))


class Locked:
    name, revision = "locked", "1"

    def __init__(self):
        self.lock = threading.Lock()

    def __call__(self, images, question):
        return ["none"] * len(images)


@pytest.mark.parametrize(
    "model, vlm, options, said",
    [
        (None, None, {"workers": 2}, "not opened by its name or folder"),
        ("moji-sd", Locked(), {"workers": 2}, "cannot be sent to other processes"),
        ("moji-sd", None, {"workers": 0}, "workers must be 1 or more, not 0"),
        ("moji-sd", None, {"backend": "dask"}, "backend 'dask' cannot be used: To use Joblib with"),
        ("moji-sd", None, {"backend": "lokky"}, "backend 'lokky' cannot be used: Invalid backend"),
    ],
)
def test_refused_in_one_line_before_any_image(model, vlm, options, said, tmp_path):
    methods = (vldnp.VLDNP(vlm, "moji", query_steps=[0]),) if vlm else (vldnp.CFG(),)
    model = model or load.load(sd_pipeline())
    with pytest.raises(ValueError, match=said) as raised:
        vldnp.run(study(*methods), model, "moji-judge", root=tmp_path, progress=False, **options)
    assert len(str(raised.value).splitlines()) == 1
    assert not pictures(tmp_path / "small")


def refuse():
    raise VLMError("no answer today")


def die():
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.slow
def test_what_a_batch_raises_in_a_worker_is_raised_here(tmp_path):
    failing = study(vldnp.VLDNP(home_made(refuse), "moji", query_steps=[0]))
    arguments = failing, "moji-sd", "moji-judge"
    with pytest.raises(ChildProcessError, match="workers failed: VLMError: .*no answer") as told:
        vldnp.run(*arguments, root=tmp_path, progress=False, workers=2)
    assert len(str(told.value).splitlines()) == 1
    assert "in refuse" in "".join(told.value.__notes__)


@pytest.mark.slow
def test_workers_that_die_again_and_again(tmp_path, monkeypatch):
    monkeypatch.setattr(workers, "ATTEMPTS", 1)
    deadly = study(vldnp.VLDNP(home_made(die), "moji", query_steps=[0]))
    message = "workers failed: 1 times in a row one died"
    with pytest.raises(ChildProcessError, match=message) as raised:
        vldnp.run(deadly, "moji-sd", "moji-judge", root=tmp_path, progress=False, workers=2)
    assert len(str(raised.value).splitlines()) == 1


def test_each_worker_has_a_gpu_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(workers, "_claimed", held := [])
    monkeypatch.setattr(workers.signal, "signal", lambda *_: None)

    def claimed():
        workers._begin(os.getppid(), ("4", "7"), str(tmp_path))
        return os.environ["CUDA_VISIBLE_DEVICES"]

    with monkeypatch.context() as patch:
        patch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
        patch.setattr(torch.cuda, "device_count", lambda: 2)
        assert workers._parallel(None, "loky").n_jobs == workers._parallel(3, "loky").n_jobs == 2
        assert [claimed(), claimed()] == ["4", "7"]
        held.pop(0).release()  # as the system does when a worker dies
        assert claimed() == "4"
