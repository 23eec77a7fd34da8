"""Training of the Moji benchmark's models: every command on a tiny budget, and interruptions."""

import math
from collections import Counter

import numpy as np
import pytest
import tiny
import torch
from torch import nn

import vldnp
from moji.__main__ import main
from moji.train import clip, damage, judge, preview, text2image, vae, views
from moji.train.loop import Recipe, fit
from moji.world import scenes
from vldnp.models import load


class Killed(Exception):
    pass


def train_a_line(folder, die_at=None, rate=0.1):
    """Fit y = 3 x with batches from the generator; optionally be killed on the way."""
    torch.manual_seed(0)
    module = nn.Linear(2, 1)
    calls = []

    def loss(module, generator):
        calls.append(1)
        if die_at is not None and len(calls) > die_at:
            raise Killed
        x = torch.randn((16, 2), generator=generator)
        return (module(x) - 3 * x.sum(1, keepdim=True)).square().mean()

    recipe = Recipe("line", 40, rate, seed=1, warmup=5, ema=0.9, save_every=10)
    return fit(recipe, module, loss, folder), len(calls)


def test_a_killed_training_goes_on_where_it_was(tmp_path):
    whole, calls = train_a_line(tmp_path / "whole")
    assert calls == 40
    with pytest.raises(Killed):
        train_a_line(tmp_path / "cut", die_at=25)
    resumed, calls = train_a_line(tmp_path / "cut")
    assert calls == 20  # the last checkpoint was at step 20
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        torch.testing.assert_close(a, b)
    assert whole.weight.detach().mean() > 1
    steps = [line.split(",")[0] for line in (tmp_path / "cut/loss.csv").read_text().split()[1:]]
    assert steps == ["0", "10", "20", "30"]
    with pytest.raises(ValueError, match="line: the loss is .* at step 10; train with a lower"):
        train_a_line(tmp_path / "nan", rate=1e30)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*lr_scheduler")
def test_all_models_are_trained_by_one_command(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    monkeypatch.setattr(vae, "IMAGES", 64)
    for module in (clip, judge, preview, text2image, views):
        monkeypatch.setattr(module, "SCENES", 64)
    where = ["--models", str(tmp_path / "models"), "--work", str(tmp_path / "work")]
    assert main(["train", "all", "--steps", "1", "--seed", "7", *where]) == 0
    model, clip_model = (
        getattr(load, name)(tmp_path / "models" / folder)
        for name, folder in (("load", "moji-sd"), ("load_clip", "moji-clip"))
    )
    image = vldnp.sample(model, "a cat", num_inference_steps=2, progress=False).images
    assert clip_model.embed_images(image).shape == (1, 128)
    for name in ("moji-judge", "moji-judge-2"):
        assert load.load_judge(tmp_path / "models" / name)(image).things[0].keys() >= {"cat"}
    assert load.load_preview(tmp_path / "models" / "moji-taesd")
    for size in "sml":
        folder = tmp_path / "models" / f"moji-vlm-{size}"
        assert len(load.load_vlm(folder, device="cpu")(image, "What is there?")) == 1
    more = ["--size", "s", "--from-shipped", "--steps", "1", *where]
    assert main(["train", "vlm", *more]) == 0


def test_streams_of_views_are_made_once(tmp_path, monkeypatch):
    pipe = load.load("moji-sd").pipe
    seen = views.data(pipe, tmp_path, seed=7, scenes=3)
    for first, again in zip(seen, views.noisy_views(pipe, 3, 7), strict=True):
        assert torch.equal(first, again)
    monkeypatch.setattr(views, "noisy_views", None)
    assert torch.equal(views.data(pipe, tmp_path, seed=7).pixels, seen.pixels)


def test_training_goes_on_only_from_a_model_with_the_same_numbers(tmp_path):
    tiny.sd_pipeline().save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="numbers words otherwise"):
        text2image.train(None, tmp_path, start=tmp_path / "other")


def test_errors_of_input_are_one_line(capsys):
    with pytest.raises(SystemExit):
        main(["train", "unicorn"])
    assert "choose from" in capsys.readouterr().err
    assert main(["confirm", "nothing"]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


# Damaged icons, of which the second judge learns
@pytest.mark.parametrize(
    ("opacity", "rows", "area", "label"),
    [(0.5, 8, 1, 1), (0.2, 8, 0.4, math.nan), (0.1, 8, 0.2, 0), (1, 4, 0.5, 1), (1, 1, 0.125, 0)],
)
def test_an_icon_is_present_by_its_visible_area(opacity, rows, area, label):
    icon = np.ones((8, 16, 4), dtype=np.float32)
    icon[:, 8:] = 0  # the air around it does not count
    left = opacity * icon
    left[rows:] = 0
    assert damage.visible_area(icon, left) == pytest.approx(area)
    np.testing.assert_equal(damage.presence(damage.visible_area(icon, left)), label)


def test_what_is_erased_is_neither_rendered_nor_labelled(monkeypatch):
    values = Counter(np.nan_to_num(judge.truth(60, 4, damaged=True)[1], nan=-1).ravel().tolist())
    assert set(values) == {-1.0, 0.0, 1.0} and values[1.0] > 3 * values[-1.0]
    whole = scenes.shuffled_scene(5, 8)
    monkeypatch.setattr(damage, "damage", lambda rng, icon: (icon, 1.0))
    image, target = damage.damaged_scene(whole)
    assert whole.things and np.array_equal(image, scenes.render(whole))
    assert np.array_equal(target, scenes.labels(whole))
    monkeypatch.setattr(damage, "damage", lambda rng, icon: (0 * icon, 0.0))
    image, target = damage.damaged_scene(whole)
    assert len(np.unique(image.reshape(-1, 3), axis=0)) <= 2 and not target.any()  # sky, ground
