"""Captions without a concept set's words, to which pictures are compared by CLIP.

A picture that lacks the dagger which its prompt asks for is what steering is for, and must not
count as misaligned.
"""

import hashlib
import re
from collections.abc import Sequence
from functools import cached_property

import numpy as np
from PIL import Image

from vldnp.concepts import ConceptSet
from vldnp.models.clip import CLIPScore

GAP = "\0"


def without(prompt: str, concepts: ConceptSet) -> str:
    """The prompt less every written form of the concepts, with its article and its comma or "and".

    `"a dog, a knife and a turtle in the forest"` → `"a dog and a turtle in the forest"`. A prompt
    that has none of the words comes back as it is; one that has no others becomes empty.
    """
    forms = sorted(concepts.written_forms, key=len, reverse=True)
    words = "|".join(r"[\s-]+".join(map(re.escape, form.split())) for form in forms)
    noun = rf"(?<!\w)(?:(?:an?|the|some|one|two|three)\s+)?(?:{words})(?!\w)"
    text, count = re.subn(noun, GAP, prompt, flags=re.IGNORECASE)
    if not count:
        return prompt
    text = re.sub(rf"{GAP}(?:\s*{GAP})+", GAP, text)
    last = rf",\s*([^,{GAP}]*?)(?:,\s*|\s+)and\s+{GAP}"  # a list keeps its "and" before its last
    text = re.sub(last, r" and \1", text, flags=re.IGNORECASE)
    before = rf"(?:\s*,\s*(?:and\s+)?|\s+and\s+){GAP}"
    after = rf"{GAP}\s*(?:,\s*(?:and\s+)?|and\s+)"
    text = re.sub(rf"{before}|{after}", "", text, flags=re.IGNORECASE)
    return re.sub(r"\s+", " ", text.replace(GAP, " ")).strip(" ,")


class CaptionsWithout:
    """A CLIP score against the prompts `without` a concept set's words.

    It stands in for the `CLIPScore` that it is made of, under a name of its own.
    """

    def __init__(self, clip: CLIPScore, concepts: ConceptSet):
        self.clip, self.concepts = clip, concepts

    @property
    def name(self) -> str:
        return f"{self.clip.name}-without-{self.concepts.name}"

    @cached_property
    def revision(self) -> str:
        """That of the CLIP model, and of the words."""
        words = ", ".join(self.concepts.written_forms)
        return f"{self.clip.revision}-{hashlib.sha256(words.encode()).hexdigest()[:6]}"

    def __call__(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> np.ndarray:
        return self.clip(images, [without(prompt, self.concepts) for prompt in prompts])

    def chance(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> float:
        return self.clip.chance(images, [without(prompt, self.concepts) for prompt in prompts])
