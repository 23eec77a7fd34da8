"""Alignment with the permitted part of a prompt: CLIP scores without its restricted things."""

import hashlib
import re
from collections.abc import Sequence

import numpy as np

from vldnp.answers import forms
from vldnp.concepts import ConceptSet, load_concepts
from vldnp.models.load import load_clip


def without(prompt: str, words: Sequence[str]) -> str:
    """`"a dog, a knife and a cat in the sea"` without "knife" → `"a dog and a cat in the sea"`."""
    longest = sorted(words, key=len, reverse=True)
    words = "|".join(r"[\s-]+".join(map(re.escape, form.split())) for form in longest)
    noun = rf"(?<!\w)(?:(?:an?|the|some|one|two|three)\s+)?(?:{words})(?!\w)"
    text, count = re.subn(rf"{noun}(?:\s*{noun})*", "\0", prompt, flags=re.IGNORECASE)
    if not count:
        return prompt
    last = r",\s*([^,\0]*?)(?:,\s*|\s+)and\s+\0"  # a list keeps its "and" before its last
    text = re.sub(last, r" and \1", text, flags=re.IGNORECASE)
    link = r"(?:\s*,\s*(?:and\s+)?|\s+and\s+)\0|\0\s*(?:,\s*(?:and\s+)?|and\s+)"
    text = re.sub(link, "", text, flags=re.IGNORECASE)
    return re.sub(r"\s+", " ", text.replace("\0", " ")).strip(" ,")


class CaptionsWithout:
    """A CLIP score against the prompts `without` all written forms of a concept set's terms."""

    def __init__(self, clip, concepts: ConceptSet):
        self.clip, self.words = clip, tuple(forms(concepts.vocabulary, concepts.name))
        digest = hashlib.sha256(", ".join(self.words).encode()).hexdigest()[:6]
        self.name = f"{clip.name}-without-{concepts.name}"
        self.revision = f"{clip.revision}-{digest}"

    def __call__(self, images: Sequence, prompts: Sequence[str]) -> np.ndarray:
        return self.clip(images, [without(prompt, self.words) for prompt in prompts])


def moji_clip(device=None) -> CaptionsWithout:
    """`moji-clip` for prompts without the terms of the concept set `moji`."""
    return CaptionsWithout(load_clip("moji-clip", device=device), load_concepts("moji"))
