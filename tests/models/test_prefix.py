"""The prefix cache against the same model without it."""

import inspect

import pytest
import tiny_vlms
import torch
from test_constrained import CONCEPTS, pictures

import vldnp

TERMS = ("knife", "skull", "blood", "feet")
SAME = pictures([(56, 32)] * 3, seed=1)


def pair(source, **options):
    shots = [(pictures()[2], "knife, skull"), (pictures()[0], "none")]
    options = {"device": "cpu", "demonstrations": shots, **options}
    return (vldnp.load_vlm(source, prefix_cache=kept, **options) for kept in (False, True))


def counted(vlm, monkeypatch):
    """How many tokens each forward pass computes, over the rows."""
    calls, forward = [], vlm.model.forward

    def counting(*args, **inputs):
        ids = inputs.get("input_ids")
        calls.append(tuple(ids.shape) if ids is not None else None)
        return forward(*args, **inputs)

    counting.__signature__ = inspect.signature(forward)
    monkeypatch.setattr(vlm.model, "forward", counting)
    return calls


@pytest.mark.parametrize("family", tiny_vlms.FAMILIES)
def test_every_family_answers_as_without_it(family, tmp_path, monkeypatch):
    folder = tiny_vlms.save(family, tmp_path)
    plain, kept = pair(folder, max_new_tokens=5)
    torch.manual_seed(0)
    with torch.no_grad():  # otherwise the tiny weights hardly look at what came before
        for one, other in zip(plain.model.parameters(), kept.model.parameters(), strict=True):
            one.normal_(std=0.3)
            other.copy_(one)
    expected = plain(SAME, CONCEPTS.question)
    for _ in range(2):
        calls = counted(kept, monkeypatch)
        assert kept(SAME, CONCEPTS.question) == expected
    longest = plain._inputs(SAME, [CONCEPTS.question] * len(SAME))["input_ids"].shape[1]
    is_kept = family != "llava-onevision"  # cuts a single picture into tiles, and several not
    assert calls[0][0] == 3 and (calls[0][1] < longest / 2) == is_kept
    torch.testing.assert_close(
        kept.probabilities(SAME, CONCEPTS.question, TERMS),
        plain.probabilities(SAME, CONCEPTS.question, TERMS),
        atol=1e-5,
        rtol=1e-4,
    )
    # Pictures of several sizes need padding, and take the plain way.
    assert kept(pictures(), CONCEPTS.question) == plain(pictures(), CONCEPTS.question)


def test_other_demonstrations_are_encoded_anew(tmp_path):
    plain, kept = pair(tiny_vlms.save("qwen2.5-vl", tmp_path), answers="read")
    seen = []
    for shots in (kept.demonstrations, kept.demonstrations[1:], ()):
        plain.demonstrations = kept.demonstrations = shots
        for question in (CONCEPTS.question, "a cat and a dagger?"):
            seen.append(kept.probabilities(SAME, question, TERMS))
            expected = plain.probabilities(SAME, question, TERMS)
            torch.testing.assert_close(seen[-1], expected, atol=1e-5, rtol=1e-4)
    assert len({str(one) for one in seen}) == 6
    assert plain.describe() == kept.describe()
