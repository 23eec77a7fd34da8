import pytest
import torch

from vldnp import guidance

U = torch.tensor([1.0, 2.0]).view(2, 1, 1, 1)
C = torch.tensor([3.0, -1.0]).view(2, 1, 1, 1)
N = torch.tensor([0.5, 4.0]).view(2, 1, 1, 1)


def values(tensor):
    return tensor.flatten().tolist()


def test_the_equations_by_hand():
    assert values(guidance.cfg(U, C, 3.0)) == [1 + 3 * 2, 2 + 3 * -3]
    assert values(guidance.added(C, N, U, 2.0)) == [3 - 2 * -0.5, -1 - 2 * 2]
    assert values(guidance.replaced(N, C, 3.0)) == [0.5 + 3 * 2.5, 4 + 3 * -5]


def test_the_rules_are_the_equations():
    added = guidance.rule("added")(U, C, N, 3.0, 2.0)
    assert values(added) == [1 + 3 * 2 - 2 * -0.5, 2 + 3 * -3 - 2 * 2]
    assert torch.equal(guidance.rule("replaced")(U, C, N, 3.0, 2.0), guidance.replaced(N, C, 3.0))


def test_a_scale_per_image():
    g = torch.tensor([0.0, 1.0]).view(2, 1, 1, 1)
    assert values(guidance.cfg(U, C, g)) == [1.0, -1.0]  # the unconditional, the conditional


@pytest.mark.parametrize("name", guidance.RULES)
def test_equal_predictions_stay_as_they_are(name):
    """The weights of every rule sum to one."""
    assert values(guidance.rule(name)(U, U, U, 7.5, 15.0)) == values(U)


def test_a_callable_is_a_rule():
    def mean(uncond, cond, neg, guidance_scale, omega):
        return (uncond + cond) / 2

    assert guidance.rule(mean) is mean


def test_an_unknown_rule_is_named():
    with pytest.raises(ValueError, match="'aded'.*added, .*replaced"):
        guidance.rule("aded")
