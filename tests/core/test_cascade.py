"""The cascade with scripted VLMs: who is asked about what, and whose answer counts."""

import itertools

import pytest
from PIL import Image

from vldnp.core.cascade import Cascade
from vldnp.core.concepts import load_concepts
from vldnp.core.negatives import Dynamic, SampleId
from vldnp.core.schedules import as_schedule
from vldnp.models.vlm import VLMError, ask, describe, identified

MOJI = load_concepts("moji")
PICTURES = [Image.new("L", (2, 2), shade) for shade in range(6)]


class Scripted:
    """Answers by the picture's shade, and keeps what it was asked about."""

    revision = "1"

    def __init__(self, name, *script, **flags):
        self.name, self.script, self.asked = name, script, []
        vars(self).update(flags)

    def __call__(self, images, question, *identities, **choices):
        shades = [image.getpixel((0, 0)) for image in images]
        self.asked.append((shades, *identities, *choices.values()))
        answers = [self.script[shade] for shade in shades]
        if any(isinstance(answer, Exception) for answer in answers):
            known = [None if isinstance(a, Exception) else a for a in answers]
            raise next(VLMError(str(a), known) for a in answers if isinstance(a, Exception))
        return answers


def test_only_what_the_screen_saw_is_confirmed():
    screen = Scripted(
        "s", "none", "a knife", "no knife", "sword", "a cat", "I can't help with that."
    )
    confirm = Scripted("l", *["beer", "none", "beer", "dagger, pill", "beer", "skull"])
    answers = Cascade(screen, confirm, "moji")(PICTURES, MOJI.question)
    assert screen.asked == [([0, 1, 2, 3, 4, 5],)]
    assert confirm.asked == [([1, 3, 5],)]
    assert answers == ["none", "none", "no knife", "dagger, pill", "a cat", "skull"]


def test_the_second_is_not_asked_about_nothing():
    confirm = Scripted("l")
    cascade = Cascade(Scripted("s", *["none"] * 6), confirm, MOJI)
    assert cascade(PICTURES, "?") == ["none"] * 6 and confirm.asked == []
    assert cascade([], "?") == [] and confirm.asked == []


@pytest.mark.parametrize(("one", "other"), list(itertools.product([False, True], repeat=2)))
def test_each_gets_identities_and_choices_if_it_takes_them(one, other):
    screen = Scripted("s", "none", "axe", by_identity=one, takes_choices=other)
    confirm = Scripted("l", "none", "axe", by_identity=other, takes_choices=one)
    identities = [SampleId("a", 3), SampleId("b", 4)]
    ask(Cascade(screen, confirm, MOJI), PICTURES[:2], "?", identities, MOJI.vocabulary)
    terms = tuple(MOJI.vocabulary)
    assert screen.asked == [([0, 1], *[identities] * one, *[terms] * other)]
    assert confirm.asked == [([1], *[identities[1:]] * other, *[terms] * one)]


def test_failures():
    out = RuntimeError("out of order")
    script = ("none", out, "axe", "axe")
    confirm = Scripted("l", "beer", "pill", out, "axe")
    cascade = Cascade(Scripted("s", *script), confirm, MOJI)
    assert cascade([PICTURES[k] for k in (0, 1, 3)], "?") == ["none", "pill", "axe"]
    with pytest.raises(VLMError, match="out of order") as error:
        cascade(PICTURES[:4], "?")
    assert error.value.answers == ["none", "pill", None, "axe"]
    assert error.value.failures == [None, None, "out of order", None]
    policy = Dynamic(cascade, MOJI, as_schedule([0]), on_failure="static", static_prompt="all")
    with pytest.warns(UserWarning, match="on_failure='static' for 1 images"):
        after = policy.updated(PICTURES[:4], policy.initial([SampleId("a", k) for k in range(4)]))
    assert [negative.prompt for negative in after] == [None, "pill", "all", "axe"]


def test_its_identity_is_that_of_both():
    small, large, other = (Scripted(name, "none") for name in ("s", "l", "m"))
    described = [
        describe(Cascade(*pair, MOJI))
        for pair in ((small, large), (large, small), (small, other), (other, large))
    ]
    assert all(a != b for a, b in itertools.combinations(described, 2))
    assert described[0]["screen"] == {"name": "s", "revision": "1"}
    identified(Cascade(small, large, MOJI))
    large.revision = None
    with pytest.raises(ValueError, match="VLM 'l' needs a name and a revision"):
        identified(Cascade(small, large, MOJI))
