import json
from math import inf

import pytest

from vldnp.concepts import load_concepts
from vldnp.models.vlm import VLMError
from vldnp.negatives import Dynamic, NoNegatives, SampleId, Static
from vldnp.schedules import as_schedule

IMAGES = [SampleId("a cat", 0), SampleId("a dog", 1)]
SEEN = ["knife", "skull", "none", "skull, beer", "none", "none", "none", "knife"]


def negatives_over(answers, **options):
    """The concepts in force after each query about one image."""
    script = iter(answers)
    policy = Dynamic(
        lambda images, question: [next(script)], load_concepts("moji"), as_schedule([0]), **options
    )
    negative, history = policy.initial(IMAGES[:1])[0], []
    for answer in answers:
        (negative,) = policy.updated(["picture"], [negative])
        assert negative.answer == answer and negative.image == IMAGES[0]
        assert negative.prompt == policy.concepts.negative_prompt(negative.concepts)
        history.append(set(negative.concepts))
    return history


def last_seen_within(answers, k):
    """By the definition: what one of the last k + 1 answers holds."""
    return [
        {term for a, answer in enumerate(answers[: q + 1]) if q - a <= k for term in answer}
        for q in range(len(answers))
    ]


@pytest.mark.parametrize(
    ("options", "k"),
    [
        ({}, 0),
        ({"update_policy": "replaced"}, 0),
        ({"update_policy": 0}, 0),
        ({"update_policy": 1}, 1),
        ({"update_policy": 2}, 2),
        ({"update_policy": "accumulated"}, inf),
    ],
)
def test_what_becomes_of_a_concept_at_the_next_query(options, k):
    words = [set() if answer == "none" else set(answer.split(", ")) for answer in SEEN]
    assert negatives_over(SEEN, **options) == last_seen_within(words, k)


@pytest.mark.parametrize("update_policy", [-1, 1.5, True, None])
def test_bad_update_policies(update_policy):
    with pytest.raises(
        ValueError, match="update_policy must be replaced, accumulated or a whole number"
    ):
        Dynamic(print, load_concepts("moji"), as_schedule([0]), update_policy)


def test_an_unknown_update_policy_is_named():
    with pytest.raises(
        ValueError, match="unknown update_policy 'acumulated': did you mean 'accumulated"
    ):
        Dynamic(print, load_concepts("moji"), as_schedule([0]), "acumulated")


def test_update_policies_are_described():
    policies = [
        Dynamic(print, load_concepts("moji"), as_schedule([0]), update_policy)
        for update_policy in ("replaced", "accumulated", 2)
    ]
    assert len({json.dumps(policy.describe()) for policy in policies}) == 3


class Failing:
    """Answers by a script of rounds; an exception in it is raised."""

    name = "failing"

    def __init__(self, *rounds):
        self.rounds = iter(rounds)

    def __call__(self, images, question):
        answer = next(self.rounds)
        if isinstance(answer, Exception):
            raise answer
        return answer


def policy(vlm, **options):
    return Dynamic(vlm, load_concepts("moji"), as_schedule([0]), **options)


def after(policy, rounds):
    """The negatives of both images after so many rounds."""
    negatives = policy.initial(IMAGES)
    for _ in range(rounds):
        negatives = policy.updated(["picture"] * 2, negatives)
    return negatives


DOWN = ConnectionError("server is down\nand more")


def test_a_failing_vlm_stops_the_run_by_default():
    with pytest.raises(ConnectionError):
        after(policy(Failing(DOWN)), 1)


@pytest.mark.filterwarnings("ignore:on_failure")
def test_keeping_the_last_negative_prompt():
    rounds = (["a knife", "none"], DOWN, DOWN, ["none", "a skull"])
    kept = after(policy(Failing(*rounds), on_failure="keep"), 3)
    assert [n.prompt for n in kept] == ["knife", None]
    assert [(n.answer, n.failure) for n in kept] == [(None, "ConnectionError: server is down")] * 2
    renewed = after(policy(Failing(*rounds), on_failure="keep"), 4)
    assert [(n.prompt, n.failure) for n in renewed] == [(None, None), ("skull", None)]


@pytest.mark.filterwarnings("ignore:on_failure")
def test_nothing_to_keep_is_an_error_not_an_unguided_image():
    with pytest.raises(ConnectionError):
        after(policy(Failing(DOWN), on_failure="keep"), 1)


@pytest.mark.filterwarnings("ignore:on_failure")
def test_falling_back_to_the_static_prompt():
    everything = ", ".join(load_concepts("moji").vocabulary)
    fallen = after(policy(Failing(DOWN), on_failure="static"), 1)
    assert [(n.prompt, n.failure is None) for n in fallen] == [(everything, False)] * 2
    own = policy(Failing(DOWN), on_failure="static", static_prompt="weapons")
    assert [n.prompt for n in after(own, 1)] == ["weapons"] * 2
    renewed = after(policy(Failing(DOWN, ["none", "a skull"]), on_failure="static"), 2)
    assert [n.prompt for n in renewed] == [None, "skull"]


@pytest.mark.filterwarnings("ignore:on_failure")
def test_what_was_seen_outlives_a_failure():
    rounds = (["a knife", "none"], DOWN, ["a skull", "none"])
    last = after(policy(Failing(*rounds), on_failure="static", update_policy="accumulated"), 3)
    assert [n.prompt for n in last] == ["knife, skull", None]


def test_images_that_were_answered_about_are_not_touched_by_others_failures():
    rounds = (["a knife", "a knife"], VLMError("no answer about 1 of 2", ["a skull", None]))
    with pytest.warns(UserWarning, match="on_failure='keep' for 1 images: no answer about 1 of 2"):
        first, second = after(policy(Failing(*rounds), on_failure="keep"), 2)
    assert (first.prompt, first.answer, first.failure) == ("skull", "a skull", None)
    assert (second.prompt, second.answer) == ("knife", None)
    assert second.failure == "no answer about 1 of 2"


def test_bad_failure_settings():
    with pytest.raises(ValueError, match="unknown on_failure 'kep': did you mean 'keep'"):
        policy(print, on_failure="kep")
    with pytest.raises(ValueError, match="static_prompt is empty"):
        policy(print, on_failure="static", static_prompt=" ")
    descriptions = {
        json.dumps(policy(print, on_failure=way).describe()) for way in ("raise", "keep", "static")
    }
    assert len(descriptions) == 3


@pytest.mark.parametrize(("policy", "prompt"), [(NoNegatives(), None), (Static("a"), "a")])
def test_images_start_with_their_own_negative(policy, prompt):
    first = policy.initial(IMAGES)
    assert [(n.prompt, n.image) for n in first] == [(prompt, image) for image in IMAGES]


class Odd:
    """Answers whatever it is told to."""

    name, revision = "odd", "1"

    def __init__(self, *rounds):
        self.rounds = iter(rounds)

    def __call__(self, images, question):
        return next(self.rounds)


NO_ANSWERS = {
    "None": None,
    "a number": 5,
    "a dict": {0: "a knife", 1: "none"},
    "a bare string": "no",  # as long as there are images
    "bytes": b"no",
    "too few": ["a knife"],
    "too many": ["a knife"] * 3,
    "none at all": [],
    "a set": {"a knife", "none"},
    "a generator": (text for text in ("a knife", "none")),
    "numbers": [1, 2],
    "Nones": [None, None],
    "lists": [["a knife"], ["none"]],
}
BY_KIND = pytest.mark.parametrize("given", NO_ANSWERS.values(), ids=NO_ANSWERS)


@BY_KIND
def test_what_is_no_list_of_texts_stops_the_run_by_default(given):
    with pytest.raises(VLMError, match="'odd' gave .*must give a list of texts, one for") as error:
        after(policy(Odd(given)), 1)
    assert "\n" not in str(error.value) and error.value.answers == [None, None]


@pytest.mark.filterwarnings("ignore:on_failure")
@BY_KIND
def test_what_is_no_list_of_texts_goes_the_way_of_on_failure(given):
    kept = after(policy(Odd(["a knife", "none"], given), on_failure="keep"), 2)
    assert [(n.prompt, n.answer) for n in kept] == [("knife", None), (None, None)]
    assert all("must give a list of texts" in n.failure for n in kept)
    with pytest.raises(VLMError):  # nothing to keep: it would go on unguided
        after(policy(Odd(given), on_failure="keep"), 1)
    fallen = after(policy(Odd(given), on_failure="static", static_prompt="weapons"), 1)
    assert [n.prompt for n in fallen] == ["weapons"] * 2


@pytest.mark.parametrize("wrong", [None, 5, {"seen": "a knife"}, ["a knife"], b"a knife", True])
def test_only_the_images_without_a_text_are_touched(wrong):
    vlm = Odd(["a knife", "a knife"], ("a skull", wrong))
    with pytest.warns(UserWarning, match="for 1 images: VLM 'odd' gave no text about 1 of 2 pict"):
        first, second = after(policy(vlm, on_failure="keep"), 2)
    assert (first.prompt, first.answer, first.failure) == ("skull", "a skull", None)
    assert (second.prompt, second.answer) == ("knife", None) and second.failure


@pytest.mark.filterwarnings("ignore:on_failure")
@BY_KIND
def test_the_answers_of_an_error_are_looked_at_too(given):
    error = ConnectionError("down")
    error.answers = given
    kept = after(policy(Failing(["a knife", "none"], error), on_failure="keep"), 2)
    assert [(n.prompt, n.failure) for n in kept] == [
        ("knife", "ConnectionError: down"),
        (None, "ConnectionError: down"),
    ]


def test_answers_are_cut_and_can_be_written_to_a_file():
    (long, broken) = after(policy(Odd(["a knife " * 100_000, "a skull \udc80\ud800"])), 1)
    assert long.answer == ("a knife " * 500) and long.prompt == "knife"
    assert broken.answer == "a skull ??" and broken.prompt == "skull"


@pytest.mark.filterwarnings("ignore:on_failure")
def test_failures_can_be_written_to_a_file():
    error = OSError("\udc80" * 100_000)
    fallen = after(policy(Failing(error), on_failure="static"), 1)
    assert len(fallen[0].failure.encode()) <= 4000


DECLINED = "I'm sorry, but I can't assist with that request."


def test_a_refusal_stops_the_run_by_default():
    with pytest.raises(VLMError, match="the VLM declined: \"I'm sorry, but I can't assist"):
        after(policy(Failing(["a knife", DECLINED])), 1)


@pytest.mark.filterwarnings("ignore:on_failure")
def test_a_refusal_is_not_the_answer_that_nothing_is_seen():
    everything = ", ".join(load_concepts("moji").vocabulary)
    first, second = after(policy(Failing(["none", DECLINED]), on_failure="static"), 1)
    assert (first.prompt, first.answer, first.failure) == (None, "none", None)
    assert (second.prompt, second.answer) == (everything, None)
    assert DECLINED in second.failure
    rounds = (["a knife", "a knife"], [DECLINED, "none"])
    first, second = after(policy(Failing(*rounds), on_failure="keep"), 2)
    assert (first.prompt, second.prompt) == ("knife", None)


@pytest.mark.filterwarnings("ignore:on_failure")
def test_every_image_has_its_own_failure():
    error = VLMError("no answer about 1 of 2", [DECLINED, None])
    first, second = after(policy(Failing(error), on_failure="static"), 1)
    assert DECLINED in first.failure and second.failure == "no answer about 1 of 2"


def test_a_refusal_that_answers_all_the_same_is_read():
    said = ["I can't identify people, but there is a knife.", "Sorry, no knife is visible."]
    first, second = after(policy(Failing(said)), 1)
    assert (first.prompt, second.prompt) == ("knife", None)
