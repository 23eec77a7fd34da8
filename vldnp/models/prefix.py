"""The prefix cache: demonstrations are encoded once, whatever pictures are asked about after them.

In a causal language model the keys and values of a token depend on nothing behind it. What stands
before the first picture in question is the same in every prompt, so its keys and values are
computed for one row, kept, and repeated for each batch.
"""

import copy
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from transformers import DynamicCache

Encode = Callable[..., Mapping[str, Tensor]]
"""`(conversations, add_generation_prompt=True) -> inputs` of the model, as the processor makes."""


class PrefixCache:
    """Keys and values of the demonstrations, for one model in one process.

    Args:
        model: as for `TransformersVLM`.
        encode: its processor.
        image_token: the id of the token that stands for a part of a picture.
    """

    def __init__(self, model, encode: Encode, image_token: int):
        self.model, self.encode, self.image_token = model, encode, image_token
        self._known: tuple[list[dict], DynamicCache, int] | None = None

    def inputs(
        self, before: list[dict], conversations: Sequence[list[dict]]
    ) -> dict[str, Tensor | DynamicCache] | None:
        """What `generate` takes for `before + conversation`, each with the prefix in its cache.

        Args:
            before: the demonstrations as chat messages; not empty.
            conversations: one picture and question each; all pictures of one size, so that
                every prompt has the same length and none is padded.

        Returns:
            None if the chat template writes the demonstrations in another way where more follows,
            or the processor cuts a picture in another way where others precede it, as that of
            LLaVA-OneVision does.
        """
        whole = self.encode([before + conversations[0]])
        ids, B = whole["input_ids"], len(conversations)
        position_ids = self.model._prepare_position_ids_for_generation(ids, dict(whole))
        if self._known is None or self._known[0] != before:
            if (found := self._prefilled(before, ids, position_ids)) is None:
                return None
            self._known = (before, *found)
        _, prefix, n = self._known
        own = self.encode(conversations)
        if self._pictured(own["input_ids"]) != B * self._pictured(ids[:, n:]):
            return None
        cache = copy.deepcopy(prefix)
        cache.batch_repeat_interleave(B)
        by_token = {name for name, value in whole.items() if value.shape == ids.shape}
        return {
            **{name: value for name, value in own.items() if name not in by_token},
            **{name: whole[name].expand(B, -1) for name in by_token},
            "position_ids": position_ids.repeat_interleave(B, dim=position_ids.ndim - 2),
            "past_key_values": cache,
        }

    def _pictured(self, ids: Tensor) -> int:
        return int((ids == self.image_token).sum())

    def _prefilled(self, before: list[dict], ids: Tensor, position_ids: Tensor):
        """The cache of what `ids` begin with, and its length."""
        shown = self.encode([before], add_generation_prompt=False)
        alone = shown["input_ids"]
        shared = min(alone.shape[1], ids.shape[1])
        same = (alone[0, :shared] == ids[0, :shared]).long().cumprod(0)
        if not (n := int(same.sum())) or self._pictured(alone[:, n:]):
            return None
        inputs = {k: v[:, :n] if v.shape == alone.shape else v for k, v in shown.items()}
        cache = DynamicCache(config=self.model.config.get_text_config(decoder=True))
        with torch.inference_mode():
            self.model(
                **inputs,
                position_ids=position_ids[..., :n],
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
        return cache, n
