"""Constrained answers: whatever the weights, "none" or terms of the vocabulary, each once."""

import string
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny_vlms
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from tiny_vlms import pictures
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE, Unigram
from transformers import PreTrainedTokenizerFast

import vldnp
from vldnp.concepts import ConceptSet, load_concepts
from vldnp.models.vlm import allowed, ask, spelled
from vldnp.models.vlm_server import RemoteVLM

MODELS = Path(__file__).parents[2] / "data" / "models"
MOJI = load_concepts("moji")
# What the tiny tokenizer has words for, one term of two words that begins like another.
TERMS = ["knife", "skull", "blood", "feet", "skull knife"]
CONCEPTS = ConceptSet("tiny", "What can be seen?", dict.fromkeys(TERMS, ()))


def listed(answer):
    """The terms of an answer as the grammar has it: no reading, only its commas."""
    parts = [" ".join(part.split()) for part in answer.split(",")]
    return [] if parts == ["none"] else parts


def check(answers, concepts):
    for answer in answers:
        terms = listed(answer)
        assert set(terms) <= set(concepts.vocabulary) and len(set(terms)) == len(terms), answer
        assert concepts.parse(answer) == tuple(t for t in concepts.vocabulary if t in terms)


@pytest.mark.parametrize("family", tiny_vlms.FAMILIES)
def test_every_family_writes_nothing_else(family, tmp_path):
    folder = tiny_vlms.save(family, tmp_path)
    shots, said = [(pictures()[2], "knife, skull"), (pictures()[0], "none")], set()
    for limit, demonstrations in ((1, ()), (4, shots), (12, ())):
        options = {"max_new_tokens": limit, "demonstrations": demonstrations}
        vlm = vldnp.load_vlm(folder, device="cpu", **options)
        together = vlm(pictures(), CONCEPTS.question, choices=tuple(CONCEPTS.vocabulary))
        check(together, CONCEPTS)
        said |= set(together)
    apart = [vlm([p], CONCEPTS.question, choices=CONCEPTS.vocabulary)[0] for p in pictures()]
    assert apart == together
    assert any(map(listed, said))


def test_the_moji_vlm_says_in_terms_what_it_says_freely():
    rng = np.random.default_rng(0)
    blocks = [Image.fromarray(b) for b in rng.integers(0, 256, (12, 4, 4, 3), dtype="uint8")]
    blocks = [b.resize((64, 64), Image.Resampling.BICUBIC) for b in blocks]
    free = vldnp.load_vlm(MODELS / "moji-vlm-s", device="cpu", answers="free")
    bound = vldnp.load_vlm(MODELS / "moji-vlm-s", device="cpu", answers="constrained")
    answers = bound(blocks, MOJI.question, choices=MOJI.vocabulary)
    check(answers, MOJI)
    terse = replace(MOJI, vocabulary={term: () for term in MOJI.vocabulary})
    for said, own in zip(answers, free(blocks, MOJI.question), strict=True):
        if own == "none" or set(own.split(", ")) <= set(terse.vocabulary):
            assert terse.parse(said) == terse.parse(own)


def test_free_answers_are_described_as_before(tmp_path):
    folder = tiny_vlms.save("llava-onevision", tmp_path)
    free = vldnp.load_vlm(folder, device="cpu", answers="free")
    assert "answers" not in free.describe()
    usual = vldnp.load_vlm(folder, device="cpu")
    assert usual.describe() == {**free.describe(), "answers": "constrained"}
    for answer in ask(usual, pictures(), CONCEPTS.question, CONCEPTS.vocabulary):
        assert set(CONCEPTS.parse(answer)) == set(listed(answer))
    without_choices = usual(pictures(), CONCEPTS.question)
    assert without_choices == free(pictures(), CONCEPTS.question)
    with pytest.raises(ValueError, match="unknown answers 'constraint': did you mean 'constrained"):
        vldnp.load_vlm(folder, device="cpu", answers="constraint")
    with pytest.raises(ValueError, match="unknown answers"):
        RemoteVLM("http://localhost:1/v1", "m", answers="json")


# The grammar alone, with tokenizers of the usual kinds, against a walk at random.
def byte_level(merges):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = alphabet + ["".join(pair) for pair in merges]
    model = BPE({piece: i for i, piece in enumerate(dict.fromkeys(pieces))}, merges)
    backend = Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>")


def sentencepiece():
    """A space is put before every text, and pieces reach over it."""
    letters = string.ascii_letters + "-,▁"
    pieces = [("<unk>", 0.0)] + [(letter, -5.0) for letter in letters]
    pieces += [("▁s", -3.0), ("▁kn", -3.0), ("▁no", -3.0), (",▁", -3.0), ("ne", -3.5), ("e,", -3.5)]
    backend = Tokenizer(Unigram(pieces, unk_id=0))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>", unk_token="<unk>")


TOKENIZERS = {
    "bytes": byte_level([]),
    "bpe": byte_level([("Ġ", "s"), ("k", "n"), ("Ġ", "kn"), ("n", "o"), (",", "Ġ"), ("e", ",")]),
    "sentencepiece": sentencepiece(),
}
SETS = [load_concepts(n) for n in ("moji", "nudity", "weapons", "hate-symbols", "self-harm")]
SPELLED = {
    (name, concepts.name): spelled(tokenizer, list(concepts.vocabulary))
    for name, tokenizer in TOKENIZERS.items()
    for concepts in SETS
}


SOME = st.sampled_from(sorted(TOKENIZERS)), st.sampled_from(SETS)


@given(*SOME, st.integers(min_value=5, max_value=80), st.randoms(use_true_random=False))
def test_a_walk_at_random_writes_nothing_else(name, concepts, limit, random):
    tokenizer, spelling = TOKENIZERS[name], SPELLED[name, concepts.name]
    end, written = tokenizer.eos_token_id, []
    while len(written) < limit:
        written.append(random.choice(allowed(spelling, written, {end}, limit - len(written))))
        if written[-1] == end:
            break
    answer = tokenizer.decode(written, skip_special_tokens=True)
    check([answer.strip()], concepts)
    assert allowed(spelling, [*written, end], {end}, 1) == [end]


def test_every_term_can_be_written():
    for (name, set_name), spelling in SPELLED.items():
        concepts = load_concepts(set_name)
        first, more = ({choice for _, choice in paths} for paths in spelling)
        assert first == {*concepts.vocabulary, "none"}, name
        assert more == set(concepts.vocabulary)


def test_choices_that_cannot_be_written_and_too_few_tokens_for_any_answer():
    for choices, message in (
        (["knife", "none"], "'none' cannot be a choice"),
        (["knife, fork"], "'knife, fork' cannot be a choice"),
        (["Messer 刀"], "no tokens for 'Messer 刀'"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            spelled(TOKENIZERS["sentencepiece"], choices)
        assert "\n" not in str(error.value)
    vlm = vldnp.load_vlm(MODELS / "moji-vlm-s", device="cpu", max_new_tokens=0)
    with pytest.raises(ValueError, match="max_new_tokens"):
        vlm(pictures([(64, 64)]), MOJI.question, choices=MOJI.vocabulary)
