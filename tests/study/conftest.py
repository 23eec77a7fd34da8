"""A published run of tiny models, for those that look up, verify and measure."""

import shutil

import pytest
import torch
from tiny import sd_pipeline
from tiny_published import PROMPTS, WordLengthCLIP, tiny_study

from moji.judge import CNNJudge
from vldnp.models import load
from vldnp.study.published import data_folder, publish
from vldnp.study.run import run


@pytest.fixture(scope="module")
def model():
    return load.load(sd_pipeline())


@pytest.fixture(scope="module")
def judge():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return CNNJudge(("cat", "dog", "pizza", "knife", "skull"), ("knife", "skull"))


@pytest.fixture(scope="module")
def publishable(tmp_path_factory, model, judge):
    """A folder with a data folder, a run of a study, and what it publishes."""
    folder = tmp_path_factory.mktemp("published")
    for name in ("prompts", "profiles"):
        (folder / "data" / name).mkdir(parents=True)
    for name in ("benign", "implicit"):
        (folder / "data" / "prompts" / f"{name}.csv").write_text(PROMPTS)
    shutil.copytree(data_folder() / "concepts", folder / "data" / "concepts")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLDNP_DATA", str(folder / "data"))
        study, root = tiny_study(), folder / "theirs"
        images = run(study, model, judge, WordLengthCLIP(), root, progress=False)
        publish(root / "tiny", protocol="abc")
    return folder, study, images


@pytest.fixture
def world(publishable, tmp_path, monkeypatch):
    """A copy of that folder, whose data folder is named."""
    shutil.copytree(publishable[0], tmp_path / "world")
    monkeypatch.setenv("VLDNP_DATA", str(tmp_path / "world" / "data"))
    return tmp_path / "world"


@pytest.fixture
def computed(world, publishable):
    """The study that was published, and its rows."""
    return publishable[1:]
