"""The images to generate, one entry per image: the arguments of `sample`, checked."""

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real

from torch import Generator

from vldnp._files import first_line
from vldnp._finite import label, number


@dataclass(frozen=True)
class Batch:
    """One entry per image to generate. A seed is None where a generator was given."""

    prompts: list[str]
    seeds: list[int | None]
    generators: list[Generator]
    guidance_scales: list[float]
    labels: list[str]


def batch_of(
    prompt: str | Sequence[str],
    seeds: Sequence[int] | None = None,
    guidance_scale: float | Sequence[float] = 7.5,
    generator: Generator | Sequence[Generator] | None = None,
    num_images_per_prompt: int = 1,
    noise_device: str = "cpu",
) -> Batch:
    """The batch of these arguments; a wrong one is a ValueError or TypeError of one line.

    Args:
        prompt: one or several, each repeated `num_images_per_prompt` times, as in diffusers.
        seeds: one per image; default 0 … B−1.
        generator: instead of seeds, as in diffusers: one for all images in turn, or one each.
        guidance_scale: g, for all or for each; g ≤ 1 is no CFG (g = 1), as in diffusers, and ε_u
            is evaluated only for rules that use it.
        noise_device: where the generators of `seeds` draw; "cpu" gives every machine the same.
    """
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    if wrong := [p for p in prompts if not (isinstance(p, str) and p.strip())]:
        raise ValueError(f"prompts must be texts, none of them empty, not {wrong[0]!r}")
    count = whole("num_images_per_prompt", num_images_per_prompt, 1)
    prompts = [p for p in prompts for _ in range(count)]
    if not (B := len(prompts)):
        raise ValueError("no prompt given; give at least one")
    if seeds is not None and generator is not None:
        raise ValueError("give either seeds or generator, not both")
    if generator is None:
        seeds = range(B) if seeds is None else seeds
        seeds = [whole("a seed", seed, 0) for seed in each("seeds", seeds, B)]
        try:
            generators = [Generator(noise_device).manual_seed(seed) for seed in seeds]
        except RuntimeError as error:  # no such device, or a build of PyTorch without it
            raise ValueError(f"noise_device {noise_device!r}: {first_line(error)}") from error
    else:
        seeds = [None] * B
        generators = each("generator", generator, B, Generator)
    scales = each("guidance_scale", guidance_scale, B, Real | str)
    scales = [max(float(number("guidance_scale", g)), 1.0) for g in scales]
    labels = [label(i, *image) for i, image in enumerate(zip(prompts, seeds, strict=True))]
    return Batch(prompts, seeds, generators, scales, labels)


def whole(name: str, value, least: int) -> int:
    """`value`, if it is a whole number from `least` on, below 2^63; else a ValueError."""
    try:
        number = operator.index(value)
    except TypeError:
        number = least - 1
    if not least <= number < 2**63:
        raise ValueError(f"{name} must be a whole number, {least} or more, not {value!r}")
    return number


def each(name: str, values, B: int, single=()) -> list:
    """`values` as a list of one per image; a `single` value is for all images."""
    if isinstance(values, single):
        return [values] * B
    try:
        values = list(values)
    except TypeError:
        raise TypeError(f"{name} must be a sequence of one per image, not {values!r}") from None
    if len(values) != B:
        raise ValueError(f"{name} has {len(values)} entries for {B} images; give one per image")
    return values
