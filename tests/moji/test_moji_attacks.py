import re

import numpy as np
import pandas as pd
import pytest

from moji.__main__ import main
from moji.attacks.adaptive import Evolution
from moji.attacks.adversarial import Search
from moji.attacks.resumable import logged, resumed
from moji.attacks.whitebox import Swaps
from moji.train import attacks
from moji.world.icons import CATEGORIES, HARMLESS, RESTRICTED
from moji.world.scenes import PLACES
from vldnp._files import data_folder
from vldnp.concepts import load_concepts
from vldnp.models import load
from vldnp.study.prompts import load_prompts

WORDS = set(re.findall("[a-z]+", " ".join([*PLACES, *RESTRICTED, *CATEGORIES]))) - {"a"}
SHIPPED = [name for name in attacks.COUNTS if (data_folder() / f"prompts/{name}.csv").exists()]


@pytest.fixture(scope="module")
def attack():
    return attacks.attack_on(load.load("moji-sd"))


def holds_nothing_forbidden(prompt, tokenizer):
    """By the letter, with none of the package's own checks."""
    letters = prompt.replace(" ", "")  # a word may be spelled by several tokens in a row
    pieces = [re.sub("[^a-z]", "", token) for token in prompt.split(" ")]
    return (
        not any(word in letters for word in WORDS if len(word) > 2)
        and not any(len(piece) > 1 and piece in word for piece in pieces for word in WORDS)
        and not load_concepts("moji").parse(prompt)
        and [tokenizer.decode([i]).strip() for i in tokenizer(prompt).input_ids[1:-1]]
        == prompt.split(" ")
    )


def test_no_token_is_a_part_of_a_place_or_restricted_word(attack):
    tokenizer = attack.model.pipe.tokenizer
    assert all(holds_nothing_forbidden(token, tokenizer) for token in attack.tokens)
    # Nothing is left out that need not be: harmless things with no place word in them.
    assert {"cat", "pizza", "umbrella", "rocket", "a", "7"} <= set(attack.tokens)
    assert not {"snowman", "the", "in", "cove", "and", "bomb", "ill"} & set(attack.tokens)


def test_renderings_show_the_target(attack):
    judge = load.load_judge("moji-judge")
    for thing in ("dagger", "pill"):
        latents = attacks.renderings(attack.model, thing)[:8]
        pictures = attack.model.decode(latents / attack.model.pipe.vae.config.scaling_factor)
        found = judge(pictures).concepts
        assert all(row[thing] > 0.5 for row in found)
        assert not any(p > 0.5 for row in found for other, p in row.items() if other != thing)


def test_ring_a_bell_starts_from_harmless_captions():
    captions = attacks.harmless_captions(64)
    assert len(captions) == 64 and captions["prompt"].is_unique
    assert not any(map(load_concepts("moji").parse, captions["prompt"]))
    pd.testing.assert_frame_equal(captions.head(5), attacks.harmless_captions(5))


# The commands


@pytest.fixture
def short(monkeypatch):
    """Budgets of a second."""
    monkeypatch.setattr(attacks, "WHITE_BOX", Swaps(steps=1, draws=2, candidates=2))
    monkeypatch.setattr(attacks, "RING_A_BELL", Search(population=4, generations=1))
    monkeypatch.setattr(attacks, "HARMLESS_CAPTIONS", 2)


@pytest.mark.parametrize("name", ["whitebox", "tuning-adversarial"])
def test_a_search_that_goes_on_is_what_an_uninterrupted_one_is(name, short, tmp_path):
    search = [name, "--seed", "5", "--work"]
    assert main([*search, str(tmp_path / "whole"), "--count", "3"]) == 0
    assert main([*search, str(tmp_path / "parts"), "--count", "1"]) == 0
    assert main([*search, str(tmp_path / "parts"), "--count", "3"]) == 0
    whole, parts = (tmp_path / folder / f"{name}.jsonl" for folder in ("whole", "parts"))
    assert whole.read_text() == parts.read_text()
    assert [row["category"] for row in logged(whole)] == list(RESTRICTED)[:3]


def test_progress_and_sets(short, tmp_path, capsys):
    attacks.search("whitebox", tmp_path, count=2)
    assert main(["attacks", "progress", "--work", str(tmp_path)]) == 0
    assert "whitebox 2 / 96" in capsys.readouterr().out
    (path,) = attacks.write_sets(tmp_path, tmp_path)
    prompts = load_prompts(path)
    assert prompts["prompt"].tolist() == [
        row["prompt"] for row in logged(tmp_path / "whitebox.jsonl")
    ]
    assert prompts["category"].tolist() == list(RESTRICTED)[:2]
    for row in prompts.itertuples():
        named = {word for word in row.prompt.split() if word in HARMLESS}
        assert set(filter(None, row.things.split(", "))) == named


def test_the_adaptive_search_waits_for_the_white_box(short, tmp_path, capsys):
    assert main(["adaptive", "--work", str(tmp_path)]) == 2
    assert "starts from 96 white-box prompts and there are 0" in capsys.readouterr().err


def test_an_adaptive_search_goes_on_too(short, tmp_path, monkeypatch, attack):
    monkeypatch.setattr(attacks, "ADAPTIVE", Evolution(pool=2, rounds=1, parents=1, children=1))
    monkeypatch.setitem(attacks.SAMPLING, "num_inference_steps", 10)
    monkeypatch.setitem(attacks.COUNTS, "whitebox", 24)
    for folder, counts in (("whole", [2]), ("parts", [1, 2])):
        log = tmp_path / folder / "whitebox.jsonl"
        rows = [
            {**row, "path": [row["prompt"]] * 2} for row in attacks.random_prompts(attack, 24, 8)
        ]
        resumed(log, {}, 24, rows.__getitem__)
        for count in counts:
            attacks.search("adaptive", tmp_path / folder, count, seed=3)
    whole, parts = (tmp_path / folder / "adaptive.jsonl" for folder in ("whole", "parts"))
    assert whole.read_text() == parts.read_text()
    for row in logged(whole):
        assert holds_nothing_forbidden(row["prompt"], attack.model.pipe.tokenizer)
        assert len(row["history"]) == 2 and row["source"].startswith("vldnp.adaptive: 4 pictures")


def test_hits_are_measured_against_chance(short, tmp_path, monkeypatch):
    monkeypatch.setitem(attacks.SAMPLING, "num_inference_steps", 10)
    for name in attacks.DRAWS:
        monkeypatch.setitem(attacks.DRAWS, name, 1)
    monkeypatch.setattr(attacks, "COUNTS", dict.fromkeys(attacks.COUNTS, 2))
    attacks.search("whitebox", tmp_path, 2)
    attacks.write_sets(tmp_path, tmp_path / "prompts")
    tables = attacks.hits(tmp_path, tmp_path / "results", tmp_path / "prompts")
    assert tables["attacks"][["set", "method"]].to_numpy().tolist() == [
        [name, method] for method in ("cfg", "vl-dnp") for name in ("random", "whitebox")
    ]
    drawn = logged(tmp_path / "hits-whitebox-cfg-2.jsonl")
    prompts = [row["prompt"] for row in logged(tmp_path / "whitebox.jsonl")]
    assert [prompt for batch in drawn for prompt in batch["prompt"]] == prompts
    assert tables["attacks-curves"]["step"].tolist() == [0, 1]
    assert set(tables["attacks-curves"]["prompts"]) == {2}
    assert {path.name for path in (tmp_path / "results").iterdir()} == {
        "attacks.csv",
        "attacks-curves.csv",
    }


def test_the_pool_of_each_search_differs_and_ends_with_all_results():
    found = [{"prompt": f"p {n}", "path": [f"s {n}", f"t {n}", f"p {n}"]} for n in range(8)]
    pools = [attacks._starts(found, turn) for turn in range(4)]
    assert all(pool[-8:] == [["p", str(n)] for n in range(8)] for pool in pools)
    assert len({tuple(map(tuple, pool[:6])) for pool in pools}) == 4


# What they reach


def test_rates_by_hand():
    drawn = pd.DataFrame(
        {
            "prompt": ["a"] * 4 + ["b"] * 4,
            "hit": [True, True, False, False] + [False] * 4,
            "unnoticed": [True, False, False, False] + [False] * 4,
            "unsafe": [0.9, 0.9, 0.9, 0.9, 0.4, 0.4, 0.4, 0.6],
        }
    )
    got = attacks.rates(drawn)
    assert (got["prompts"], got["pictures"]) == (2, 8)
    assert (got["hit"], got["unnoticed"], got["unsafe"]) == (0.25, 0.125, 0.625)
    assert (got["any_hit"], got["any_unnoticed"]) == (0.5, 0.5)
    assert got["hit_low"] <= 0.25 <= got["hit_high"]


def test_random_prompts_are_of_the_same_kind(attack):
    rows = attacks.random_prompts(attack, 24, 8)
    assert [row["category"] for row in rows[:12]] == list(RESTRICTED)
    assert all(holds_nothing_forbidden(r["prompt"], attack.model.pipe.tokenizer) for r in rows)
    assert {len(row["prompt"].split(" ")) for row in rows} == {8}


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_prompts_hold_nothing_forbidden(name, attack):
    prompts, tokenizer = load_prompts(name), attack.model.pipe.tokenizer
    assert all(holds_nothing_forbidden(prompt, tokenizer) for prompt in prompts["prompt"])
    assert prompts["prompt_id"].tolist() == [f"{name}-{n:03}" for n in range(len(prompts))]
    assert len(prompts) <= attacks.COUNTS[name] and prompts["seed"].is_unique
    assert prompts["category"].tolist() == [attacks.TARGETS[n % 12] for n in range(len(prompts))]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adversarial", "whitebox"])
def test_a_search_finds_a_shipped_prompt_again(name, tmp_path):
    shipped = load_prompts(name).iloc[0]
    found = attacks.search(name, tmp_path, count=1)[0]
    ends = [float(re.findall(r"[\d.]+", row["source"])[-1]) for row in (found, shipped)]
    # Another machine may round two candidates the other way round; the search is as good there.
    assert found["prompt"] == shipped["prompt"] or ends[0] == pytest.approx(ends[1], rel=0.3)
    assert found["category"] == shipped["category"]
    assert found["seed"] == shipped["seed"] or found["prompt"] != shipped["prompt"]
    assert np.all(np.diff(found["history"]) <= 0) or name == "whitebox"
