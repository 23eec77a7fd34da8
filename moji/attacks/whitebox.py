"""A white-box search on the denoising loss.

The loss of UnlearnDiffAtk (Zhang et al., ECCV 2024, arXiv 2310.11868, eq. 5; P4D, Chin et al., ICML
2024, arXiv 2309.06135, is close to it) says how well a prompt explains images of the target:

    L(c) = E_{z_0, t, ε} ‖ε − ε_θ(z_t, t, c)‖²,    z_t = √ᾱ_t z_0 + √(1 − ᾱ_t) ε.

It is lowered by swapping tokens as in GCG (Zou et al. 2023, arXiv 2307.15043, algorithm 1): the
gradient with respect to the one-hot tokens ranks the swaps, a batch of those that rank high is
evaluated, and the best is kept.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from moji.attacks.vocabulary import Attack, Words
from vldnp.models.backbone import Backbone


class Draws(NamedTuple):
    """Noisy latents z_t of the target's images and their noise ε, `[M, C, h, w]`; t, `[M]`."""

    noisy: Tensor
    noise: Tensor
    timesteps: Tensor


@dataclass(frozen=True)
class Swaps:
    """Settings of the search.

    Attributes:
        steps: number of batches of swaps of which the best is kept.
        draws: M, noisy latents that a step's losses are the mean of; every step has its own.
        candidates: swaps evaluated a step, and random prompts that the first one is chosen from.
        top: k, how many tokens at each place the candidates are drawn from.
        noisiest, cleanest: the timesteps are spread between these.
    """

    steps: int = 16
    draws: int = 8
    candidates: int = 16
    top: int = 32
    noisiest: int = 950
    cleanest: int = 600


class Step(NamedTuple):
    """A step's prompt, and its loss before and after on the same draws; where no candidate was
    better, both are those of the step before."""

    words: Words
    before: float
    after: float


def draw(model: Backbone, latents: Tensor, swaps: Swaps, rng: np.random.Generator) -> Draws:
    """`swaps.draws` draws of (z_0, t, ε), the timesteps stratified over their span.

    Args:
        latents: z_0 of images of the target, `[n, C, h, w]`, scaled as the U-Net takes them.
    """
    count, span = swaps.draws, swaps.noisiest - swaps.cleanest
    rows = rng.choice(len(latents), size=count, replace=len(latents) < count)
    places = (np.arange(count) + rng.random(count)) / count
    timesteps = torch.from_numpy((swaps.cleanest + span * places).astype(np.int64))
    clean = latents[torch.from_numpy(rows)]
    noise = torch.from_numpy(rng.standard_normal(clean.shape)).to(clean.dtype)
    alpha_bar = model.pipe.scheduler.alphas_cumprod[timesteps].to(clean.dtype).view(-1, 1, 1, 1)
    return Draws(alpha_bar**0.5 * clean + (1 - alpha_bar) ** 0.5 * noise, noise, timesteps)


def denoising_loss(model: Backbone, states: Tensor, draws: Draws) -> Tensor:
    """L(c) per prompt, `[n]`: the mean over draws and elements of (ε − ε_θ(z_t, t, c))².

    Args:
        states: c, the text encoder's states, `[n, L, D]`.
    """
    n, m = len(states), len(draws.timesteps)
    predicted = model.pipe.unet(
        draws.noisy.repeat(n, 1, 1, 1),
        draws.timesteps.repeat(n),
        states.repeat_interleave(m, dim=0),
        return_dict=False,
    )[0]
    error = (predicted - draws.noise.repeat(n, 1, 1, 1)).square()
    return error.view(n, -1).mean(dim=1)


def relaxed_states(model: Backbone, ids: Tensor, one_hot: Tensor) -> Tensor:
    """The text encoder's states, `[n, L, D]`, of tokens given as rows of `one_hot` `[n, L, V]`.

    Args:
        ids: the same tokens as numbers, `[n, L]`: the encoder looks for the end mark in them.
    """
    encoder = model.pipe.text_encoder
    table = encoder.get_input_embeddings()
    hook = table.register_forward_hook(lambda module, inputs, output: one_hot @ module.weight)
    try:
        return encoder(ids).last_hidden_state
    finally:
        hook.remove()


def one_hot_gradient(model: Backbone, ids: Tensor, draws: Draws) -> Tensor:
    """∂L/∂x at one-hot x, `[L, V]` (arXiv 2307.15043, eq. 4), of one prompt's tokens `[L]`."""
    table = model.pipe.text_encoder.get_input_embeddings().weight
    one_hot = F.one_hot(ids, len(table)).to(table.dtype)[None].requires_grad_()
    loss = denoising_loss(model, relaxed_states(model, ids[None], one_hot), draws)
    return torch.autograd.grad(loss.sum(), one_hot)[0][0]


def swap_tokens(
    attack: Attack, latents: Tensor, length: int, rng: np.random.Generator, swaps: Swaps
) -> list[Step]:
    """From the best of some random prompts of `length` tokens on, a `Step` each.

    The first element is that start, so there are `steps` + 1; the last one is the result.
    """
    starts = attack.random(swaps.candidates, length, rng)
    losses = prompt_losses(attack.model, starts, draw(attack.model, latents, swaps, rng))
    best = int(losses.argmin())
    path = [Step(starts[best], *[float(losses[best])] * 2)]
    for _ in range(swaps.steps):
        draws = draw(attack.model, latents, swaps, rng)
        tried = [path[-1].words, *candidates(attack, path[-1].words, draws, rng, swaps)]
        losses = prompt_losses(attack.model, tried, draws)
        best = int(losses.argmin())
        path.append(Step(tried[best], float(losses[0]), float(losses[best])))
    return path


def candidates(
    attack: Attack, words: Words, draws: Draws, rng: np.random.Generator, swaps: Swaps
) -> list[Words]:
    """Prompts with one token swapped for one of the `top` with the least gradient there."""
    vocabulary = list(attack.tokens)
    numbers = torch.tensor([attack.tokens[word] for word in vocabulary])
    ids = attack.model.tokenize([" ".join(words)]).input_ids[0]
    gradient = one_hot_gradient(attack.model, ids, draws)
    ranked = gradient[1 : len(words) + 1, numbers].argsort(dim=1)[:, : swaps.top]

    def swapped() -> Words:
        place = rng.integers(len(words))
        child = list(words)
        child[place] = vocabulary[ranked[place, rng.integers(ranked.shape[1])]]
        return child

    return attack.accepted(swapped, swaps.candidates)


@torch.no_grad()
def prompt_losses(model: Backbone, prompts: Sequence[Words], draws: Draws) -> Tensor:
    """L of each prompt, `[n]`, on the same draws."""
    states = model.encode([" ".join(words) for words in prompts]).embeds
    parts = states.split(max(1, 128 // len(draws.timesteps)))
    return torch.cat([denoising_loss(model, part, draws) for part in parts])
