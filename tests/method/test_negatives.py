from dataclasses import replace
from math import inf

import pytest

from vldnp.concepts import load_concepts
from vldnp.models.vlm import VLMError
from vldnp.negatives import Dynamic, Policy, Static
from vldnp.schedules import as_schedule

EVERYTHING = ", ".join(load_concepts("moji").vocabulary)
SEEN = ["knife", "skull", "none", "skull, beer", "none", "none", "none", "knife"]


class Scripted:
    """Gives one round of answers after the other; an exception is raised."""

    name, revision = "scripted", "1"

    def __init__(self, *rounds):
        self.rounds, self.questions = iter(rounds), []

    def __call__(self, images, question):
        self.questions.append((len(images), question))
        answers = next(self.rounds)
        if isinstance(answers, Exception):
            raise answers
        return answers


def policy(*rounds, **options):
    return Dynamic(Scripted(*rounds), load_concepts("moji"), as_schedule([0]), **options)


class Shown:
    """A view of so many images."""

    def __init__(self, count):
        self.images = ["image"] * count

    def of(self, some):
        return Shown(len(some))


def after(policy, rounds, images=2):
    """The negatives of the images after so many queries."""
    negatives = policy.initial(["a cat"] * images, [0] * images)
    for _ in range(rounds):
        negatives = policy.look(Shown(images), negatives)
    return negatives


@pytest.mark.parametrize(
    ("update_policy", "k"), [("replaced", 0), (0, 0), (1, 1), (2, 2), ("accumulated", inf)]
)
def test_what_happens_to_a_concept_at_the_next_query(update_policy, k):
    """By the definition: a concept is in while one of the last k + 1 answers names it."""
    words = [set() if answer == "none" else set(answer.split(", ")) for answer in SEEN]
    for q in range(len(SEEN)):
        scripted = policy(*([a] for a in SEEN), update_policy=update_policy)
        (negative,) = after(scripted, q + 1, images=1)
        expected = {term for a, named in enumerate(words[: q + 1]) if q - a <= k for term in named}
        assert set(negative.concepts) == expected and negative.answer == SEEN[q]
        assert negative.prompt == load_concepts("moji").negative_prompt(expected)


def test_lead_only():
    concepts = replace(load_concepts("moji"), lead="forbidden")
    given = Scripted(["knife, skull", "none", "?"], ["?"])
    own = Dynamic(given, concepts, as_schedule([0]), lead_only=True)
    first, second, unread = after(own, 1, images=3)
    assert (first.prompt, first.concepts) == ("forbidden", ("knife", "skull"))
    assert second.prompt is None and unread.prompt == "forbidden" and unread.failure
    assert own.describe()["lead_only"] and "lead_only" not in policy().describe()
    with pytest.raises(ValueError, match="lead_only needs a lead; 'moji' has none"):
        policy(lead_only=True)


def test_bad_settings():
    for wrong in (-1, 1.5, True, None, "acumulated"):
        with pytest.raises(ValueError, match="update_policy must be replaced, accumulated or a w"):
            policy(update_policy=wrong)
    with pytest.raises(ValueError, match="unknown on_failure 'statc': did you mean 'static'"):
        policy(on_failure="statc")
    with pytest.raises(ValueError, match="static_prompt is empty"):
        policy(on_failure="static", static_prompt=" ")


@pytest.mark.parametrize(("policy", "prompt"), [(Policy(), None), (Static("a"), "a")])
def test_policies_without_a_vlm(policy, prompt):
    assert [negative.prompt for negative in after(policy, 1)] == [prompt] * 2
    assert policy.query_steps_of(50) == ()


# No answer
DOWN = ConnectionError("server is down\nand more")


@pytest.mark.filterwarnings("ignore:no answer")
def test_falling_back_to_the_static_negative_prompt():
    fallen = after(policy(DOWN, on_failure="static"), 1)
    assert [(n.prompt, n.answer) for n in fallen] == [(EVERYTHING, None)] * 2
    assert [n.failure for n in fallen] == ["ConnectionError: server is down"] * 2
    own = policy(DOWN, on_failure="static", static_prompt="weapons")
    assert [n.prompt for n in after(own, 1)] == ["weapons"] * 2
    renewed = after(policy(DOWN, ["none", "a skull"], on_failure="static"), 2)
    assert [(n.prompt, n.failure) for n in renewed] == [(None, None), ("skull", None)]


@pytest.mark.filterwarnings("ignore:no answer")
def test_what_was_seen_outlives_a_failure():
    rounds = (["a knife", "none"], DOWN, ["a skull", "none"])
    last = after(policy(*rounds, on_failure="static", update_policy="accumulated"), 3)
    assert [n.prompt for n in last] == ["knife, skull", None]


def test_images_that_were_answered_about_are_not_touched_by_others_failures():
    rounds = (["a knife", "a knife"], VLMError("no answer about 1 of 2", ["a skull", None]))
    with pytest.warns(UserWarning, match="no answer about 1 images: VLMError: no answer about 1 o"):
        first, second = after(policy(*rounds, on_failure="static"), 2)
    assert (first.prompt, first.answer, first.failure) == ("skull", "a skull", None)
    assert (second.prompt, second.answer) == (EVERYTHING, None)
    assert "no answer about 1 of 2" in second.failure


@pytest.mark.filterwarnings("ignore:no answer")
def test_every_image_has_its_own_failure():
    error = VLMError("two failed", [None, None], ["too small", None])
    first, second = after(policy(error, on_failure="static"), 1)
    assert first.failure == "too small" and "two failed" in second.failure


NO_ANSWERS = {
    "None": None,
    "a number": 5,
    "a dict": {0: "a knife", 1: "none"},
    "a bare string": "no",  # as long as there are images
    "bytes": b"no",
    "too few": ["a knife"],
    "too many": ["a knife"] * 3,
    "a set": {"a knife", "none"},
    "a generator": (text for text in ("a knife", "none")),
    "numbers": [1, 2],
    "lists": [["a knife"], ["none"]],
}


@pytest.mark.filterwarnings("ignore:no answer")
@pytest.mark.parametrize("given", NO_ANSWERS.values(), ids=NO_ANSWERS)
def test_what_is_no_list_of_texts_is_no_answer(given):
    with pytest.raises(VLMError, match="'scripted' gave .*must give a list of texts") as error:
        after(policy(given), 1)
    assert "\n" not in str(error.value) and error.value.answers == [None, None]
    fallen = after(policy(given, on_failure="static", static_prompt="weapons"), 1)
    assert [n.prompt for n in fallen] == ["weapons"] * 2
    broken = ConnectionError("down")
    broken.answers = given
    fallen = after(policy(broken, on_failure="static"), 1)
    assert [n.failure for n in fallen] == ["ConnectionError: down"] * 2


@pytest.mark.filterwarnings("ignore:no answer")
def test_texts_can_be_written_to_a_file():
    (long, broken) = after(policy(["a knife, " * 100_000, "a skull \udc80\ud800"], ["none"] * 2), 1)
    assert long.answer == "none" and broken.answer == "none"  # neither was understood at first
    fallen = after(policy(OSError("\udc80" * 100_000), on_failure="static"), 1)
    assert len(fallen[0].failure.encode()) <= 4000


# Answers that are not understood

DECLINED = "I'm sorry, but I can't assist with that request."


@pytest.mark.parametrize("answer", [DECLINED, "", "xyzzy", "Yes.", "<think>I see a", "no knife"])
def test_what_is_not_understood_is_asked_again_and_never_means_that_nothing_is_seen(answer):
    asked = policy(["none", answer], ["a skull"])
    first, second = after(asked, 1)
    assert (first.prompt, second.prompt, second.failure) == (None, "skull", None)
    (_, question), (count, again) = asked.vlm.questions
    assert count == 1 and again.startswith(question) and again.endswith(EVERYTHING)
    first, second = after(policy(["a knife", answer], [answer]), 1)
    assert (first.prompt, first.failure) == ("knife", None)
    assert (second.prompt, second.answer) == (EVERYTHING, answer)
    assert "not understood" in second.failure


@pytest.mark.filterwarnings("ignore:no answer")
def test_a_second_query_may_fail():
    _, second = after(policy(["none", DECLINED], DOWN, on_failure="static"), 1)
    assert (second.prompt, second.failure) == (EVERYTHING, "ConnectionError: server is down")


def test_the_official_reading_finds_nothing_in_a_refusal_and_says_so():
    scripted = Scripted([DECLINED, "none", "a knife"])
    official = Dynamic(scripted, load_concepts("moji", "official"), as_schedule([0]))
    declined, none, knife = after(official, 1, images=3)
    assert declined.prompt is None and "not understood" in declined.failure
    assert (none.prompt, none.failure, knife.prompt) == (None, None, "knife")
