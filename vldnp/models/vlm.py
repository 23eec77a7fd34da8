"""VLMs: show images, ask one question about each, get the answers.

A VLM is any callable `(images, question) -> answers` with one text per image, with a `name` and a
`revision` if it has them; what is unsafe and what an answer means is no concern of it. One with
`takes_choices = True` is called with `choices=` besides: the terms of the concept set, the only
ones that its answers may hold.
"""

import hashlib
import reprlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from PIL import Image

from vldnp._files import first_line, unknown
from vldnp.models.constrained import prefix_function, spelled
from vldnp.models.hub import default_device
from vldnp.models.weights import open_whole, out_of_memory

ANSWERS = ("constrained", "free")
"""How a VLM answers: with "none" or terms that it is offered, or in its own words."""

ANSWER_LIMIT = 4000
"""A longer answer is cut: it goes into every record, and no answer of 64 tokens is as long."""

Demonstrations = Sequence[tuple[Image.Image | str | Path, str]]
"""Worked examples shown before the image in question: an image or its file, and the answer."""


class VLMError(RuntimeError):
    """A VLM finally failed to answer about some images.

    `answers` has one per image, None where there is none, and `failures` why there is none; it is
    empty where the error's text says it for all.
    """

    def __init__(self, reason: str, answers: Sequence = (), failures: Sequence = ()):
        super().__init__(reason)
        self.answers, self.failures = list(answers), list(failures)


def describe(vlm: Callable) -> dict:
    """What identifies a VLM in records: its own `describe()`, else its (qualified) name and
    revision."""
    if hasattr(vlm, "describe"):
        return vlm.describe()
    name = getattr(vlm, "name", None) or getattr(vlm, "__qualname__", type(vlm).__qualname__)
    return {"name": name, "revision": getattr(vlm, "revision", None)}


def ask(vlm: Callable, images: Sequence, question: str, choices: Iterable[str] = ()) -> list[str]:
    """The VLM's answers, one per image; see `texts`.

    The choices, the terms of the concept set, go to a VLM with `takes_choices = True`.

    Raises:
        VLMError: what it gives is no list of texts, one per image; one line.
    """
    offered = {"choices": tuple(choices)} if getattr(vlm, "takes_choices", False) else {}
    given = vlm(images, question, **offered)
    answers = texts(given, len(images))
    if None in answers:
        name, said = describe(vlm)["name"], reprlib.repr(given)
        raise VLMError(
            f"VLM {name!r} gave {said} for {len(images)} images; it must give a list of texts, one "
            "for each",
            answers,
        )
    return answers


def texts(given, count: int) -> list[str | None]:
    """What can be read of a VLM's answers about `count` images; None where there is no text.

    Only a sequence of `count` entries tells which answer belongs to which image.
    """
    if isinstance(given, str | bytes) or not isinstance(given, Sequence) or len(given) != count:
        return [None] * count
    return [cleaned(answer) if isinstance(answer, str) else None for answer in given]


def cleaned(text: str) -> str:
    """At most `ANSWER_LIMIT` characters of it; lone surrogates, which no file can hold, as "?"."""
    return text[:ANSWER_LIMIT].encode("utf-8", "replace").decode()


def _shown(image: Image.Image) -> dict:
    return {"type": "image", "image": image}


class Conversation:
    """What a VLM is shown and how it answers: image, question, demonstrations before them.

    Args:
        max_new_tokens: a longer answer is cut.
        max_edge: images with a longer edge than so many pixels are made smaller (the paper: 448).
        demonstrations: few-shot examples, asked about in the same words.
        answers: `constrained`: nothing but "none" or a list of the `choices` of each call, each
            once, can be generated (a call without choices is free); or `free`.

    Raises:
        ValueError: `max_edge` is less than 1, or `answers` is neither; one line.
    """

    def __init__(
        self,
        max_new_tokens: int = 64,
        max_edge: int | None = None,
        demonstrations: Demonstrations = (),
        answers: str = "constrained",
    ):
        if max_edge is not None and max_edge < 1:
            raise ValueError(f"max_edge must be 1 or more pixels, or None, not {max_edge}")
        if answers not in ANSWERS:
            raise unknown("answers", answers, ANSWERS)
        self.max_new_tokens, self.max_edge, self.answers = max_new_tokens, max_edge, answers
        self.takes_choices, self.demonstrations = answers == "constrained", []
        for image, answer in demonstrations:
            if not isinstance(image, Image.Image):
                with Image.open(image) as file:
                    image = file.convert("RGB")
            self.demonstrations.append((image, answer))

    def described(self) -> dict:
        """Its settings in records, JSON-able; a digest stands for an image."""
        shots = [
            {"image": hashlib.sha256(i.convert("RGB").tobytes()).hexdigest()[:12], "answer": a}
            for i, a in self.demonstrations
        ]
        own = {"max_new_tokens": self.max_new_tokens, "max_edge": self.max_edge}
        own["demonstrations"] = shots
        return own | ({"answers": self.answers} if self.answers != "free" else {})

    def messages(self, image: Image.Image, question: str, part: Callable = _shown) -> list[dict]:
        """The question about an image as chat messages, the demonstrations before it.

        Args:
            part: what stands for an image in a message.
        """
        asked, text = [], {"type": "text", "text": question}
        for shown, answer in (*self.demonstrations, (image, None)):
            content = [part(shrunk(shown, self.max_edge)), text]
            asked.append({"role": "user", "content": content})
            if answer is not None:
                said = [{"type": "text", "text": answer}]
                asked.append({"role": "assistant", "content": said})
        return asked


def shrunk(image: Image.Image, max_edge: int | None) -> Image.Image:
    """The image in RGB, its longer edge at most `max_edge` pixels, its proportions kept."""
    image = image.convert("RGB")
    if max_edge is None or max(image.size) <= max_edge:
        return image
    scale = max_edge / max(image.size)
    size = [max(1, round(edge * scale)) for edge in image.size]
    return image.resize(size, Image.Resampling.BICUBIC)


class TransformersVLM(Conversation):
    """A `transformers` image-text-to-text model: greedy answers, batched.

    Args:
        model, processor: as `AutoModelForImageTextToText` and `AutoProcessor` open them; the
            processor must have a chat template. Its tokenizer is set to left padding.
        name, revision: what identifies the model in records.
        batch_size: images per forward pass.
        options: of `Conversation`, whose errors are raised too.
    """

    def __init__(
        self, model, processor, name: str, revision: str | None = None, *, batch_size=16, **options
    ):
        if getattr(processor, "chat_template", None) is None:
            raise ValueError(f"the processor of VLM {name!r} has no chat template")
        super().__init__(**options)
        tokenizer = processor.tokenizer
        tokenizer.padding_side = "left"  # as generation needs
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        self.model, self.processor = model.eval(), processor
        self.name, self.revision, self.batch_size = name, revision, batch_size

    @classmethod
    def from_pretrained(
        cls,
        source: str,
        revision: str | None = None,
        *,
        name: str | None = None,
        device: str | torch.device | None = None,
        dtype: torch.dtype | str | None = None,
        quantization: dict | None = None,
        **options,
    ) -> "TransformersVLM":
        """Open a folder or a hub id; safetensors only, never remote code. See `vldnp.load_vlm`.

        Args:
            quantization: transformers' `quantization_config` as plain data, such as
                `{"load_in_4bit": True}`, which needs the package bitsandbytes.
            options: of the constructor.
        """
        from transformers import AutoModelForImageTextToText, AutoProcessor

        device = torch.device(device or default_device())
        # Quantized weights cannot be moved afterwards; half precision is slow on the CPU.
        how = {"device_map": {"": device}, "revision": revision, "trust_remote_code": False}
        how["dtype"] = dtype or (torch.float32 if device.type == "cpu" else "auto")
        if quantization:
            how["quantization_config"] = quantization
        model = open_whole(AutoModelForImageTextToText, source, **how)
        safe = {"revision": revision, "trust_remote_code": False}
        processor = AutoProcessor.from_pretrained(source, **safe)
        return cls(model, processor, name or str(source), revision, **options)

    def describe(self) -> dict:
        """Everything that decides its answers, JSON-able."""
        quantized = getattr(self.model.config, "quantization_config", None)
        own = {"name": self.name, "revision": self.revision}
        own["dtype"] = str(self.model.dtype).removeprefix("torch.")
        own["quantization"] = getattr(quantized, "to_dict", lambda: quantized)()
        return own | self.described()

    def __call__(
        self, images: Sequence[Image.Image], question: str, choices: Sequence[str] = ()
    ) -> list[str]:
        """One answer per image, as the model wrote it; a constrained one names `choices` only.

        Raises:
            ValueError: the processor does not take images of this size, or the tokenizer cannot
                write one of `choices`; one line.
            torch.OutOfMemoryError: one line that says which setting lowers what is needed.
        """
        size = self.batch_size
        parts = [images[start : start + size] for start in range(0, len(images), size)]
        return [answer for part in parts for answer in self._answer(part, question, choices)]

    @torch.inference_mode()
    def _answer(self, images: Sequence, question: str, choices: Sequence[str]) -> list[str]:
        inputs, tokenizer = self._inputs(images, question), self.processor.tokenizer
        start, only = inputs["input_ids"].shape[1], {}
        if self.takes_choices and choices:
            only["prefix_allowed_tokens_fn"] = prefix_function(
                spelled(tokenizer, choices), start, self._end_tokens, self.max_new_tokens
            )
        hint = f"lower batch_size (now {self.batch_size}) or max_edge (now {self.max_edge})"
        # Greedy: sampling settings of the model's generation config are switched off too, because
        # transformers warns about each that has no effect.
        only |= {"do_sample": False, "num_beams": 1, "temperature": None, "top_p": None}
        only |= {"top_k": None, "max_new_tokens": self.max_new_tokens}
        only |= {"eos_token_id": self._end_tokens, "pad_token_id": tokenizer.pad_token_id}
        with out_of_memory(self.name, hint):
            tokens = self.model.generate(**inputs, **only)
        return self.processor.batch_decode(tokens[:, start:], skip_special_tokens=True)

    def _inputs(self, images: Sequence[Image.Image], question: str):
        asked = [self.messages(image, question) for image in images]
        how = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
        how |= {"add_generation_prompt": True, "processor_kwargs": {"padding": True}}
        try:
            inputs = self.processor.apply_chat_template(asked, **how)
            return inputs.to(self.model.device, dtype=self.model.dtype)
        except ValueError as error:
            sizes = sorted({"×".join(map(str, shrunk(i, self.max_edge).size)) for i in images})
            raise ValueError(
                f"the processor of VLM {self.name!r} refuses images of {', '.join(sizes)} "
                f"pixels: {first_line(error)}; max_edge (now {self.max_edge}) makes them smaller"
            ) from error

    @property
    def _end_tokens(self) -> list[int]:
        """The model's end tokens, and the tokenizer's, which some generation configs lack."""
        listed = self.model.generation_config.eos_token_id
        listed = listed if isinstance(listed, list) else [listed]
        return sorted({*listed, self.processor.tokenizer.eos_token_id} - {None})
