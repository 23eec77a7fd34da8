import json
from math import inf

import pytest

from vldnp.concepts import load_concepts
from vldnp.negatives import Dynamic, ImageId, NoNegatives, Static
from vldnp.schedules import as_schedule

IMAGES = [ImageId("a cat", 0), ImageId("a dog", 1)]
SEEN = ["knife", "skull", "none", "skull, beer", "none", "none", "none", "knife"]


def negatives_over(answers, **options):
    """The concepts in force after each query about one image."""
    script = iter(answers)
    policy = Dynamic(
        lambda images, question: [next(script)], load_concepts("moji"), as_schedule([0]), **options
    )
    negative, history = policy.initial(IMAGES[:1])[0], []
    for answer in answers:
        (negative,) = policy.renewed(["picture"], [negative])
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
        ({"renewal": "replaced"}, 0),
        ({"renewal": 0}, 0),
        ({"renewal": 1}, 1),
        ({"renewal": 2}, 2),
        ({"renewal": "accumulated"}, inf),
    ],
)
def test_what_becomes_of_a_concept_at_the_next_query(options, k):
    words = [set() if answer == "none" else set(answer.split(", ")) for answer in SEEN]
    assert negatives_over(SEEN, **options) == last_seen_within(words, k)


@pytest.mark.parametrize("renewal", [-1, 1.5, True, None])
def test_bad_renewals(renewal):
    with pytest.raises(ValueError, match="renewal must be replaced, accumulated or a whole number"):
        Dynamic(print, load_concepts("moji"), as_schedule([0]), renewal)


def test_an_unknown_renewal_is_named():
    with pytest.raises(ValueError, match="unknown renewal 'acumulated': did you mean 'accumulated"):
        Dynamic(print, load_concepts("moji"), as_schedule([0]), "acumulated")


def test_renewals_are_described():
    policies = [
        Dynamic(print, load_concepts("moji"), as_schedule([0]), renewal)
        for renewal in ("replaced", "accumulated", 2)
    ]
    assert len({json.dumps(policy.describe()) for policy in policies}) == 3


@pytest.mark.parametrize(("policy", "prompt"), [(NoNegatives(), None), (Static("a"), "a")])
def test_images_start_with_their_own_negative(policy, prompt):
    first = policy.initial(IMAGES)
    assert [(n.prompt, n.image) for n in first] == [(prompt, image) for image in IMAGES]
