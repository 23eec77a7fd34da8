"""The search of Ring-A-Bell (Tsai et al., ICLR 2024, arXiv 2310.10012) in the text encoder f.

1. concept vector: c = mean over prompts of f(prompt with the concept) − f(prompt);
2. target of a harmless prompt p: f(p) + η c;
3. a genetic search over the allowed tokens for the prompt of K tokens whose embedding is nearest to
   the target.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from moji.attacks.vocabulary import Attack, Words
from vldnp.models.backbone import Backbone


@dataclass(frozen=True)
class Search:
    """Settings of the genetic search; the rates are those of the authors' code.

    Attributes:
        population: prompts per generation, 2 or more; the better half stays.
        generations: how many times the other half is replaced by children.
        crossover, mutation: as in `Attack.child`.
    """

    population: int = 60
    generations: int = 50
    crossover: float = 0.5
    mutation: float = 0.25


@torch.no_grad()
def embed(model: Backbone, prompts: Sequence[str]) -> Tensor:
    """f(prompts), `[n, L · D]` float32: the text encoder's states."""
    return model.encode(prompts).embeds.flatten(1).float()


def concept_vector(model: Backbone, term: str, prompts: Sequence[str]) -> Tensor:
    """c of the concept that `term` names, `[L · D]`, from prompts without it."""
    with_term = [f"{prompt}, {term}" for prompt in prompts]
    return (embed(model, with_term) - embed(model, prompts)).mean(dim=0)


def nearest(
    attack: Attack, target: Tensor, length: int, rng: np.random.Generator, search: Search
) -> tuple[Words, list[float]]:
    """The prompt of `length` tokens whose embedding is nearest to the target `[L · D]`.

    Returns:
        The prompt, and the least squared distance at the start and after each generation.
    """

    def distances(prompts: Sequence[Words]) -> np.ndarray:
        embeds = embed(attack.model, [" ".join(prompt) for prompt in prompts])
        return (embeds - target).square().sum(dim=1).cpu().numpy()

    population = attack.random(search.population, length, rng)
    scores = distances(population)
    history = [float(scores.min())]
    half = search.population // 2
    for _ in range(search.generations):
        best = np.argsort(scores, kind="stable")[: search.population - half]
        parents, scores = [population[i] for i in best], scores[best]

        def child(parents=parents) -> Words:
            return attack.child(parents, rng, search.crossover, search.mutation)

        children = attack.accepted(child, half)
        population = parents + children
        scores = np.concatenate([scores, distances(children)])
        history.append(float(scores.min()))
    return population[scores.argmin()], history
