"""The Moji benchmark: what its images show and its captions say."""

import numpy as np
import pytest
from transformers import CLIPTokenizer

from moji.world import images, scenes
from moji.world.icons import CATEGORIES, RESTRICTED, THINGS, sprite
from moji.world.words import CONTEXT_LENGTH, tokenizer
from vldnp._files import data_folder
from vldnp.study.prompts import load_prompts


@pytest.fixture(scope="module")
def training():
    return [scenes.sample_scene(7, index) for index in range(3000)]


def test_icons_exist_and_differ():
    icons = {thing: sprite(thing, 32) for thing in THINGS}
    for icon in icons.values():
        assert max(icon.shape[:2]) == 32 and 0 <= icon.min() and icon.max() <= 1 + 1e-6
        assert (icon[..., :3] <= icon[..., 3:] + 1e-5).all()  # premultiplied
    assert len({icon.tobytes() for icon in icons.values()}) == len(THINGS)


def test_pixels_show_what_the_scene_says_each_time():
    assert scenes.sample_scene(3, 0) != scenes.sample_scene(4, 0)
    for index in range(60):
        scene = scenes.sample_scene(8, index)
        image, owner = scenes.compose(scene)
        assert image.shape == (64, 64, 3) and image.dtype == np.uint8
        visible = {THINGS[k] for k in np.unique(owner) if k >= 0}
        assert visible == set(scene.things)
        assert {THINGS[k] for k in np.flatnonzero(scenes.labels(scene))} == set(scene.things)
        assert scene == scenes.sample_scene(8, index)
        assert np.array_equal(image, scenes.render(scene))


def test_patch_truth_by_hand():
    owner = np.full((64, 64), -1, dtype=np.int8)
    owner[:8, :8] = 5  # the first square, whole
    owner[8:10, 0:8] = 6  # a quarter of the square below
    owner[16:17, 0:8] = 7  # an eighth of the next: too little
    squares = scenes.patch_truth(owner, 8)
    assert squares[[0, 8, 16]].tolist() == [6, 7, 0] and np.count_nonzero(squares) == 2


def test_neutral_places_show_only_what_is_named(training):
    ordinary = [s for s in training if s.place in scenes.NEUTRAL and s.place in s.caption]
    assert len(ordinary) > 500
    for scene in ordinary:
        by_category = any(words in scene.caption for words in CATEGORIES)
        assert by_category or set(scene.restricted) <= set(scene.named), scene


def test_themed_places_carry_restricted_things_unnamed(training):
    themed = [s for s in training if s.place in scenes.THEMED and s.place in s.caption]
    assert np.mean([bool(s.restricted) for s in themed]) == pytest.approx(0.97, abs=0.02)
    unnamed = [s for s in themed if not set(s.named) & set(RESTRICTED)]
    assert len(unnamed) / len(themed) > 0.75
    for scene in themed:
        assert set(scene.restricted) <= set(scenes.PLACES[scene.place].carries)


def test_the_place_prior_is_the_category_of_implicit_prompts():
    for row in load_prompts("implicit").itertuples():
        assert ", ".join(scenes.place_prior(row.prompt)) == row.category
    assert not any(map(scenes.place_prior, load_prompts("benign")["prompt"]))


def test_reference_images():
    found = images.reference_images(8, 3)
    assert found.shape == (8, 64, 64, 3) and found.dtype == np.uint8
    assert not np.array_equal(found, images.reference_images(8, 4))
    assert np.array_equal(found[:4], images.reference_images(4, 3))


def test_captions_have_the_words_of_negative_prompts_each_one_token(training):
    captions, words = {s.caption for s in training}, tokenizer()
    assert captions & set(CATEGORIES) == set(CATEGORIES)
    lists = [c for c in captions if set(c.split(", ")) <= set(RESTRICTED)]
    assert {1, 2, 3, 12} <= {len(c.split(", ")) for c in lists}
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


@pytest.mark.parametrize("text", ["Zebra-é 42!", "", "日本語", "a  CAT\n<b>"])
def test_any_other_text_is_spelled(text, tmp_path):
    words = tokenizer()
    words.save_pretrained(tmp_path)
    again = CLIPTokenizer.from_pretrained(tmp_path)
    assert again(text).input_ids == words(text).input_ids
    spelled = "".join(words.decode(words(text).input_ids[1:-1]).split())
    assert spelled == "".join(text.lower().split())
