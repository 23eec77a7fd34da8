"""The searches for adversarial prompts: their parts by hand, and that they can be interrupted."""

import re

import numpy as np
import pandas as pd
import pytest
import torch
from diffusers import DDPMScheduler
from hypothesis import given
from hypothesis import strategies as st
from tiny import WORDS, ScriptedVLM

import vldnp
from moji.__main__ import main
from moji.attacks import searches, whitebox
from moji.attacks.adaptive import Evolution, Tried, adapt, outcomes, ranked
from moji.attacks.resumable import logged, resumed
from moji.attacks.vocabulary import Attack, Forbidden
from moji.attacks.whitebox import Swaps
from moji.world.icons import CATEGORIES, HARMLESS, RESTRICTED
from moji.world.scenes import PLACES
from vldnp.methods import CFG, VLDNP
from vldnp.models import load
from vldnp.models.judges import Judgement
from vldnp.models.run import Run
from vldnp.schedules import uniform
from vldnp.study.prompts import load_prompts

SHORT = Swaps(steps=4, draws=3, candidates=6, top=10)
SPAN = Swaps(draws=3, noisiest=900, cleanest=100)


def rng(seed=0):
    return np.random.default_rng(seed)


@pytest.fixture(scope="module")
def attack(model):
    words = Forbidden([*RESTRICTED, "machete", "weapon"], in_pieces=["cove", "the"])
    return Attack(model, words)


@pytest.fixture(scope="module")
def shipped():
    return searches.attack_on(load.load("moji-sd"))


# What may be searched in
@given(st.sampled_from(sorted(RESTRICTED)), st.text(" ,.-_!", max_size=3), st.data())
def test_no_separator_hides_a_word(word, separator, data):
    cut = data.draw(st.integers(0, len(word)))
    prompt = f"a {word[:cut]}{separator}{word[cut:]} on"
    assert all(map(Forbidden(RESTRICTED).in_prompt, (prompt, prompt.upper(), prompt + "s")))


def test_pieces_are_forbidden_from_half_of_a_word_on():
    words = Forbidden(["hatchet", "pill"], in_pieces=["cove", "in"])
    assert not words.in_token("hat") and words.in_token("hatc") and words.in_token("chet")
    assert words.in_token("ill") and not words.in_token("il") and words.in_token("pillow")
    assert all(map(words.in_token, ["cov", "ove", "ve", "co", "in", "covers"]))
    assert not any(map(words.in_token, ["c", "fish", "i"]))
    assert words.in_prompt("c o v e") and not words.in_prompt("moon fish in")
    with pytest.raises(ValueError, match="no forbidden words"):
        Forbidden(["", "--"])


def test_the_tokens_are_all_allowed_words_of_the_vocabulary(attack):
    tokenizer = attack.model.pipe.tokenizer
    for text, i in attack.tokens.items():
        assert tokenizer(text).input_ids == [tokenizer.bos_token_id, i, tokenizer.eos_token_id]
    banned = {"knife", "skull", "dagger", "blood", "cove", "the"}
    assert not banned & set(attack.tokens) and set(WORDS) - banned <= set(attack.tokens)
    assert attack.allowed(["cat", "dog"]) and not attack.allowed(["k", "n", "i", "f", "e"])
    misread = Attack(attack.model, attack.forbidden)
    misread.tokens["cat dog"] = misread.tokens["cat"]
    assert not misread.allowed(["cat dog"])
    with pytest.raises(ValueError, match="hardly any prompt"):
        attack.accepted(lambda: ["k", "n", "i", "f", "e"], 1)
    prompts = attack.random(400, 4, rng())
    assert all(map(attack.allowed, prompts)) and {len(prompt) for prompt in prompts} == {4}
    counts = pd.Series([word for prompt in prompts for word in prompt]).value_counts()
    assert len(counts) > 0.9 * len(attack.tokens) and counts.max() < 0.1 * counts.sum()


# White box
def latents(count=5):
    return torch.randn(count, 4, 8, 8, generator=torch.Generator().manual_seed(0))


def test_the_denoising_loss_by_hand(attack):
    model, run = attack.model, Run(attack.model, 1)
    draws = whitebox.draw(model, latents(1), SPAN, rng())
    noised = DDPMScheduler.from_config(model.pipe.scheduler.config).add_noise(
        latents(1).expand(3, -1, -1, -1), draws.noise, draws.timesteps
    )
    assert torch.allclose(draws.noisy, noised, atol=1e-6)
    thirds = (draws.timesteps - 100).div(800 / 3, rounding_mode="floor")
    assert thirds.tolist() == [0, 1, 2] and draws.noise.std() == pytest.approx(1, abs=0.1)
    prompts = ["a cat", "dog on the cove"]
    errors = [
        (run.predict(noisy[None], t, model.encode([prompt])) - noise).square().mean()
        for prompt in prompts
        for noisy, noise, t in zip(*draws, strict=True)
    ]
    by_hand = np.reshape(errors, (2, 3)).mean(axis=1)
    with torch.no_grad():
        losses = whitebox.denoising_loss(model, model.encode(prompts).embeds, draws)
    assert losses.tolist() == pytest.approx(by_hand, rel=1e-4)


def test_the_gradient_is_that_of_finite_differences(exact):
    pipe = exact.pipe
    draws = whitebox.draw(exact, latents().double(), SPAN, rng())
    ids = exact.tokenize(["a dog on cat"]).input_ids[0]
    gradient = whitebox.one_hot_gradient(exact, ids, draws)
    table = pipe.text_encoder.get_input_embeddings().weight
    one_hot = torch.nn.functional.one_hot(ids, len(table)).double()

    @torch.no_grad()
    def loss(x):
        states = whitebox.relaxed_states(exact, ids[None], x[None])
        return whitebox.denoising_loss(exact, states, draws).item()

    assert gradient.abs().max() > 1e-6
    for place, token in [(1, 3), (2, 40), (4, 90), (3, int(ids[3])), (7, 5)]:
        step = torch.zeros_like(one_hot)
        step[place, token] = 1e-4
        slope = (loss(one_hot + step) - loss(one_hot - step)) / 2e-4
        assert gradient[place, token].item() == pytest.approx(slope, rel=1e-5, abs=1e-11)
    with torch.no_grad():  # the hook is gone, and no weight has a gradient
        states = pipe.text_encoder(ids[None]).last_hidden_state
        assert torch.equal(whitebox.relaxed_states(exact, ids[None], one_hot[None]), states)
    parts = (pipe.unet, pipe.text_encoder)
    assert all(parameter.grad is None for part in parts for parameter in part.parameters())


def test_candidates_come_from_the_tokens_of_least_gradient(attack):
    (words,) = attack.random(1, 4, rng())
    draws = whitebox.draw(attack.model, latents(), SPAN, rng())
    ids = attack.model.tokenize([" ".join(words)]).input_ids[0]
    gradient = whitebox.one_hot_gradient(attack.model, ids, draws)[:, list(attack.tokens.values())]
    for child in whitebox.candidates(attack, words, draws, rng(1), Swaps(candidates=40, top=3)):
        for place in (i for i in range(4) if child[i] != words[i]):
            rank = gradient[1 + place].argsort()[:3]
            assert list(attack.tokens).index(child[place]) in rank


def test_a_swap_changes_one_token_and_lowers_the_loss(attack):
    swaps = Swaps(steps=12, draws=6, candidates=8, top=24)
    paths = [whitebox.swap_tokens(attack, latents(), 5, rng(seed), swaps) for seed in range(2)]
    for path in paths:
        assert len(path) == 13 and all(attack.allowed(step.words) for step in path)
        for last, step in zip(path, path[1:], strict=False):
            changed = sum(a != b for a, b in zip(last.words, step.words, strict=True))
            assert (changed, step.after < step.before) in [(0, False), (1, True)]
    # On draws that it never saw: at equal numbers of losses, swaps by gradient beat chance.
    fresh = whitebox.draw(attack.model, latents(), Swaps(draws=40, cleanest=350), rng(9))
    ends = whitebox.prompt_losses(attack.model, [path[-1].words for path in paths], fresh)
    chance = whitebox.prompt_losses(attack.model, attack.random(24, 5, rng(7)), fresh)
    assert ends.mean() < chance.quantile(0.1)
    again = [whitebox.swap_tokens(attack, latents(), 4, rng(seed), SHORT) for seed in (1, 1, 2)]
    assert again[0] == again[1] != again[2]


# Through the defence

SAMPLING = {"num_inference_steps": 6, "guidance_scale": 3.0}
STARTS = [["a", "cat", "pizza"], ["pizza", "cat", "on"], ["at", "dog", "on"], ["a", "cat", "on"]]


def test_outcomes_are_those_of_the_sampler(attack):
    def judge(images):
        bright = np.array([np.asarray(image).mean() for image in images])
        found = (bright > np.median(bright)).astype(float)
        return Judgement(found, [{"dagger": p, "skull": 0.1} for p in found])

    prompts, seeds, targets = ["a cat", "a dog", "pizza"], [3, 4, 5], ["dagger", "dagger", "skull"]
    got = outcomes(attack.model, judge, CFG(), prompts, seeds, targets, **SAMPLING)
    images = vldnp.sample(attack.model, prompts, seeds=seeds, progress=False, **SAMPLING).images
    judged = judge(images).concepts
    assert got["seen"].tolist() == [row[t] for row, t in zip(judged, targets, strict=True)]
    assert got["named"].tolist() == [0, 0, 0]
    # Each query asks about both images in turn.
    answers = iter(["none", "dagger", "none", "dagger", "skull", "skull"])
    method = VLDNP(ScriptedVLM(lambda *_: next(answers)), "moji", omega=4.0, query_steps=uniform(3))
    certain = lambda images: Judgement(np.ones(2), [{"dagger": 0.9}] * 2)  # noqa: E731
    images = ["a cat", "a dog"], [1, 2], ["dagger"] * 2
    got = outcomes(attack.model, certain, method, *images, **SAMPLING)
    assert got["named"].tolist() == [0, pytest.approx(2 / 3)]


def test_one_lucky_image_does_not_lead():
    tried = [Tried("lucky", [0.7]), Tried("steady", [0.6] * 8), Tried("poor", [0.1] * 9)]
    means, order = zip(*ranked(tried), strict=True)
    assert [one.words for one in order] == ["steady", "lucky", "poor"]
    assert means[1] == pytest.approx((0.7 + (0.7 + 8 * 0.6 + 9 * 0.1) / 18) / 2)


def world(best=("pizza", "dog", "pizza")):
    """A defence under which a prompt is the better the more of its words stand in `best`, and
    whose images differ by seed; it keeps its inputs."""
    asked = []

    def run(prompts, seeds, targets):
        asked.extend(zip(prompts, seeds, targets, strict=True))
        right = [np.mean([a == b for a, b in zip(p.split(), best, strict=True)]) for p in prompts]
        luck = [np.random.default_rng(seed).normal(0, 0.1) for seed in seeds]
        seen = np.clip(np.add(right, luck), 0, 1)
        return pd.DataFrame({"seen": seen, "named": [0.25] * len(prompts)})

    return run, asked


def test_an_adaptive_search_improves_within_its_budget(attack):
    run, asked = world()
    evolution = Evolution(pool=4, rounds=10, parents=2, children=5, seeds=2)
    words, history, images = adapt(attack, run, "dagger", STARTS, rng(), evolution)
    assert images == 2 * (4 + 10 * 7) == len(asked) and len(history) == 11
    assert history[0] < history[-1]
    assert sum(a == b for a, b in zip(words, ("pizza", "dog", "pizza"), strict=True)) >= 2
    table = pd.DataFrame(asked, columns=["prompt", "seed", "target"])
    assert set(table["target"]) == {"dagger"} and not table.duplicated().any()
    assert table["seed"].nunique() == 2 * 11 and table["prompt"].value_counts().max() >= 4
    assert all(attack.allowed(prompt.split(" ")) for prompt in table["prompt"])
    short = Evolution(4, rounds=2, parents=1, children=1)
    ends = [adapt(attack, run, "dagger", STARTS, rng(seed), short) for seed in (1, 1, 2)]
    assert ends[0] == ends[1] != ends[2]


def test_the_score_and_the_pool_of_an_adaptive_search(attack):
    def run(prompts, seeds, targets):
        named = [float("cat" in prompt) for prompt in prompts]
        return pd.DataFrame({"seen": [0.9 if n else 1e-4 for n in named], "named": named})

    words, history, _ = adapt(attack, run, "dagger", STARTS, rng(), Evolution(4, rounds=0))
    # 1e-4^¼ = 0.1 for one of four, 0 for those that name it; each mean counts the mean of all.
    assert words == ("at", "dog", "on") and history == [pytest.approx((0.1 + 0.1 / 4) / 2)]
    run, asked = world()
    adapt(attack, run, "dagger", [*STARTS, STARTS[3]], rng(), Evolution(2, rounds=0))
    assert [prompt for prompt, _, _ in asked] == ["at dog on", "a cat on"]


# Searches that go on
def killed_at(number):
    def find(n):
        if n == number:
            raise KeyboardInterrupt
        return {"n": n, "path": (n,)}

    return find


def test_a_killed_search_is_what_an_uninterrupted_one_is(tmp_path):
    log, settings = tmp_path / "log.jsonl", {"seed": 1, "lengths": (3, 5)}
    whole = resumed(tmp_path / "whole.jsonl", settings, 5, killed_at(None))
    with pytest.raises(KeyboardInterrupt):
        resumed(log, settings, 5, killed_at(3))
    assert [row["n"] for row in logged(log)] == [0, 1, 2]
    log.write_text(log.read_text()[:-9])  # a line cut short is searched again
    assert logged(log) == whole[:2]
    assert resumed(log, settings, 5, killed_at(0)) == whole
    assert log.read_text() == (tmp_path / "whole.jsonl").read_text()
    assert resumed(log, settings, 1, killed_at(0)) == whole[:1] and len(logged(log)) == 5
    with pytest.raises(ValueError, match="of a search with another seed"):
        resumed(log, {**settings, "seed": 2}, 2, killed_at(None))
    assert logged(log) == whole and logged(tmp_path / "none.jsonl") == []


# On the shipped model
@pytest.fixture
def short(monkeypatch):
    """Budgets of a second."""
    monkeypatch.setattr(searches, "WHITE_BOX", Swaps(steps=1, draws=2, candidates=2))
    monkeypatch.setattr(searches, "ADAPTIVE", Evolution(2, rounds=1, parents=1, children=1))
    monkeypatch.setitem(searches.SAMPLING, "num_inference_steps", 10)


FORBIDDEN = set(re.findall("[a-z]+", " ".join([*PLACES, *RESTRICTED, *CATEGORIES]))) - {"a"}


def holds_nothing_forbidden(prompt, tokenizer):
    """By the letter, with none of the package's own checks."""
    letters = prompt.replace(" ", "")  # a word may be spelled by several tokens in a row
    pieces = [re.sub("[^a-z]", "", token) for token in prompt.split(" ")]
    written = [tokenizer.decode([i]).strip() for i in tokenizer(prompt).input_ids[1:-1]]
    return (
        not any(word in letters for word in FORBIDDEN if len(word) > 2)
        and not any(len(piece) > 1 and piece in word for piece in pieces for word in FORBIDDEN)
        and written == prompt.split(" ")
    )


def test_the_tokens_of_the_shipped_model(shipped):
    tokenizer = shipped.model.pipe.tokenizer
    assert all(holds_nothing_forbidden(token, tokenizer) for token in shipped.tokens)
    assert {"cat", "pizza", "umbrella", "rocket", "a", "7"} <= set(shipped.tokens)
    assert not {"snowman", "the", "in", "cove", "and", "bomb", "ill"} & set(shipped.tokens)


@pytest.mark.parametrize("name", searches.COUNTS)
def test_shipped_prompts_hold_nothing_forbidden(name, shipped):
    prompts, tokenizer = load_prompts(name), shipped.model.pipe.tokenizer
    assert all(holds_nothing_forbidden(prompt, tokenizer) for prompt in prompts["prompt"])
    assert prompts["prompt_id"].tolist() == [f"{name}-{n:03}" for n in range(len(prompts))]
    assert len(prompts) == searches.COUNTS[name] and prompts["seed"].is_unique
    assert prompts["category"].tolist() == [searches.TARGETS[n % 12] for n in range(len(prompts))]


def test_renderings_show_the_target(shipped):
    model = shipped.model
    latents = searches.renderings(model, "dagger")[:8]
    images = model.decode(latents / model.pipe.vae.config.scaling_factor)
    for row in load.load_judge("moji-judge")(images).concepts:
        assert [thing for thing, p in row.items() if p > 0.5] == ["dagger"]


@pytest.mark.parametrize("name", ["whitebox", "adaptive"])
def test_a_search_that_goes_on_is_what_an_uninterrupted_one_is(
    name, short, tmp_path, monkeypatch, shipped
):
    monkeypatch.setitem(searches.COUNTS, "whitebox", 24)
    for folder, counts in (("whole", "3"), ("parts", "13")):
        if name == "adaptive":
            rows = load_prompts("whitebox").to_dict("records")
            rows = [{**row, "path": [row["prompt"]] * 2} for row in rows]
            resumed(tmp_path / folder / "whitebox.jsonl", {}, 24, rows.__getitem__)
        for count in counts:
            work = ["--work", str(tmp_path / folder), "--seed", "5"]
            assert main(["attacks", name, "--count", count, *work]) == 0
    whole, parts = (tmp_path / folder / f"{name}.jsonl" for folder in ("whole", "parts"))
    assert whole.read_text() == parts.read_text() and len(logged(whole)) == 3
    for row, target in zip(logged(whole), RESTRICTED, strict=False):
        assert holds_nothing_forbidden(row["prompt"], shipped.model.pipe.tokenizer)
        assert row["category"] == target and len(row["history"]) == 2
    searches.write_sets(tmp_path / "whole", tmp_path)
    for row in load_prompts(tmp_path / f"{name}.csv").itertuples():
        named = {word for word in row.prompt.split() if word in HARMLESS}
        things = set(filter(None, row.things.split(", ")))
        assert things == named


def test_the_adaptive_search_needs_the_white_box(tmp_path, capsys):
    assert main(["attacks", "adaptive", "--work", str(tmp_path)]) == 2
    assert "starts from 96 white-box prompts and there are 0" in capsys.readouterr().err
    found = [{"prompt": f"p {n}", "path": [f"s {n}", f"t {n}", f"p {n}"]} for n in range(8)]
    pools = [searches.starts(found, turn) for turn in range(4)]
    assert all(pool[-8:] == [["p", str(n)] for n in range(8)] for pool in pools)
    assert len({tuple(map(tuple, pool[:6])) for pool in pools}) == 4


@pytest.mark.slow
def test_a_search_finds_a_shipped_prompt_again(tmp_path):
    shipped = load_prompts("whitebox").iloc[0]
    found = searches.search("whitebox", tmp_path, count=1)[0]
    ends = [float(re.findall(r"[\d.]+", row["source"])[-1]) for row in (found, shipped)]
    # Another machine may round two candidates the other way round; the search is as good there.
    assert found["prompt"] == shipped["prompt"] or ends[0] == pytest.approx(ends[1], rel=0.3)
    assert found["category"] == shipped["category"]
    assert found["seed"] == shipped["seed"] or found["prompt"] != shipped["prompt"]
