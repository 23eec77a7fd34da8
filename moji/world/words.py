"""The Moji benchmark's words: its caption vocabulary as a CLIP tokenizer."""

from __future__ import annotations

import json
import re

from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTokenizer

from moji.world.icons import CATEGORIES, THINGS
from moji.world.scenes import PLACES

CONTEXT_LENGTH = 32
"""Tokens of a prompt, begin and end marks included (CLIP of Stable Diffusion has 77)."""

EXTRA = "no none without of picture scene restricted things unwanted , ."


def tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer for which every caption word is one token; any other text is spelled.

    The merges are learnt by byte-pair encoding from the sorted word list. The trainer numbers last
    letters in a random order and breaks ties by these numbers, so the last letters are given first.
    """
    text = " ".join([*THINGS, *CATEGORIES, *PLACES, "a an and", EXTRA])
    words = sorted(set(re.findall(r"[a-z]+|[^\sa-z]", text)))
    last_letters = sorted({f"{word[-1]}</w>" for word in words})
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.BpeTrainer(
        vocab_size=100_000,
        min_frequency=1,
        end_of_word_suffix="</w>",
        special_tokens=last_letters,
        show_progress=False,
    )
    bpe.train_from_iterator(words, trainer)
    learnt = json.loads(bpe.to_str())["model"]["merges"]
    merges = [tuple(m.split(" ") if isinstance(m, str) else m) for m in learnt]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = [*alphabet, *(f"{letter}</w>" for letter in alphabet), *map("".join, merges)]
    vocabulary = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    for mark in ("<|startoftext|>", "<|endoftext|>"):
        vocabulary[mark] = len(vocabulary)
    return CLIPTokenizer(vocabulary, merges, model_max_length=CONTEXT_LENGTH)
