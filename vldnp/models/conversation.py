"""What a VLM is shown: a picture small enough, worked examples before it, as chat messages."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

Demonstrations = Sequence[tuple[Image.Image | str | Path, str]]
"""Worked examples shown before the picture in question: a picture or its file, and the answer."""


def shrunk(image: Image.Image, max_edge: int | None) -> Image.Image:
    """The picture in RGB, its longer edge at most `max_edge` pixels, its proportions kept."""
    image = image.convert("RGB")
    if max_edge is None or max(image.size) <= max_edge:
        return image
    scale = max_edge / max(image.size)
    size = [max(1, round(edge * scale)) for edge in image.size]
    return image.resize(size, Image.Resampling.BICUBIC)


def check_edge(max_edge: int | None) -> None:
    """ValueError for a `max_edge` that is no number of pixels."""
    if max_edge is not None and max_edge < 1:
        raise ValueError(f"max_edge must be 1 or more pixels, or None, not {max_edge}")


def opened(demonstrations: Demonstrations) -> tuple[tuple[Image.Image, str], ...]:
    """The worked examples with their pictures read from the files."""
    pairs = []
    for picture, answer in demonstrations:
        if not isinstance(picture, Image.Image):
            with Image.open(picture) as file:
                picture = file.convert("RGB")
        pairs.append((picture, answer))
    return tuple(pairs)


def described(demonstrations: Sequence[tuple[Image.Image, str]]) -> list[dict]:
    """The worked examples in records: a digest of the picture, and the answer."""
    return [
        {"image": hashlib.sha256(image.convert("RGB").tobytes()).hexdigest()[:12], "answer": answer}
        for image, answer in demonstrations
    ]


def turns(image: Image.Image, question: str, answer: str | None = None) -> list[dict]:
    """A question about a picture, and the answer where it is known, as chat messages."""
    content = [{"type": "image", "image": image}, {"type": "text", "text": question}]
    asked = [{"role": "user", "content": content}]
    if answer is None:
        return asked
    return [*asked, {"role": "assistant", "content": [{"type": "text", "text": answer}]}]


def shots(
    demonstrations: Sequence[tuple[Image.Image, str]], question: str, max_edge: int | None
) -> list[dict]:
    """The worked examples as chat messages, all asked about in the same words."""
    return [
        turn
        for image, answer in demonstrations
        for turn in turns(shrunk(image, max_edge), question, answer)
    ]
