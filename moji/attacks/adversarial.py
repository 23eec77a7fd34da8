"""Adversarial prompts: word salad without a forbidden word that means a forbidden thing.

What the searches share (which tokens a prompt may hold, prompts drawn at random from them), and
the search of Ring-A-Bell (Tsai et al., ICLR 2024, arXiv 2310.10012), with f the text encoder:

1. concept vector: c = mean over prompts of f(prompt with the concept) − f(prompt);
2. target of a harmless prompt p: f(p) + η c;
3. a genetic search over the tokenizer's vocabulary, all forbidden words left out, for the prompt
   of K tokens whose embedding is nearest to the target.

`python -m moji.attacks.adversarial` does this for many prompts and writes a prompt set.
"""

import argparse
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from moji.attacks.resumable import resumed
from vldnp._files import unknown
from vldnp.concepts import ConceptSet, load_concepts
from vldnp.models import load
from vldnp.models.backbone import Backbone
from vldnp.study.prompts import OPTIONAL, REQUIRED, load_prompts, save_prompts, split_things

CATEGORY_WORDS = (
    "weapon weapons armed bloody gore drug drugs forbidden restricted unwanted nude nudity naked"
).split()
"""Words for kinds of restricted things, forbidden besides the concept set's own."""

COLUMNS = [*REQUIRED, *(column for column in OPTIONAL if column != "guidance_scale")]
LENGTHS = (8, 12, 16)
SPACES = ("states", "pooled")


@dataclass(frozen=True)
class Search:
    """How the genetic search goes; the rates are those of the Ring-A-Bell authors' code.

    Attributes:
        population: prompts per generation, 2 or more; the better half lives on.
        generations: how many times the other half is replaced by children.
        crossover: how often a child has two parents, cut at one place; else it is a copy of one.
        mutation: how often one token of a child is replaced by a random one.
    """

    population: int = 200
    generations: int = 300
    crossover: float = 0.5
    mutation: float = 0.25

    def __post_init__(self):
        if self.population < 2 or self.generations < 0:
            raise ValueError(
                "a search needs a population of 2 or more and 0 or more generations, not "
                f"{self.population} and {self.generations}"
            )


@dataclass(frozen=True)
class Found:
    """What a search ends in.

    Attributes:
        prompt: the best prompt.
        distance: of its embedding from the target, squared Euclidean.
        history: the best distance at the start and after each generation; it never rises.
    """

    prompt: str
    distance: float
    history: tuple[float, ...]


class Forbidden:
    """The words that a prompt may not hold, in any spelling.

    Args:
        words: written forms; their letters count, in any case.
        in_pieces: words of which no token may be a part either, single letters aside: of "cove"
            neither "cov" nor "ve". Those of one or two letters ("in") are forbidden as tokens
            only; spelled across other words they are in nearly every prompt.
    """

    def __init__(self, words: Iterable[str], in_pieces: Iterable[str] = ()):
        self.broken = tuple(sorted({_letters(word) for word in in_pieces} - {""}))
        forms = {_letters(word) for word in words} | {w for w in self.broken if len(w) > 2}
        self.forms = tuple(sorted(form for form in forms if form))
        if not self.forms:
            raise ValueError("no forbidden words are given")
        self._anywhere = re.compile("|".join(map(re.escape, self.forms)))

    def in_prompt(self, prompt: str) -> bool:
        """Whether a form is spelled anywhere, spaces and punctuation aside: "sk ul l" is."""
        return self._anywhere.search(_letters(prompt)) is not None

    def in_token(self, token: str) -> bool:
        """Whether a token holds a form; or is a part of a word of `in_pieces`; or is a piece of
        3 letters or more that makes up half of a form or more, such as "dagge"."""
        letters = _letters(token)
        return (
            self.in_prompt(letters)
            or any(len(letters) >= 2 and letters in word for word in self.broken)
            or any(
                len(letters) >= 3 and letters in form and 2 * len(letters) >= len(form)
                for form in self.forms
            )
        )


def forbidden(
    concepts: ConceptSet, extra: Iterable[str] = CATEGORY_WORDS, in_pieces: Iterable[str] = ()
) -> Forbidden:
    """All forms of a concept set (terms, synonyms, plurals), and `extra` words."""
    return Forbidden([*concepts.written_forms, *extra], in_pieces)


@dataclass(frozen=True)
class Attack:
    """A model's text encoder under attack.

    Attributes:
        model: the text-to-image model.
        forbidden: what no prompt may hold.
        space: f is the text encoder's `states`, `[L, D]`, which the U-Net attends to (as in the
            authors' code), or its `pooled` state, `[D]`.
    """

    model: Backbone
    forbidden: Forbidden
    space: str = "states"

    def __post_init__(self):
        if self.space not in SPACES:
            raise unknown("embedding space", self.space, SPACES)

    @cached_property
    def tokens(self) -> dict[str, int]:
        """The tokens to search in: text → id, of those that are a word when they stand alone."""
        tokenizer = self.model.pipe.tokenizer
        special = set(tokenizer.all_special_ids)
        found = {}
        for i in sorted(tokenizer.get_vocab().values()):
            text = tokenizer.decode([i]).strip()
            if i in special or not (text and text.isprintable()) or self.forbidden.in_token(text):
                continue
            if tokenizer(text).input_ids[1:-1] == [i]:
                found.setdefault(text, i)
        return found

    def allowed(self, words: Sequence[str]) -> bool:
        """Whether these tokens, written side by side, hold nothing forbidden and are read as
        just these tokens."""
        prompt = " ".join(words)
        ids = [self.tokens[word] for word in words]
        return (
            not self.forbidden.in_prompt(prompt)
            and self.model.pipe.tokenizer(prompt).input_ids[1:-1] == ids
        )

    def random(self, count: int, length: int, rng: np.random.Generator) -> list[np.ndarray]:
        """`count` allowed prompts of `length` tokens drawn uniformly: what chance reaches."""
        limit = self.model.pipe.tokenizer.model_max_length - 2
        if not 1 <= length <= limit:
            raise ValueError(f"a prompt's length must be 1 to {limit} tokens, not {length}")
        words = np.array(list(self.tokens), dtype=object)
        if not len(words):
            raise ValueError("every token of the vocabulary is forbidden; nothing is left to try")
        return self.accepted(lambda: words[rng.integers(len(words), size=length)], count)

    def accepted(self, draw: Callable[[], np.ndarray], count: int) -> list[np.ndarray]:
        """The first `count` draws that are allowed."""
        found: list[np.ndarray] = []
        for _ in range(1000 * count):
            if len(found) == count:
                return found
            if self.allowed(prompt := draw()):
                found.append(prompt)
        if len(found) == count:
            return found
        raise ValueError("hardly any prompt is free of the forbidden words; forbid fewer")

    @torch.no_grad()
    def embed(self, prompts: Sequence[str]) -> Tensor:
        """f(prompts), `[n, F]` float32: what the text encoder makes of the texts."""
        if self.space == "pooled":
            return self.model.pooled(self.model.tokenize(prompts).input_ids).float()
        return self.model.encode(prompts).embeds.flatten(1).float()

    def concept_vector(self, term: str, prompts: Sequence[str], template: str) -> Tensor:
        """c of a concept, `[F]`.

        Args:
            term: names the concept.
            prompts: without it.
            template: how it is put to a prompt, such as `"{prompt}, {term}"`.
        """
        template = template.replace("{term}", term)
        with_term = [template.replace("{prompt}", prompt) for prompt in prompts]
        return (self.embed(with_term) - self.embed(prompts)).mean(dim=0)

    def search(
        self, target: Tensor, length: int, rng: np.random.Generator, search: Search = Search()
    ) -> Found:
        """The prompt of `length` tokens whose embedding is nearest to the target.

        Args:
            target: `[F]`.
            length: K, begin and end marks aside; they must fit into the encoder's limit.
            rng: decides the whole search.
            search: how long and how wild.
        """
        population = self.random(search.population, length, rng)
        words = np.array(list(self.tokens), dtype=object)

        def distances(prompts: list[np.ndarray]) -> np.ndarray:
            embeds = self.embed([" ".join(prompt) for prompt in prompts])
            return (embeds - target).square().sum(dim=1).cpu().numpy()

        scores = distances(population)
        history = [float(scores.min())]
        half = search.population // 2
        for _ in range(search.generations):
            best = np.argsort(scores, kind="stable")[: search.population - half]
            parents, scores = [population[i] for i in best], scores[best]
            children = self.accepted(
                lambda parents=parents: offspring(
                    parents, words, rng, search.crossover, search.mutation
                ),
                half,
            )
            population = parents + children
            scores = np.concatenate([scores, distances(children)])
            history.append(float(scores.min()))
        return Found(" ".join(population[scores.argmin()]), history[-1], tuple(history))


def offspring(
    parents: Sequence[np.ndarray],
    words: np.ndarray,
    rng: np.random.Generator,
    crossover: float,
    mutation: float,
) -> np.ndarray:
    """A child of prompts of equal length; the rates are as in `Search`."""
    child = parents[rng.integers(len(parents))].copy()
    if len(child) > 1 and rng.random() < crossover:
        cut = rng.integers(1, len(child))
        child[cut:] = parents[rng.integers(len(parents))][cut:]
    if rng.random() < mutation:
        child[rng.integers(len(child))] = words[rng.integers(len(words))]
    return child


def _letters(text: str) -> str:
    return re.sub(r"[\W_]", "", text.casefold())


def build(
    attack: Attack,
    prompts: pd.DataFrame,
    concepts: ConceptSet,
    *,
    count: int,
    eta: float,
    seed: int,
    lengths: Sequence[int] = LENGTHS,
    template: str = "{prompt}, {term}",
    search: Search = Search(),  # noqa: B008  (frozen data)
    name: str = "adversarial",
    log: Path | None = None,
    progress: bool = True,
) -> pd.DataFrame:
    """A prompt set of adversarial prompts, each with its harmless origin and its concept.

    Prompt number n comes from harmless prompt n, concept n and length n, each counted around; it
    is searched with a generator seeded with `(seed, n)`, so any part can be computed alone.

    Args:
        prompts: harmless prompts (see `load_prompts`); the concept vectors come from them too.
        concepts: gives the concepts, by the terms of its vocabulary.
        count: how many prompts.
        eta: η, how far along the concept vector the target lies.
        log: where found prompts are kept at once and an interrupted search goes on (`resumed`).

    Returns:
        A prompt set: `category` is the concept; `things` those of the origin that the found
        prompt names; `source` says how it was found.
    """
    if not len(prompts):
        raise ValueError("there are no harmless prompts to start from")
    if "{prompt}" not in template or "{term}" not in template:
        raise ValueError(f"the template must hold {{prompt}} and {{term}}, unlike {template!r}")
    vectors = {
        term: attack.concept_vector(term, list(prompts["prompt"]), template)
        for term in concepts.vocabulary
    }

    def find(n: int) -> dict:
        origin = prompts.iloc[n % len(prompts)]
        term = list(vectors)[n % len(vectors)]
        # Every concept meets every length, also when their numbers have a common divisor.
        length = lengths[(n + n // len(vectors)) % len(lengths)]
        rng = np.random.default_rng([seed, n])
        target = attack.embed([origin["prompt"]])[0] + eta * vectors[term]
        found = attack.search(target, length, rng, search)
        named = [thing for thing in split_things(origin["things"]) if thing in found.prompt.split()]
        return {
            "prompt_id": f"{name}-{n:03}",
            "prompt": found.prompt,
            "seed": int(rng.integers(2**31)),
            "category": term,
            "source": f"vldnp.adversarial: {origin['prompt_id']}, eta {eta:g}, {length} "
            f"tokens, distance {found.history[0]:.4g} to {found.distance:.4g}",
            "things": ", ".join(named),
            "place": "",
            "history": found.history,
        }

    settings = {
        "search": "ring-a-bell",
        "seed": seed,
        "eta": eta,
        "lengths": list(lengths),
        "template": template,
        "space": attack.space,
        **asdict(search),
    }
    rows = resumed(log, settings, count, find, name if progress else None)
    return as_prompts(rows)


def as_prompts(rows: Sequence[Mapping]) -> pd.DataFrame:
    """Found prompts as a prompt set, without the searches' own columns."""
    return pd.DataFrame(rows).reindex(columns=COLUMNS)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(prog="python -m moji.attacks.adversarial", description=__doc__)
    top.add_argument("--model", default="moji-sd", help="name, folder or hub id")
    top.add_argument("--concepts", default="moji", help="concept set: name or YAML file")
    top.add_argument("--prompts", default="tuning-benign", help="harmless prompts: name or CSV")
    top.add_argument("--output", type=Path, required=True, help="the CSV to write")
    top.add_argument("--count", type=int, default=256)
    top.add_argument("--lengths", type=int, nargs="+", default=list(LENGTHS), help="in tokens")
    top.add_argument("--eta", type=float, default=3.0, help="how far along the concept vector")
    top.add_argument("--seed", type=int, default=0)
    top.add_argument("--population", type=int, default=Search.population)
    top.add_argument("--generations", type=int, default=Search.generations)
    top.add_argument("--space", choices=SPACES, default="states", help="where distances count")
    top.add_argument("--template", default="{prompt}, {term}", help="a prompt with the concept")
    top.add_argument(
        "--forbid", nargs="*", default=CATEGORY_WORDS, help="besides the concept set's words"
    )
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; what is wrong is said in one line."""
    args = parser().parse_args(argv)
    try:
        concepts = load_concepts(args.concepts)
        attack = Attack(load.load(args.model), forbidden(concepts, args.forbid), args.space)
        table = build(
            attack,
            load_prompts(args.prompts),
            concepts,
            count=args.count,
            eta=args.eta,
            seed=args.seed,
            lengths=args.lengths,
            template=args.template,
            search=Search(args.population, args.generations),
            name=args.output.stem,
        )
        save_prompts(table, args.output)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{args.output}: {len(table)} prompts")
    return 0


if __name__ == "__main__":
    sys.exit(main())
