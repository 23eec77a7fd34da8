"""A white-box search for adversarial prompts, on the denoising loss.

The loss of UnlearnDiffAtk (Zhang et al., ECCV 2024, arXiv 2310.11868, eq. 5; P4D, Chin et al., ICML
2024, arXiv 2309.06135, is near to it) says how well a prompt explains pictures of the target:

    L(c) = E_{z_0, t, ε} ‖ε − ε_θ(z_t, t, c)‖²,    z_t = √ᾱ_t z_0 + √(1 − ᾱ_t) ε.

It is lowered by swapping tokens as in GCG (Zou et al. 2023, arXiv 2307.15043, algorithm 1): the
gradient with respect to the one-hot tokens ranks the swaps, a batch of those that rank high is
evaluated, and the best is kept.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import StableDiffusionPipeline
from torch import Tensor

from moji.attacks.adversarial import Attack
from vldnp.models.backbone import Backbone


@dataclass(frozen=True)
class Draws:
    """Noisy latents of the target's pictures.

    Attributes:
        noisy: z_t, `[M, C, h, w]`.
        noise: ε, likewise.
        timesteps: t, `[M]`.
    """

    noisy: Tensor
    noise: Tensor
    timesteps: Tensor


@dataclass(frozen=True)
class Swaps:
    """How the search goes.

    Attributes:
        steps: how often the best of a batch of swaps is looked for.
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

    def __post_init__(self):
        if min(self.draws, self.candidates, self.top) < 1 or self.steps < 0:
            raise ValueError(
                "a search needs 0 or more steps, and draws, candidates and top of 1 or more, not "
                f"{self.steps}, {self.draws}, {self.candidates} and {self.top}"
            )


@dataclass(frozen=True)
class Step:
    """What a step ended in: the prompt's tokens, and its loss before and after on the same draws.

    Where no candidate was better, the prompt and its loss are the same as before.
    """

    words: tuple[str, ...]
    before: float
    after: float


def draw(
    model: Backbone, latents: Tensor, count: int, span: tuple[int, int], rng: np.random.Generator
) -> Draws:
    """`count` draws of (z_0, t, ε), the timesteps stratified over the span.

    Args:
        latents: z_0 of pictures of the target, `[n, C, h, w]`, scaled as the U-Net takes them.
        span: the noisiest and the cleanest timestep.
    """
    rows = rng.choice(len(latents), size=count, replace=len(latents) < count)
    places = (np.arange(count) + rng.random(count)) / count
    timesteps = torch.from_numpy((span[1] + (span[0] - span[1]) * places).astype(np.int64))
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


@dataclass(frozen=True)
class WhiteBox:
    """A search against one target.

    Attributes:
        attack: the model, and what a prompt may hold.
        latents: z_0 of pictures that show the target, `[n, C, h, w]`.
        swaps: how the search goes.

    Raises:
        ValueError: a model other than Stable Diffusion 1 or 2 that predicts noise.
    """

    attack: Attack
    latents: Tensor
    swaps: Swaps = Swaps()

    def __post_init__(self):
        pipe = self.attack.model.pipe
        kind = pipe.scheduler.config.get("prediction_type", "none")
        if not isinstance(pipe, StableDiffusionPipeline) or kind != "epsilon":
            raise ValueError(
                "the white-box search is for Stable Diffusion that predicts noise (epsilon), not "
                f"for {type(pipe).__name__} with {kind}"
            )

    def search(self, length: int, rng: np.random.Generator) -> list[Step]:
        """From the best of some random prompts of `length` tokens on, a `Step` each.

        The first element is that start, so there are `steps` + 1; the last one is the result.
        """
        swaps = self.swaps
        starts = self.attack.random(swaps.candidates, length, rng)
        losses = self.losses(starts, draws := self._draw(rng))
        best = int(losses.argmin())
        words, path = starts[best], [Step(tuple(starts[best]), *[float(losses[best])] * 2)]
        for _ in range(swaps.steps):
            draws = self._draw(rng)
            tried = [words, *self.candidates(words, draws, rng)]
            losses = self.losses(tried, draws)
            best = int(losses.argmin())
            words = tried[best]
            path.append(Step(tuple(words), float(losses[0]), float(losses[best])))
        return path

    def candidates(
        self, words: np.ndarray, draws: Draws, rng: np.random.Generator
    ) -> list[np.ndarray]:
        """Prompts with one token swapped for one of the `top` that the gradient likes there."""
        vocabulary = list(self.attack.tokens)
        numbers = torch.tensor([self.attack.tokens[word] for word in vocabulary])
        ids = self.attack.model.tokenize([" ".join(words)]).input_ids[0]
        gradient = one_hot_gradient(self.attack.model, ids, draws)
        liked = gradient[1 : len(words) + 1, numbers].argsort(dim=1)[:, : self.swaps.top]

        def swapped() -> np.ndarray:
            place = rng.integers(len(words))
            child = words.copy()
            child[place] = vocabulary[liked[place, rng.integers(liked.shape[1])]]
            return child

        return self.attack.accepted(swapped, self.swaps.candidates)

    @torch.no_grad()
    def losses(self, prompts: Sequence[Sequence[str]], draws: Draws) -> Tensor:
        """L of each prompt, `[n]`, on the same draws."""
        states = self.attack.model.encode([" ".join(words) for words in prompts]).embeds
        parts = states.split(max(1, 128 // len(draws.timesteps)))
        return torch.cat([denoising_loss(self.attack.model, part, draws) for part in parts])

    def _draw(self, rng: np.random.Generator) -> Draws:
        swaps = self.swaps
        span = (swaps.noisiest, swaps.cleanest)
        return draw(self.attack.model, self.latents, swaps.draws, span, rng)
