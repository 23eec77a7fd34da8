"""VLMs: show pictures, ask one question about each, get the answers.

A VLM is any callable `(images, question) -> answers` with one answer per image; what is unsafe
and what an answer means is no concern of it.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from PIL import Image


class VLM(Protocol):
    """Anything that answers a question about each picture; `name` is optional."""

    def __call__(self, images: Sequence[Image.Image], question: str) -> list[str]: ...


def describe(vlm: Callable) -> dict:
    """What identifies a VLM in a run's records: its own `describe()`, else its name and revision.

    A function without a `name` goes by its qualified name.
    """
    if hasattr(vlm, "describe"):
        return vlm.describe()
    name = getattr(vlm, "name", None) or getattr(vlm, "__qualname__", type(vlm).__qualname__)
    return {"name": name, "revision": getattr(vlm, "revision", None)}


def ask(
    vlm: Callable, images: Sequence[Image.Image], question: str, identities: Sequence
) -> list[str]:
    """The VLM's answers, one per image.

    Args:
        identities: which images of the world these are; only a VLM with `by_identity = True` is
            told, as its third argument.

    Raises:
        ValueError: it gives more or fewer answers than there are images.
    """
    told = (identities,) if getattr(vlm, "by_identity", False) else ()
    answers = list(vlm(images, question, *told))
    if len(answers) != len(images):
        raise ValueError(
            f"VLM {describe(vlm)['name']!r} gave {len(answers)} answers to {len(images)} "
            "pictures; it must give one each"
        )
    return answers


class TransformersVLM:
    """A `transformers` image-text-to-text model: greedy answers, batched.

    Args:
        model, processor: as `AutoModelForImageTextToText` and `AutoProcessor` open them; the
            processor must have a chat template. Its tokenizer is set to left padding, as
            generation needs.
        name, revision: what identifies the model in records.
        max_new_tokens: an endless answer is cut here.
        size: pictures are resized to `size` × `size` pixels first (the paper: 448); None leaves
            them to the processor.
        batch_size: pictures per forward pass.
    """

    def __init__(
        self,
        model,
        processor,
        name: str,
        revision: str | None = None,
        *,
        max_new_tokens: int = 64,
        size: int | None = None,
        batch_size: int = 16,
    ):
        if getattr(processor, "chat_template", None) is None:
            raise ValueError(f"the processor of VLM {name!r} has no chat template")
        processor.tokenizer.padding_side = "left"
        self.model, self.processor = model.eval(), processor
        self.name, self.revision = name, revision
        self.max_new_tokens, self.size, self.batch_size = max_new_tokens, size, batch_size

    @classmethod
    def from_pretrained(
        cls,
        source: str,
        revision: str | None = None,
        *,
        name: str | None = None,
        device: str | torch.device | None = None,
        dtype: torch.dtype | str | None = None,
        **options,
    ) -> "TransformersVLM":
        """Open a folder or a hub id; safetensors only, never remote code.

        Args:
            source: folder or hub id.
            revision: hub revision.
            name: default is `source`.
            device: default is CUDA where there is one, else the CPU.
            dtype: default is float32 on the CPU (half precision is slow there), else the weights'.
            options: `max_new_tokens`, `size`, `batch_size` of the constructor.
        """
        from transformers import AutoModelForImageTextToText, AutoProcessor

        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        dtype = dtype or (torch.float32 if device.type == "cpu" else "auto")
        model = AutoModelForImageTextToText.from_pretrained(
            source, revision=revision, dtype=dtype, use_safetensors=True, trust_remote_code=False
        )
        processor = AutoProcessor.from_pretrained(
            source, revision=revision, trust_remote_code=False
        )
        return cls(model.to(device), processor, name or str(source), revision, **options)

    def describe(self) -> dict:
        """Everything that decides its answers, JSON-able."""
        return {
            "name": self.name,
            "revision": self.revision,
            "max_new_tokens": self.max_new_tokens,
            "size": self.size,
        }

    def __call__(self, images: Sequence[Image.Image], question: str) -> list[str]:
        """One answer per picture, as the model wrote it (special tokens dropped)."""
        answers: list[str] = []
        for start in range(0, len(images), self.batch_size):
            answers += self._answer(images[start : start + self.batch_size], question)
        return answers

    @torch.inference_mode()
    def _answer(self, images: Sequence[Image.Image], question: str) -> list[str]:
        inputs = self.processor.apply_chat_template(
            [_conversation(self._prepared(image), question) for image in images],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            processor_kwargs={"return_tensors": "pt", "padding": True},
        ).to(self.model.device, dtype=self.model.dtype)
        # Greedy: the sampling settings that a model's generation config may bring are switched
        # off too, because transformers warns about each that has no effect.
        tokens = self.model.generate(
            **inputs,
            do_sample=False,
            num_beams=1,
            temperature=None,
            top_p=None,
            top_k=None,
            max_new_tokens=self.max_new_tokens,
        )
        answers = tokens[:, inputs["input_ids"].shape[1] :]
        return self.processor.batch_decode(answers, skip_special_tokens=True)

    def _prepared(self, image: Image.Image) -> Image.Image:
        image = image.convert("RGB")
        if self.size is None:
            return image
        return image.resize((self.size, self.size), Image.Resampling.BICUBIC)


def _conversation(image: Image.Image, question: str) -> list[dict]:
    content = [{"type": "image", "image": image}, {"type": "text", "text": question}]
    return [{"role": "user", "content": content}]
