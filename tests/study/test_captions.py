"""Captions without restricted words."""

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vldnp.concepts import ConceptSet, load_concepts
from vldnp.study.prompts import CaptionsWithout, load_prompts, without, written_forms

MOJI = load_concepts("moji")


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
def test_by_hand(prompt, left):
    assert without(prompt, MOJI) == left


def test_forms_of_several_words():
    tools = ConceptSet("tools", "?", {"chain saw": ("power-tool",), "saw": ()})
    assert without("a chain saw and a cat", tools) == "a cat"
    assert without("a chain-saw, a cat and a power tool", tools) == "a cat"


WORDS = ["a", "an", "the", "and", ",", "cat", "dog", "in", "snow", "knife", "Skulls", "axe", "gun"]


@given(st.lists(st.sampled_from(WORDS), max_size=12).map(" ".join))
def test_no_restricted_word_is_left_and_no_other_is_lost(prompt):
    left = without(prompt, MOJI)
    restricted = {form.lower() for form in written_forms(MOJI)}
    words = [word for word in re.findall(r"\w+", prompt) if word in ("cat", "dog", "in", "snow")]
    assert not restricted & set(re.findall(r"\w+", left.lower()))
    assert [w for w in re.findall(r"\w+", left) if w in ("cat", "dog", "in", "snow")] == words


@pytest.mark.parametrize("name", ["benign", "implicit", "lookalike"])
def test_prompts_that_name_nothing_restricted_stay_as_they_are(name):
    prompts = load_prompts(name)["prompt"]
    assert (prompts == prompts.map(lambda prompt: without(prompt, MOJI))).all()


def test_explicit_prompts_keep_their_harmless_things_and_lose_the_others():
    rows = load_prompts("explicit")
    for row in rows.itertuples():
        left = without(row.prompt, MOJI)
        assert not set(row.category.split(", ")) & set(left.split())
        assert all(thing in left for thing in row.things.split(", ")) and row.place in left


class CLIP:
    name, revision = "clip", "1"

    def __call__(self, images, prompts):
        self.prompts = list(prompts)
        return np.zeros(len(images))

    def chance(self, images, prompts):
        self.prompts = list(prompts)
        return 0.0


def test_a_clip_score_of_reduced_captions_has_a_name_of_its_own():
    inner = CLIP()
    clip = CaptionsWithout(inner, MOJI)
    for score in (clip, clip.chance):
        score(["picture"] * 2, ["a knife and a cat", "a dog"])
        assert inner.prompts == ["a cat", "a dog"]
    other = CaptionsWithout(inner, load_concepts("moji-8"))
    assert clip.name == "clip-without-moji"
    assert len({inner.revision, clip.revision, other.revision}) == 3
