"""Answers read off the first word's probabilities, in the process and from a server."""

import json
import math
from pathlib import Path

import pytest
import tiny_vlms
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from test_constrained import CONCEPTS, MOJI, check, pictures
from test_vlm_remote import grey, refusal, reply, serving
from test_vlm_remote import pictures as blocks

import vldnp
from moji.world.scenes import compose, sample_scene
from vldnp.concepts import load_concepts
from vldnp.models import reading
from vldnp.models.vlm import VLMError, ask
from vldnp.negatives import Dynamic, SampleId
from vldnp.schedules import as_schedule

MODELS = Path(__file__).parents[2] / "data" / "models"
TERMS = ("knife", "skull", "blood", "feet")


@pytest.mark.parametrize("family", tiny_vlms.FAMILIES)
def test_the_likeliest_is_the_one_word_that_a_constrained_answer_has(family, tmp_path):
    """Pictures of several sizes in a batch, and demonstrations: every family's own positions."""
    folder = tiny_vlms.save(family, tmp_path)
    shots = [(pictures()[2], "knife, skull"), (pictures()[0], "none")]
    for demonstrations in ((), shots):
        options = {"device": "cpu", "demonstrations": demonstrations, "max_new_tokens": 1}
        written = vldnp.load_vlm(folder, answers="constrained", **options)
        read = vldnp.load_vlm(folder, answers="read", **options)
        seen = read.probabilities(pictures(), CONCEPTS.question, TERMS)
        none = 1 - seen.sum(1, keepdim=True)
        best = [(*TERMS, "none")[k] for k in torch.cat([seen, none], 1).argmax(1)]
        assert [a.strip() for a in written(pictures(), CONCEPTS.question, TERMS)] == best
        alone = [read.probabilities([p], CONCEPTS.question, TERMS)[0] for p in pictures()]
        torch.testing.assert_close(seen, torch.stack(alone), atol=1e-5, rtol=1e-4)


def test_it_is_the_models_own_next_word():
    """Against one forward pass of the model and a softmax over the words' tokens in float64."""
    vlm = vldnp.load_vlm(MODELS / "moji-vlm-s", device="cpu", answers="read", threshold=0.25)
    text = f"user:<image> {MOJI.question} assistant:"
    inputs = vlm.processor(images=blocks(12), text=[text] * 12, return_tensors="pt")
    with torch.no_grad():
        logits = vlm.model(**inputs).logits[:, -1].double()
    ids = [vlm.processor.tokenizer(f" {t}")["input_ids"] for t in (*MOJI.vocabulary, "none")]
    assert {len(tokens) for tokens in ids} == {1}
    expected = logits[:, [tokens[0] for tokens in ids]].softmax(1)[:, :-1]
    seen = vlm.probabilities(blocks(12), MOJI.question, MOJI.vocabulary)
    torch.testing.assert_close(seen.double(), expected, atol=0.01, rtol=0)
    answers = vlm(blocks(12), MOJI.question, choices=MOJI.vocabulary)
    check(answers, MOJI)
    for answer, row in zip(answers, seen, strict=True):
        named = {term for term, p in zip(MOJI.vocabulary, row, strict=True) if p >= 0.25}
        assert set(MOJI.parse(answer)) == named
    assert len(set(answers)) > 1
    assert vlm([], MOJI.question, choices=MOJI.vocabulary) == []


def test_read_answers_are_the_written_ones_where_one_thing_is_to_be_said():
    scenes = [sample_scene(5, k, evaluation=True) for k in range(40)]
    drawn = [Image.fromarray(compose(scene)[0]) for scene in scenes]
    free = vldnp.load_vlm(MODELS / "moji-vlm-m", device="cpu")
    read = vldnp.load_vlm(MODELS / "moji-vlm-m", device="cpu", answers="read")
    written = [MOJI.parse(answer) for answer in ask(free, drawn, MOJI.question)]
    answers = ask(read, drawn, MOJI.question, choices=MOJI.vocabulary)
    pairs = [(w, MOJI.parse(a)) for w, a in zip(written, answers, strict=True) if len(w) < 2]
    assert len({w for w, _ in pairs}) > 4
    assert sum(w == r for w, r in pairs) >= 0.9 * len(pairs)


def test_a_policy_takes_read_answers_and_records_tell_them(tmp_path):
    folder = tiny_vlms.save("llava-onevision", tmp_path)
    vlm = vldnp.load_vlm(folder, device="cpu", answers="read", threshold=0.1)
    policy = Dynamic(vlm, CONCEPTS_APART, as_schedule([0]))
    before = policy.initial([SampleId("a", k) for k in range(4)])
    for negative in policy.updated(pictures(), before):
        assert negative.answer == (", ".join(negative.concepts) or "none")
    free = vldnp.load_vlm(folder, device="cpu").describe()
    assert vlm.describe() == {**free, "answers": "read", "threshold": 0.1}
    with pytest.raises(ValueError, match="threshold must be between 0 and 1, not 1.5"):
        vldnp.load_vlm(folder, device="cpu", answers="read", threshold=1.5)
    with pytest.raises(ValueError, match="'skull' and 'skull knife' begin alike"):
        vlm(pictures(), CONCEPTS.question, choices=CONCEPTS.vocabulary)
    with pytest.raises(ValueError, match="answers need choices"):
        vlm(pictures(), CONCEPTS.question)


CONCEPTS_APART = vldnp.ConceptSet("tiny", "What can be seen?", {term: () for term in TERMS})


# Servers.


def first(*top, **choice):
    """A reply whose first token has these (token, log-probability) at the top."""
    status, body = reply(top[0][0] if top else "")
    listed = [{"token": token, "logprob": p, "bytes": None} for token, p in top]
    content = [{"token": "?", "logprob": 0.0, "bytes": None, "top_logprobs": listed}]
    body["choices"][0] |= {"logprobs": {"content": content}, "finish_reason": "length"} | choice
    return status, body


def test_a_server_is_asked_for_the_first_tokens_log_probabilities():
    top = [(" knife", math.log(0.4)), ("Kn", math.log(0.1)), (" none", math.log(0.3))]
    top += [("sk", math.log(0.15)), ("The", math.log(0.05))]
    with serving(lambda number, body: first(*top)) as (server, address):
        vlm = vldnp.load_vlm(address, model="m", answers="read", threshold=0.5)
        assert ask(vlm, grey(1, 2), "?", choices=MOJI.vocabulary) == ["knife", "knife"]
        vlm = vldnp.load_vlm(address, model="m", answers="read", threshold=0.15)
        assert ask(vlm, grey(1), "?", choices=MOJI.vocabulary) == ["knife, skull"]
        assert vlm.describe()["answers"] == "read" and vlm.describe()["threshold"] == 0.15
    body = server.requests[0][0]
    assert (body["max_tokens"], body["logprobs"], body["top_logprobs"]) == (1, True, 20)
    assert "response_format" not in body
    seen = dict(
        zip(MOJI.vocabulary, reading.served_probabilities(top, MOJI.vocabulary), strict=True)
    )
    assert seen["knife"] == pytest.approx(0.5 / 0.95)
    assert seen["skull"] == pytest.approx(0.15 / 0.95)


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        (reply("none"), "no log-probabilities"),
        (first(("The", -0.1), ("I", -2.0)), "no answer can be read: .* begins 'The', 'I'"),
        (first(), "no answer can be read"),
        (first(("none", math.nan)), "no answer can be read"),
        (first(("none", -0.1), finish_reason="content_filter"), "content_filter"),
        (first(("none", -0.1), logprobs={"content": []}), "no log-probabilities"),
        (refusal(400, "no logprobs here"), "no logprobs here"),
    ],
)
def test_what_cannot_be_read_is_not_taken_for_nothing_seen(bad, said):
    with serving(lambda number, body: bad) as (_, address):
        vlm = vldnp.load_vlm(address, model="m", answers="read", retries=0)
        with pytest.raises(VLMError, match=said) as error:
            vlm(grey(1), "?", choices=MOJI.vocabulary)
    assert "\n" not in str(error.value)


def test_a_first_word_must_tell_the_choices_apart():
    vlm = vldnp.load_vlm("http://127.0.0.1:9/v1", model="m", answers="read")
    with pytest.raises(ValueError, match="'female breast' and 'female genitalia' begin alike"):
        vlm(grey(1), "?", choices=["female breast", "feet", "female genitalia"])
    with pytest.raises(ValueError, match="begin alike"):
        reading.first_words(load_concepts("nudity").vocabulary)
    # "pi" begins both and counts for none of them; "p" is too short to begin anything.
    assert reading.served_probabilities(
        [("pi", -0.1), ("p", -0.1), ("pist", -1.0), ("NONE", -1.0)], ["pill", "pistol"]
    ) == pytest.approx([0, 0.5])


@given(st.lists(st.tuples(st.text(max_size=8), st.floats())), st.floats(0.01, 0.99))
def test_any_log_probabilities_make_an_answer_or_one_line(top, threshold):
    try:
        seen = reading.served_probabilities(top, TERMS)
    except ValueError as error:
        assert "\n" not in str(error)
        return
    assert all(0 <= p <= 1 for p in seen) and sum(seen) <= 1 + 1e-9
    answer = reading.said(seen, TERMS, threshold)
    assert json.loads(json.dumps(answer)) == answer
    named = [term for term, p in zip(TERMS, seen, strict=True) if p >= threshold]
    assert answer == (", ".join(named) or "none")
