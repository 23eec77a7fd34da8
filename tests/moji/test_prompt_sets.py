"""The Moji benchmark's prompt sets: how many, of what, drawn how, and in nothing seen before."""

import csv
import hashlib
import re
from pathlib import Path

import numpy as np
import pytest
import yaml
from scipy.ndimage import gaussian_filter

from moji.__main__ import main, seed_of
from moji.train import prompt_sets
from moji.world import scenes
from moji.world.icons import HARMLESS, RESTRICTED, THINGS, sprite
from vldnp._files import data_folder, fingerprint
from vldnp.concepts import load_concepts
from vldnp.study.prompts import load_prompts, split_things

EVALUATION = {"explicit": 640, "implicit": 640, "benign": 1280, "lookalike": 640}
TUNING = {f"tuning-{name}": 384 if name == "benign" else 128 for name in EVALUATION}
COUNTS = EVALUATION | TUNING
COLUMNS = "prompt_id prompt seed category source things place".split()
FOLDER = data_folder() / "prompts"
THEMES = """pirate cove: dagger skull, crime scene: blood knife, war zone: bomb pistol,
graveyard: coffin skull, field hospital: blood syringe, tavern: beer cigarette,
viking camp: axe beer, dark alley: pill syringe, bandit hideout: dagger pistol,
butcher shop: axe knife, night club: cigarette pill, vampire castle: blood coffin"""
CARRIED = dict(re.findall(r"(\w[a-z ]*): ([a-z ]+)", THEMES))


def words(text: str) -> tuple[str, ...]:
    """A prompt's words in alphabetical order, without capitals, commas, articles and "and"."""
    found = text.lower().replace(",", " ").split()
    return tuple(sorted(word for word in found if word not in {"a", "an", "and"}))


def digest(text: str) -> str:
    return hashlib.sha256(" ".join(words(text)).encode()).hexdigest()[:10]


def rows(name: str) -> list[dict[str, str]]:
    with open(FOLDER / f"{name}.csv", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("name", COUNTS)
def test_things_place_and_category_are_what_the_prompt_says(name):
    """Read from the prompt's words, not from the code that made it."""
    kind, table = name.removeprefix("tuning-"), rows(name)
    assert list(table[0]) == COLUMNS and all(all(row.values()) for row in table)
    assert len({row["seed"] for row in table}) == len(table) == COUNTS[name]
    ids = [row["prompt_id"] for row in table]
    assert name in TUNING or ids == [f"{name}-{i:04}" for i in range(len(table))]
    assert len(set(ids)) == len(ids)
    for row in table:
        match = re.fullmatch(r"(.+?) ((?:on|at|in|by) (?:the) (.+))", row["prompt"])
        listed = re.split(r", | and ", match[1])
        assert all(re.match("an? ", thing) or thing == "blood" for thing in listed)
        named = [re.sub(r"^an? ", "", thing) for thing in listed]
        harmless = [thing for thing in named if thing in HARMLESS]
        restricted = [thing for thing in named if thing in RESTRICTED]
        assert sorted(harmless) == row["things"].split(", ") and match[2] == row["place"], row
        assert len(named) == len(harmless) + len(restricted) == len(set(named))
        carried, category = CARRIED.get(match[3], "").split(), row["category"]
        assert {
            "explicit": restricted == [category] and len(harmless) in (1, 2) and not carried,
            "implicit": sorted(category.split(", ")) == carried and len(harmless) == 2,
            "benign": category == "harmless" and len(harmless) in (2, 3) and not carried,
            "lookalike": (category == "themed") == bool(carried),
        }[kind]
        assert kind == "explicit" or not restricted


def test_no_prompt_twice_none_used_before():
    everything = [row["prompt"] for name in EVALUATION for row in rows(name)]
    assert len({words(prompt) for prompt in everything}) == len(everything) == 3200
    used = set((FOLDER / "used.sha256").read_text().split())
    first = csv.DictReader(open(Path(__file__).parents[1] / "data" / "version1-tuning-benign.csv"))
    assert {digest(row["prompt"]) for row in first} < used
    tuning = {digest(row["prompt"]) for name in TUNING for row in rows(name)}
    # 960 of version 1; study 1's 3,200, and the 512 that were drawn with them for tuning.
    assert tuning < used and len(used) == 960 + 3200 + 512
    assert not used & {digest(prompt) for prompt in everything}


@pytest.mark.parametrize("seed", [12, 112, 114, 31])
def test_no_prompt_is_in_a_training_stream(seed):
    """The streams of text2image and CLIP; a part of them here, all of them when they were drawn."""
    prompts = {words(row["prompt"]) for name in COUNTS for row in rows(name)}
    captions = {words(scenes.sample_scene(seed, index).caption) for index in range(4000)}
    assert len(captions) > 1500 and not captions & prompts


def test_the_command_draws_the_shipped_files_byte_for_byte(tmp_path, monkeypatch):
    monkeypatch.setenv("VLDNP_DATA", str(tmp_path))
    (tmp_path / "prompts").mkdir()
    (tmp_path / "prompts/used.sha256").write_bytes((FOLDER / "used.sha256").read_bytes())
    assert main(["prompts"]) == 0
    drawn = {path.stem: path.read_bytes() for path in tmp_path.glob("prompts/*.csv")}
    assert drawn == {name: (FOLDER / f"{name}.csv").read_bytes() for name in EVALUATION}
    assert main(["prompts", "--seed", "1"]) == 0
    for name in EVALUATION:
        others = {words(prompt) for prompt in load_prompts(name)["prompt"]}
        shared = others & {words(row["prompt"]) for row in rows(name)}
        assert len(shared) < 0.6 * len(others), name


def test_draws_are_random_and_not_a_head():
    """In every stretch of a set all places come up."""
    for table in map(load_prompts, EVALUATION):
        for start in range(0, len(table), 128):
            assert table["place"][start : start + 128].nunique() >= 12


def blurred(thing: str) -> np.ndarray:
    icon, canvas = sprite(thing, 40), np.ones((48, 48, 3))
    top, left = ((48 - side) // 2 for side in icon.shape[:2])
    box = np.s_[top : top + icon.shape[0], left : left + icon.shape[1]]
    canvas[box] = canvas[box] * (1 - icon[..., 3:]) + icon[..., :3]
    return gaussian_filter(canvas, (3, 3, 0))


def test_lookalikes_look_alike():
    """Each is among the five harmless icons nearest to a restricted one, in blurred pixels."""
    images = {thing: blurred(thing) for thing in THINGS}
    for thing, resembled in prompt_sets.LOOKALIKES.items():
        far = {h: np.abs(images[h] - images[resembled]).mean() for h in HARMLESS}
        assert thing in sorted(far, key=far.get)[:5], (thing, resembled)
    tones = {p: np.array([scenes.PLACES[p].sky, scenes.PLACES[p].ground]) for p in scenes.NEUTRAL}
    dark = sorted(tones, key=lambda p: tones[p].mean())[:2]
    bright = [p for p in tones if p not in dark]
    red = sorted(bright, key=lambda p: tones[p][:, 1:].mean() - tones[p][:, 0].mean())[:2]
    assert set(prompt_sets.COLOURS) == {*dark, *red}
    for name in ("lookalike", "tuning-lookalike"):
        table = load_prompts(name)
        assert table["category"].value_counts().min() > 0.25 * len(table)
        for row in table.itertuples():
            things = set(split_things(row.things))
            assert {
                "icons": things <= set(prompt_sets.LOOKALIKES) and row.place in scenes.NEUTRAL,
                "colours": row.place in prompt_sets.COLOURS,
                "themed": len(things) == 3 and row.place in scenes.THEMED,
            }[row.category]


def test_the_models_are_frozen():
    frozen = yaml.safe_load((data_folder() / "models" / "FROZEN").read_text())
    assert len(frozen["fingerprints"]) == 8
    for name, fixed in frozen["fingerprints"].items():
        assert fingerprint(data_folder() / "models" / name) == fixed, name
    own = [11, 12, 21, 31, 48]  # another world has streams of its own
    others = [seed_of(seed, "all", world) for world in (1, 2) for seed in own]
    assert len({*own, *others}) == 15
    assert seed_of(12, "text2image", 114) == 114 and seed_of(12, "all", None) == 12


def test_eight_of_the_twelve_were_drawn():
    eight, all_twelve = load_concepts("moji-8"), load_concepts("moji")
    drawn = np.random.default_rng(2611).choice(sorted(RESTRICTED), 8, replace=False)
    assert sorted(eight.vocabulary) == sorted(drawn) and eight.question == all_twelve.question
    assert eight.vocabulary.items() <= all_twelve.vocabulary.items()
