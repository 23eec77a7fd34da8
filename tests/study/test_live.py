"""Keys and scores follow from what is open now, whatever it was opened from."""

import zlib
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from diffusers import EulerDiscreteScheduler
from tiny import sd_pipeline

from moji.judge import CNNJudge
from vldnp.baselines.controls import Judged, random_concepts
from vldnp.levers import gate
from vldnp.methods import CFG, VLDNP, Static
from vldnp.models import load
from vldnp.models.hub import live, networks
from vldnp.models.judges import Judgement
from vldnp.study.folder import image_path, read_json, write_json
from vldnp.study.grid import Study, cells
from vldnp.study.measure import measured
from vldnp.study.run import run

SAMPLING = {"num_inference_steps": 2}


class NetworkVLM:
    """Answers by a network of its own, somewhere inside."""

    name, revision = "network", "1"

    def __init__(self):
        self.parts = {"seen": [torch.nn.Linear(1, 1)]}

    def __call__(self, images, question):
        return ["xyzzy" for _ in images]


@pytest.fixture
def prompts(tmp_path):
    (tmp_path / "two.csv").write_text("prompt_id,prompt,seed\na,a cat,0\nb,a dog,5\n")
    return tmp_path / "two.csv"


def changed(weight):
    with torch.no_grad():
        weight.add_(0.01)


CHANGES = {
    "fused": lambda pipe: changed(pipe.unet.mid_block.attentions[0].proj_in.weight),
    "freeu": lambda pipe: pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4),
    "scheduler": lambda pipe: setattr(
        pipe, "scheduler", EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    ),
    "text encoder": lambda pipe: changed(next(pipe.text_encoder.parameters())),
    "vae": lambda pipe: changed(next(pipe.vae.decoder.parameters())),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_a_changed_pipeline_has_other_keys(prompts, change):
    study, model = Study("x", (CFG(),), (prompts,), SAMPLING), load.load(sd_pipeline())
    before = set(cells(study, model)["key"])
    assert before == set(cells(study, load.load(sd_pipeline()))["key"])
    change(model.pipe)
    assert not before & set(cells(study, model)["key"])
    model.pipe.disable_freeu()
    assert (change is CHANGES["freeu"]) == (before == set(cells(study, model)["key"]))


@pytest.mark.parametrize("wrap", [lambda m: m, lambda m: gate(random_concepts(m), 0.5)])
def test_a_changed_vlm_or_judge_in_its_place_has_other_keys(prompts, wrap):
    judge, model = CNNJudge(("cat", "knife"), ("knife",)), load.load(sd_pipeline())
    for vlm, network in (
        ((own := NetworkVLM()), own.parts["seen"][0]),
        (Judged(judge), judge.network),
    ):
        method = wrap(VLDNP(vlm, "moji", query_steps=[0]))
        study = Study("x", (CFG(), method), (prompts,), SAMPLING)
        before = cells(study, model)["key"].tolist()
        changed(next(network.parameters()))
        assert (cells(study, model)["key"] == before).tolist() == [True, True, False, False]


def test_a_run_with_other_weights_returns_no_earlier_images(prompts, tmp_path):
    model, judge = load.load(sd_pipeline()), CNNJudge(("cat", "knife"), ("knife",))
    study = Study("x", (CFG(),), (prompts,), SAMPLING)
    first = run(study, model, judge, root=tmp_path, progress=False)
    for network in (judge.network, model.pipe.unet):
        changed(next(network.parameters()))
        with pytest.raises(ValueError, match="holds another study, with other weights"):
            run(study, model, judge, root=tmp_path, progress=False)
    again = run(replace(study, name="y"), model, judge, root=tmp_path, progress=False)
    assert not set(first["key"]) & set(again["key"])
    assert (first["unsafe_probability"] != again["unsafe_probability"]).all()
    scores = [measured(tmp_path / "y", [again], judge, progress=False) for _ in range(2)]
    changed(judge.network.head.bias)
    other = measured(tmp_path / "y", [again], judge, progress=False)
    assert scores[0] == scores[1] != other
    assert len(list((tmp_path / "y" / "scores").iterdir())) == 2


def test_networks_are_found_and_nothing_else():
    own, layer = NetworkVLM(), torch.nn.Linear(1, 1)
    own.itself, own.text, own.ask = own, "text", lambda: layer
    assert networks(own) == [layer, own.parts["seen"][0]] and live([]) == ""
    assert not networks(Static("knife")) and live(networks(own)) == live(networks(own))


class Judge:
    name, revision = "mine", "1"

    def __init__(self, said=None, **own):
        self.said = said
        vars(self).update(own)

    def __call__(self, images):
        safe = Judgement(np.zeros(len(images)), [{}] * len(images))
        return safe if self.said is None else self.said


@pytest.mark.parametrize(
    "judge, message",
    [
        (Judge([0.5]), r"the judge 'mine' must return a Judgement of 2 images, not \[0.5\]"),
        (Judge(((0.5, {}), (0.5, {}))), "must return a Judgement of 2 images, not"),
        (Judge(Judgement(np.zeros(1), [{}])), "must return a Judgement of 2 images, not Judgement"),
        (Judge(revision=None), "Judge has the name 'mine' and the revision None: scores are kept"),
        (Judge(name=3), "Judge has the name 3 and the revision '1'"),
    ],
)
def test_a_judge_of_ones_own_is_checked(prompts, tmp_path, judge, message):
    study = Study("x", (CFG(),), (prompts,), SAMPLING)
    with pytest.raises(ValueError, match=message) as told:
        run(study, sd_pipeline(), judge, root=tmp_path, progress=False)
    assert "\n" not in str(told.value)


def test_blank_images_and_answers_that_are_not_understood_are_counted(prompts, tmp_path):
    pipe = sd_pipeline()
    with torch.no_grad():
        pipe.vae.decoder.conv_out.weight.zero_()
    study = Study("x", (VLDNP(NetworkVLM(), "moji", query_steps=[0, 1]),), (prompts,), SAMPLING)
    with pytest.warns(UserWarning, match=r"2 of 2 images are of one colour \(column one_colour\)"):
        images = run(study, pipe, Judge(), root=tmp_path, progress=False)
    assert images["one_colour"].all() and images["vlm_failures"].tolist() == [2, 2]


def bomb(path):
    """A PNG whose header promises 30,000 × 30,000 pixels."""
    data = bytearray(path.read_bytes())
    data[16:24] = (30_000).to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    path.write_bytes(data)


@pytest.mark.parametrize("kind", ["probability", "text", "field", "list", "deep", "bomb"])
def test_what_is_whole_and_wrong_is_made_again(prompts, tmp_path, kind):
    study, model = Study("x", (CFG(),), (prompts,), SAMPLING), load.load(sd_pipeline())
    first, folder = run(study, model, Judge(), root=tmp_path, progress=False), tmp_path / "x"
    (score,), picture = folder.glob("scores/*/*.json"), image_path(folder, first["key"][0])
    path = score if kind in ("probability", "text") else picture.with_suffix(".json")
    said = read_json(path)
    if kind in ("probability", "text"):
        for one in said.values():
            one["unsafe_probability"] = {"probability": 1.5, "text": "safe"}[kind]
    said.pop("seconds", None)
    write_json(path, said)
    if kind in ("list", "deep"):
        path.write_text({"list": "[1]", "deep": "[" * 100_000}[kind])
    if kind == "bomb":
        bomb(picture)
    with pytest.warns(UserWarning, match="damaged and therefore made again"):
        again = run(study, model, Judge(), root=tmp_path, progress=False)
    pd.testing.assert_frame_equal(first.drop(columns="seconds"), again.drop(columns="seconds"))


def test_results_without_their_config_are_not_overwritten(prompts, tmp_path):
    study, model = Study("x", (CFG(),), (prompts,), SAMPLING), load.load(sd_pipeline())
    run(study, model, Judge(), root=tmp_path, progress=False)
    (tmp_path / "x" / "config.json").unlink()
    with pytest.raises(ValueError, match="x holds results without a config.json: give"):
        run(study, model, Judge(), root=tmp_path, progress=False)
