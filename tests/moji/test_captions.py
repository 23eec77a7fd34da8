"""Captions without restricted words."""

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moji.captions import CaptionsWithout, without
from vldnp.concepts import ConceptSet, load_concepts
from vldnp.models.load import load_clip
from vldnp.study.prompts import load_prompts


class CLIP:
    name, revision = "clip", "1"

    def __call__(self, images, prompts):
        self.prompts = list(prompts)
        return np.zeros(len(images))


MOJI = CaptionsWithout(CLIP(), load_concepts("moji"))


@pytest.mark.parametrize(
    "prompt, left",
    [
        ("a gift and a dagger in the snow", "a gift in the snow"),
        ("a dagger and a gift in the snow", "a gift in the snow"),
        ("a dog, a knife and a turtle in the forest", "a dog and a turtle in the forest"),
        ("a knife, a dog and a turtle in the forest", "a dog and a turtle in the forest"),
        ("a dog, a turtle and a knife in the forest", "a dog and a turtle in the forest"),
        ("a dog, a turtle, and an axe", "a dog and a turtle"),
        ("a knife and a skull in the forest", "in the forest"),
        ("a knife, a cat and a skull in the forest", "a cat in the forest"),
        ("A Knife", ""),
        ("two daggers and a cat", "a cat"),
        ("a bloody knife on the table", "on the table"),
        ("a cat, some blood and pills at the pirate cove", "a cat at the pirate cove"),
        ("a penknife and a skullcap", "a penknife and a skullcap"),
        ("a cat  at the pirate cove , alone", "a cat  at the pirate cove , alone"),
    ],
)
def test_captions_by_hand(prompt, left):
    assert without(prompt, MOJI.words) == left


WORDS = ["a", "an", "the", "and", ",", "cat", "dog", "in", "snow", "knife", "Skulls", "axe", "gun"]


@given(st.lists(st.sampled_from(WORDS), max_size=12).map(" ".join))
def test_no_restricted_word_is_left_and_no_other_is_lost(prompt):
    left, kept = without(prompt, MOJI.words), ("cat", "dog", "in", "snow")
    words = [word for word in re.findall(r"\w+", prompt) if word in kept]
    assert not set(MOJI.words) & set(re.findall(r"\w+", left.lower()))
    assert [word for word in re.findall(r"\w+", left) if word in kept] == words


def test_shipped_prompts_lose_what_is_restricted_and_nothing_else():
    for name in "benign", "implicit", "lookalike":
        prompts = load_prompts(name)["prompt"]
        assert (prompts == prompts.map(lambda prompt: without(prompt, MOJI.words))).all()
    for own in load_prompts("explicit").itertuples():
        left = without(own.prompt, MOJI.words)
        assert not set(own.category.split(", ")) & set(left.split())
        assert all(thing in left for thing in own.things.split(", ")) and own.place in left


def test_a_clip_score_of_reduced_captions_has_a_name_of_its_own():
    MOJI(["image"] * 2, ["a knife and a cat", "a dog"])
    assert MOJI.clip.prompts == ["a cat", "a dog"] and MOJI.name == "clip-without-moji"
    tools = CaptionsWithout(CLIP(), ConceptSet("t", "?", {"chain saw": ("power-tool",), "saw": ()}))
    assert len({CLIP.revision, MOJI.revision, tools.revision}) == 3
    assert without("a chain-saw, a cat and a power tool", tools.words) == "a cat"
    opened = load_clip("moji-clip-without-moji")
    assert (opened.name, opened.words) == ("moji-clip-without-moji", MOJI.words)
