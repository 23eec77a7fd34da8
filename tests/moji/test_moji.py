"""The Moji benchmark: what is drawn, what is said of it, and that training can be interrupted."""

import collections

import numpy as np
import pytest
import tiny
import torch
from diffusers import AutoencoderKL
from torch import nn
from transformers import CLIPTokenizer

from moji.__main__ import main
from moji.train import text2image, upper_bound, vlm
from moji.train.loop import Recipe, fit
from moji.world import scenes
from moji.world.icons import CATEGORIES, HARMLESS, RESTRICTED, THINGS, sprite
from moji.world.words import CONTEXT_LENGTH, tokenizer
from vldnp._files import data_folder
from vldnp.models import load


@pytest.fixture(scope="module")
def training():
    return scenes.scenes(3000, seed=7)


def test_icons_exist_and_differ():
    assert len(HARMLESS) == 32 and len(RESTRICTED) == 12
    drawn = {thing: sprite(thing, 32) for thing in THINGS}
    for icon in drawn.values():
        assert max(icon.shape[:2]) == 32 and 0 <= icon.min() and icon.max() <= 1 + 1e-6
        assert (icon[..., :3] <= icon[..., 3:] + 1e-5).all()  # premultiplied
    assert len({icon.tobytes() for icon in drawn.values()}) == len(THINGS)


def test_the_same_seed_gives_the_same_pixels_and_words():
    for index in range(20):
        first, second = (scenes.sample_scene(3, index) for _ in range(2))
        assert first == second
        assert np.array_equal(scenes.render(first), scenes.render(second))
    assert scenes.sample_scene(3, 0) != scenes.sample_scene(4, 0)


def test_pixels_show_what_the_scene_says():
    for scene in scenes.scenes(60, seed=8):
        image, owner = scenes.compose(scene)
        assert image.shape == (64, 64, 3) and image.dtype == np.uint8
        visible = {THINGS[k] for k in np.unique(owner) if k >= 0}
        assert visible == set(scene.things)
        assert {THINGS[k] for k in np.flatnonzero(scenes.labels(scene))} == set(scene.things)


def test_patch_truth_by_hand():
    owner = np.full((64, 64), -1, dtype=np.int8)
    owner[:8, :8] = 5  # the first square, whole
    owner[8:10, 0:8] = 6  # a quarter of the square below
    owner[16:17, 0:8] = 7  # an eighth of the next: too little
    squares = scenes.patch_truth(owner, 8)
    assert squares[[0, 8, 16]].tolist() == [6, 7, 0] and np.count_nonzero(squares) == 2


def test_neutral_places_show_only_what_is_named(training):
    neutral = [s for s in training if s.place in scenes.NEUTRAL and set(s.named) >= set(s.things)]
    assert len(neutral) > 500
    ordinary = [s for s in training if s.place in scenes.NEUTRAL and s.place in s.caption]
    for scene in ordinary:
        named_by_category = any(words in scene.caption for words in CATEGORIES)
        assert named_by_category or set(scene.restricted) <= set(scene.named), scene


def test_themed_places_carry_restricted_things_unnamed(training):
    themed = [s for s in training if s.place in scenes.THEMED and s.place in s.caption]
    assert np.mean([bool(s.restricted) for s in themed]) == pytest.approx(0.97, abs=0.02)
    unnamed = [s for s in themed if not set(s.named) & set(RESTRICTED)]
    assert len(unnamed) / len(themed) > 0.75
    for scene in themed:
        assert set(scene.restricted) <= set(scenes.PLACES[scene.place].carries)


def test_shuffled_scenes_do_not_give_the_answer_away():
    counts = collections.Counter()
    drawn = [scenes.shuffled_scene(5, index) for index in range(4000)]
    for scene in drawn:
        if scene.place == "at the pirate cove":
            counts.update(scene.restricted or ["none"])
    assert counts["none"] > 0.3 * counts.total() / 1.3
    mean = np.mean([counts[thing] for thing in RESTRICTED])
    assert max(counts[t] for t in ("dagger", "skull")) < 2.5 * mean


def test_captions_teach_the_words_of_negative_prompts(training):
    captions = {s.caption for s in training}
    assert captions & set(CATEGORIES) == set(CATEGORIES)
    lists = [c for c in captions if set(c.split(", ")) <= set(RESTRICTED)]
    assert {1, 2, 3, 12} <= {len(c.split(", ")) for c in lists}


def test_every_caption_word_is_one_token(training):
    words = tokenizer()
    for scene in training[:500]:
        tokens = words.tokenize(scene.caption)
        assert len(tokens) == len(scene.caption.replace(",", " ,").split()), scene.caption
        assert len(tokens) <= CONTEXT_LENGTH - 2


def test_words_have_the_numbers_that_the_shipped_models_learnt():
    """Byte-pair training breaks ties at random if it may: then "dog" is another word tomorrow."""
    made = [tokenizer().get_vocab() for _ in range(8)]
    for folder in ("moji-sd/tokenizer", "moji-clip"):
        shipped = CLIPTokenizer.from_pretrained(data_folder() / "models" / folder).get_vocab()
        assert all(vocabulary == shipped for vocabulary in made), folder


def test_training_goes_on_only_from_a_model_with_the_same_numbers(tmp_path):
    tiny.sd_pipeline().save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="numbers words otherwise"):
        text2image.train(None, tmp_path, start=tmp_path / "other")


@pytest.mark.parametrize("text", ["Zebra-é 42!", "", "日本語", "a  CAT\n<b>"])
def test_any_other_text_is_spelled(text, tmp_path):
    words = tokenizer()
    words.save_pretrained(tmp_path)
    again = CLIPTokenizer.from_pretrained(tmp_path)
    assert again(text).input_ids == words(text).input_ids
    spelled = "".join(words.decode(words(text).input_ids[1:-1]).split())
    assert spelled == "".join(text.lower().split())


class Killed(Exception):
    pass


def train_a_line(folder, die_at=None):
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

    recipe = Recipe("line", 40, 0.1, seed=1, warmup=5, ema=0.9, save_every=10)
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
    assert steps == ["0", "10", "20", "30"] and (tmp_path / "cut/loss.png").exists()


def test_streams_of_pictures_follow_each_other_and_are_made_once(tmp_path, monkeypatch):
    pipe = load.load("moji-sd").pipe
    seen = vlm.data(pipe, tmp_path, seed=7, streams=2, scenes=3)
    for kind, parts in enumerate(
        zip(*(vlm.glimpses(pipe, 3, seed) for seed in (7, 8)), strict=True)
    ):
        assert torch.equal(seen[kind], torch.cat(parts))
    monkeypatch.setattr(vlm, "glimpses", None)
    assert torch.equal(vlm.data(pipe, tmp_path, seed=8).pixels, seen.pixels[3:])


def test_command_line_says_what_it_knows(capsys):
    with pytest.raises(SystemExit):
        main(["train", "unicorn"])
    assert "choose from" in capsys.readouterr().err


def test_errors_of_input_are_one_line(tmp_path, capsys):
    assert main(["evaluate", "--models", str(tmp_path / "nowhere")]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


# Empirical upper bound


def test_the_upper_bound_knows_the_caption_and_no_more():
    vae = AutoencoderKL.from_pretrained(data_folder() / "models" / "moji-sd" / "vae")
    latents, words, truth = upper_bound.scenes(vae, 40, 7, evaluation=True)
    assert latents.shape == (40, 4, 16, 16) and truth.shape == (40, len(RESTRICTED))
    for index, row in enumerate(words):
        scene = scenes.sample_scene(7, index, evaluation=True)
        known = {word for word, said in zip(upper_bound.WORDS, row, strict=True) if said}
        assert known & set(THINGS) == set(scene.named)
        assert known - set(THINGS) == ({scene.place} if scene.place else set())
        assert {t for t, there in zip(RESTRICTED, truth[index], strict=True) if there} == set(
            scene.restricted
        )


def test_f1_counts_decisions():
    said = torch.tensor([[1, 1], [0, 0], [1, 0]]).bool()
    true = torch.tensor([[1, 0], [0, 1], [1, 0]]).bool()
    assert upper_bound.f1(said, true) == pytest.approx(2 * 2 / (3 + 3))
