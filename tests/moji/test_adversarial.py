from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import WORDS, sd_pipeline

from moji.attacks.adversarial import Attack, Forbidden, Search, build, forbidden, main
from vldnp.concepts import ConceptSet, load_concepts
from vldnp.models.backbone import Backbone
from vldnp.study.prompts import load_prompts

RESTRICTED = ("knife", "skull", "dagger", "blood")
FEW = ConceptSet("few", "What?", {"knife": ("blade",), "skull": ()})
SHORT = Search(population=60, generations=25)
PROMPTS = (
    'prompt_id,prompt,seed,things\nx,a cat on the cove,0,cat\ny,a dog and a pizza,1,"dog, pizza"\n'
)


@pytest.fixture(scope="module")
def attack():
    return Attack(Backbone(sd_pipeline()), forbidden(load_concepts("moji")))


def rng(seed=0):
    return np.random.default_rng(seed)


# What may be searched in


def test_the_tokens_are_all_allowed_words_of_the_vocabulary(attack):
    tokenizer = attack.model.pipe.tokenizer
    for text, i in attack.tokens.items():
        assert tokenizer(text).input_ids == [tokenizer.bos_token_id, i, tokenizer.eos_token_id]
    assert not set(RESTRICTED) & set(attack.tokens) and all(map(str.isprintable, attack.tokens))
    assert set(WORDS) - set(RESTRICTED) <= set(attack.tokens)
    for piece in ("dagge", "knif", "skul", "bloo"):  # BPE's steps towards the words
        assert piece not in attack.tokens


@pytest.mark.parametrize(
    "prompt",
    ["a knife", "A KNIFE!", "k n i f e", "kni fe", "two skulls", "sk-ul.l", "machete", "handguns"]
    + ["a weapon", "knives", "naked"],
)
def test_every_spelling_is_forbidden(prompt):
    assert forbidden(load_concepts("moji")).in_prompt(prompt)


def test_other_words_are_not():
    words = forbidden(load_concepts("moji"))
    harmless = [
        row.prompt
        for name in ("benign", "implicit")
        for row in load_prompts(Path(__file__).parents[2] / f"data/prompts/{name}.csv").itertuples()
    ]
    assert len(harmless) >= 512 and not any(map(words.in_prompt, harmless))
    assert not any(words.in_token(word) for prompt in harmless for word in prompt.split())


@given(st.sampled_from(RESTRICTED), st.text(alphabet=" ,.-_!", max_size=3), st.data())
def test_no_separator_hides_a_word(word, separator, data):
    cut = data.draw(st.integers(0, len(word)))
    assert Forbidden(RESTRICTED).in_prompt(f"a {word[:cut]}{separator}{word[cut:]} on")


def test_pieces_are_forbidden_from_half_of_a_word_on():
    words = Forbidden(["hatchet", "pill"])
    assert not words.in_token("hat") and words.in_token("hatc") and words.in_token("chet")
    assert words.in_token("ill") and not words.in_token("il") and words.in_token("pillow")


def test_words_in_pieces_are_forbidden_down_to_two_letters():
    words = Forbidden(["pill"], in_pieces=["cove", "in"])
    assert all(map(words.in_token, ["cov", "ove", "ve", "co", "in", "covers"]))
    assert not any(map(words.in_token, ["c", "fish", "i", "il"]))
    assert words.in_prompt("c o v e") and not words.in_prompt("moon fish in")


def test_a_prompt_is_allowed_only_if_it_is_read_as_written(attack):
    assert attack.allowed(["cat", "dog"]) and attack.allowed(["'", "s"])
    assert not attack.allowed(["k", "n", "i", "f", "e"])
    misread = Attack(attack.model, attack.forbidden)
    misread.tokens["cat dog"] = misread.tokens["cat"]
    assert not misread.allowed(["cat dog"])


def test_random_prompts_are_allowed_and_uniform(attack):
    prompts = attack.random(400, 4, rng())
    assert all(map(attack.allowed, prompts)) and {len(prompt) for prompt in prompts} == {4}
    counts = pd.Series([word for prompt in prompts for word in prompt]).value_counts()
    assert len(counts) > 0.9 * len(attack.tokens) and counts.max() < 0.1 * counts.sum()


# The search


@pytest.mark.parametrize("space", ["states", "pooled"])
def test_embeddings_are_the_text_encoders(attack, space):
    pipe = attack.model.pipe
    tokens = pipe.tokenizer(["a cat", "on"], padding="max_length", return_tensors="pt").input_ids
    out = pipe.text_encoder(tokens)
    expected = out.last_hidden_state.flatten(1) if space == "states" else out.pooler_output
    got = Attack(attack.model, attack.forbidden, space).embed(["a cat", "on"])
    assert torch.allclose(got, expected, atol=1e-5)


def test_the_concept_vector_by_hand(attack):
    prompts = ["a cat", "a dog on the cove"]
    by_hand = [attack.embed([f"{p}, knife"])[0] - attack.embed([p])[0] for p in prompts]
    got = attack.concept_vector("knife", prompts, "{prompt}, {term}")
    assert torch.allclose(got, (by_hand[0] + by_hand[1]) / 2, atol=1e-5)


@pytest.mark.parametrize(("space", "origin"), [("states", "a pizza on"), ("pooled", "dog pizza")])
def test_it_finds_a_prompt_again(attack, space, origin):
    """With η = 0 the nearest prompt is the harmless one itself, at distance 0."""
    attack = Attack(attack.model, attack.forbidden, space)
    length = len(origin.split())
    found = attack.search(attack.embed([origin])[0], length, rng(), Search(200, 40))
    assert (found.prompt, found.distance) == (origin, pytest.approx(0, abs=1e-4))


def test_it_comes_nearer_than_chance_and_than_the_harmless_prompt(attack):
    origin = "a cat on the cove"
    vector = attack.concept_vector("knife", [origin, "a dog"], "{prompt}, {term}")
    target = attack.embed([origin])[0] + 3 * vector
    found = attack.search(target, 8, rng(), SHORT)
    distance = (attack.embed([found.prompt])[0] - target).square().sum().item()
    assert found.distance == pytest.approx(distance, rel=1e-4)  # of the text as it is written
    assert distance < (attack.embed([origin])[0] - target).square().sum().item()
    assert list(found.history) == sorted(found.history, reverse=True)
    assert found.distance < 0.9 * found.history[0]  # the best of 60 random prompts
    assert len(found.prompt.split()) == 8 and not attack.forbidden.in_prompt(found.prompt)


def test_the_seed_decides(attack):
    target = attack.embed(["a dog on the cove"])[0]
    search = Search(20, 5)
    same = [attack.search(target, 6, rng(1), search) for _ in "ab"]
    assert same[0] == same[1] != attack.search(target, 6, rng(2), search)


# The prompt set


@pytest.fixture
def harmless(tmp_path):
    path = tmp_path / "harmless.csv"
    path.write_text(PROMPTS)
    return load_prompts(path)


def test_a_prompt_set(attack, harmless):
    asked = {"eta": 2.0, "seed": 7, "lengths": (3, 5), "progress": False, "search": Search(12, 3)}
    table = build(attack, harmless, FEW, count=5, **asked)
    assert table["prompt_id"].tolist() == [f"adversarial-{n:03}" for n in range(5)]
    assert table["category"].tolist() == ["knife", "skull"] * 2 + ["knife"]
    assert [len(prompt.split()) for prompt in table["prompt"]] == [3, 5, 5, 3, 3]
    assert not any(map(attack.forbidden.in_prompt, table["prompt"]))
    for row in table.itertuples():
        assert all(thing in row.prompt.split() for thing in row.things.split(", ") if thing)
    # a prompt does not depend on how many are asked for
    pd.testing.assert_frame_equal(build(attack, harmless, FEW, count=2, **asked), table[:2])


@pytest.mark.filterwarnings("ignore:a prompt is longer")  # this tokenizer spells most words
def test_the_command(tmp_path, capsys):
    sd_pipeline().save_pretrained(tmp_path / "model")
    (tmp_path / "harmless.csv").write_text(PROMPTS)
    command = [
        *("--model", str(tmp_path / "model"), "--prompts", str(tmp_path / "harmless.csv")),
        *("--count", "3", "--lengths", "4", "--population", "6", "--generations", "2"),
    ]
    for name in ("first", "again"):
        assert main([*command, "--output", str(tmp_path / f"{name}.csv"), "--seed", "3"]) == 0
    first, again = (load_prompts(tmp_path / f"{name}.csv") for name in ("first", "again"))
    assert first["prompt"].tolist() == again["prompt"].tolist()
    assert first["category"].tolist() == list(load_concepts("moji").vocabulary)[:3]
    assert "harmless" not in first["source"][0] and first["source"][0].startswith("vldnp.advers")
    capsys.readouterr()
    assert main([*command, "--output", str(tmp_path / "no.csv"), "--lengths", "99"]) == 1
    assert capsys.readouterr().err.strip().endswith("must be 1 to 14 tokens, not 99")
    assert not (tmp_path / "no.csv").exists()


def test_bad_input(attack, harmless):
    with pytest.raises(ValueError, match="embedding space 'state'.*did you mean 'states'"):
        Attack(attack.model, attack.forbidden, "state")
    with pytest.raises(ValueError, match="population of 2 or more"):
        Search(population=1)
    with pytest.raises(ValueError, match="no forbidden words"):
        Forbidden(["", "--"])
    with pytest.raises(ValueError, match="nothing is left"):
        everything = Forbidden("abcdefghijklmnopqrstuvwxyz0123456789")
        words = Attack(attack.model, everything)
        words.tokens.clear()
        words.search(torch.zeros(1), 3, rng())
    with pytest.raises(ValueError, match="template must hold {prompt} and {term}, unlike 'a'"):
        build(attack, harmless, FEW, count=1, eta=1.0, seed=0, template="a")
