"""VLMs: show pictures, ask one question about each, get the answers.

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
from vldnp.models import constrained
from vldnp.models.errors import out_of_memory
from vldnp.models.hub import default_device

ANSWERS = ("free", "constrained")
"""How a VLM answers: in its own words, or with "none" or the terms that it is offered."""

Demonstrations = Sequence[tuple[Image.Image | str | Path, str]]
"""Worked examples shown before the picture in question: a picture or its file, and the answer."""


class VLMError(RuntimeError):
    """A VLM finally failed to answer about some pictures.

    Attributes:
        answers: one per picture; None where there is no answer.
        failures: why there is none, one per picture; empty where the error's text says it for all.
    """

    def __init__(
        self,
        reason: str,
        answers: Sequence[str | None] = (),
        failures: Sequence[str | None] = (),
    ):
        super().__init__(reason)
        self.answers, self.failures = list(answers), list(failures)


ANSWER_LIMIT = 4000
"""A longer answer is cut: it goes into every record, and no answer of 64 tokens is as long."""


def describe(vlm: Callable) -> dict:
    """What identifies a VLM in a run's records: its own `describe()`, else its name and revision.

    A function without a `name` goes by its qualified name.
    """
    if hasattr(vlm, "describe"):
        return vlm.describe()
    name = getattr(vlm, "name", None) or getattr(vlm, "__qualname__", type(vlm).__qualname__)
    return {"name": name, "revision": getattr(vlm, "revision", None)}


def identified(vlm: Callable) -> Callable:
    """The VLM itself, if its records tell it from every other; studies share images by them.

    Raises:
        ValueError: it, or one that it asks, has no name or no revision; one line.
    """
    own = describe(vlm)
    named = hasattr(vlm, "describe") or getattr(vlm, "name", None)
    if not (named and own.get("name") and own.get("revision")):
        raise ValueError(
            f"VLM {own.get('name')!r} needs a name and a revision in a study, which takes images "
            "of the same VLM for the same: set vlm.name and vlm.revision, or pass revision="
        )
    if callable(asked := getattr(vlm, "vlm", None)):
        identified(asked)
    return vlm


def ask(
    vlm: Callable,
    images: Sequence[Image.Image],
    question: str,
    identities: Sequence = (),
    choices: Iterable[str] = (),
) -> list[str]:
    """The VLM's answers, one per image; see `texts`.

    Args:
        identities: the sample identity of each image; only a VLM with `by_identity = True` gets
            them, as its third argument.
        choices: the terms that an answer is read for; only a VLM with `takes_choices = True`
            gets them, as `choices=`.

    Raises:
        VLMError: what it gives is no list of texts, one per image; one line.
    """
    identity = (identities,) if getattr(vlm, "by_identity", False) else ()
    offered = {"choices": tuple(choices)} if getattr(vlm, "takes_choices", False) else {}
    given = vlm(images, question, *identity, **offered)
    answers = texts(given, len(images))
    if None in answers:
        raise VLMError(
            f"VLM {describe(vlm)['name']!r} gave {_summary(given, answers)}; it must give a list "
            "of texts, one for each picture",
            answers,
        )
    return answers


def texts(given, count: int) -> list[str | None]:
    """What can be read of a VLM's answers about `count` pictures; None where there is no text.

    Only a sequence of `count` entries tells which answer belongs to which picture. Texts come
    back `cleaned`.
    """
    if isinstance(given, str | bytes) or not isinstance(given, Sequence) or len(given) != count:
        return [None] * count
    return [cleaned(answer) if isinstance(answer, str) else None for answer in given]


def cleaned(text: str) -> str:
    """At most `ANSWER_LIMIT` characters of it; lone surrogates, which no file can hold, as "?"."""
    return text[:ANSWER_LIMIT].encode("utf-8", "replace").decode()


def _summary(given, answers: Sequence[str | None]) -> str:
    pictures = f"{len(answers)} pictures"
    if isinstance(given, str | bytes) or not isinstance(given, Sequence):
        return f"{reprlib.repr(given)} for {pictures}"
    if len(given) != len(answers):
        return f"{len(given)} answers to {pictures}"
    wrong = answers.index(None)
    missing = f"no text about {answers.count(None)} of {pictures}"
    return f"{missing} ({reprlib.repr(given[wrong])} about number {wrong})"


class TransformersVLM:
    """A `transformers` image-text-to-text model: greedy answers, batched.

    Args:
        model, processor: as `AutoModelForImageTextToText` and `AutoProcessor` open them; the
            processor must have a chat template. Its tokenizer is set to left padding, as
            generation needs.
        name, revision: what identifies the model in records.
        max_new_tokens: an answer that does not end by itself is cut here.
        max_edge: pictures with a longer edge than this many pixels are made smaller, in
            proportion (the paper: 448); None leaves them to the processor.
        demonstrations: few-shot examples, `(picture, answer)` each, asked about in the same words.
        batch_size: pictures per forward pass.
        answers: `free`, or `constrained`: nothing but "none" or a list of the `choices` that the
            call offers can be written, each at most once, so that nothing is left to understand.

    Raises:
        ValueError: the processor has no chat template, or `max_edge` is less than 1.
    """

    def __init__(
        self,
        model,
        processor,
        name: str,
        revision: str | None = None,
        *,
        max_new_tokens: int = 64,
        max_edge: int | None = None,
        demonstrations: Demonstrations = (),
        batch_size: int = 16,
        answers: str = "free",
    ):
        if getattr(processor, "chat_template", None) is None:
            raise ValueError(f"the processor of VLM {name!r} has no chat template")
        check_edge(max_edge)
        self.takes_choices = constrains(answers)
        processor.tokenizer.padding_side = "left"
        processor.tokenizer.pad_token = (
            processor.tokenizer.pad_token or processor.tokenizer.eos_token
        )
        self.model, self.processor = model.eval(), processor
        self.name, self.revision = name, revision
        self.max_new_tokens, self.max_edge, self.batch_size = max_new_tokens, max_edge, batch_size
        self.demonstrations = opened(demonstrations)

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
        """Open a folder or a hub id; safetensors only, never remote code.

        Args:
            source: folder or hub id.
            revision: hub revision.
            name: default is `source`.
            device: default is CUDA where there is one, else the CPU.
            dtype: default is float32 on the CPU (half precision is slow there), else the weights'.
            quantization: transformers' `quantization_config` as plain data, for example
                `{"load_in_4bit": True, "bnb_4bit_compute_dtype": "bfloat16"}`, which needs the
                package bitsandbytes.
            options: of the constructor: `max_new_tokens`, `max_edge`, `demonstrations`,
                `batch_size`, `answers`.
        """
        from transformers import AutoModelForImageTextToText, AutoProcessor

        device = torch.device(device or default_device())
        dtype = dtype or (torch.float32 if device.type == "cpu" else "auto")
        model = AutoModelForImageTextToText.from_pretrained(
            source,
            revision=revision,
            dtype=dtype,
            device_map={"": device},  # quantized weights cannot be moved afterwards
            use_safetensors=True,
            trust_remote_code=False,
            **({"quantization_config": quantization} if quantization else {}),
        )
        processor = AutoProcessor.from_pretrained(
            source, revision=revision, trust_remote_code=False
        )
        return cls(model, processor, name or str(source), revision, **options)

    def describe(self) -> dict:
        """Everything that decides its answers, JSON-able."""
        quantization = getattr(self.model.config, "quantization_config", None)
        return {
            "name": self.name,
            "revision": self.revision,
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "quantization": getattr(quantization, "to_dict", lambda: quantization)(),
            "max_new_tokens": self.max_new_tokens,
            "max_edge": self.max_edge,
            "demonstrations": described(self.demonstrations),
            **({"answers": "constrained"} if self.takes_choices else {}),
        }

    def __call__(
        self, images: Sequence[Image.Image], question: str, choices: Sequence[str] = ()
    ) -> list[str]:
        """One answer per picture, as the model wrote it (special tokens dropped).

        Args:
            choices: what a constrained answer may name; free answers need none.

        Raises:
            ValueError: the processor does not take pictures of this size, or the tokenizer cannot
                write one of `choices`; one line.
            torch.OutOfMemoryError: one line that says which setting lowers what is needed.
        """
        answers: list[str] = []
        for start in range(0, len(images), self.batch_size):
            answers += self._answer(images[start : start + self.batch_size], question, choices)
        return answers

    @torch.inference_mode()
    def _answer(
        self, images: Sequence[Image.Image], question: str, choices: Sequence[str]
    ) -> list[str]:
        inputs = self._inputs([shrunk(image, self.max_edge) for image in images], question)
        start, only = inputs["input_ids"].shape[1], {}
        if self.takes_choices:
            spelling = constrained.spelled(self.processor.tokenizer, choices)
            only["prefix_allowed_tokens_fn"] = constrained.prefix_function(
                spelling, start, self._end_tokens, self.max_new_tokens
            )
        # Greedy: the sampling settings that a model's generation config may bring are switched
        # off too, because transformers warns about each that has no effect.
        hint = f"lower batch_size (now {self.batch_size}) or max_edge (now {self.max_edge})"
        with out_of_memory(self.name, hint):
            tokens = self.model.generate(
                **inputs,
                do_sample=False,
                num_beams=1,
                temperature=None,
                top_p=None,
                top_k=None,
                max_new_tokens=self.max_new_tokens,
                eos_token_id=self._end_tokens,
                pad_token_id=self.processor.tokenizer.pad_token_id,
                **only,
            )
        return self.processor.batch_decode(tokens[:, start:], skip_special_tokens=True)

    def _inputs(self, images: Sequence[Image.Image], question: str):
        before = shots(self.demonstrations, question, self.max_edge)
        try:
            return self.processor.apply_chat_template(
                [before + turns(image, question) for image in images],
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
                processor_kwargs={"padding": True},
            ).to(self.model.device, dtype=self.model.dtype)
        except ValueError as error:
            sizes = sorted({"×".join(map(str, image.size)) for image in images})
            raise ValueError(
                f"the processor of VLM {self.name!r} refuses pictures of {', '.join(sizes)} "
                f"pixels: {first_line(error)}; max_edge (now {self.max_edge}) makes them smaller"
            ) from error

    @property
    def _end_tokens(self) -> list[int]:
        """What ends an answer: the model's end tokens, and the tokenizer's, which chat models
        write at the end of a turn and some generation configs do not list."""
        listed = self.model.generation_config.eos_token_id
        listed = listed if isinstance(listed, list) else [listed]
        return sorted({*listed, self.processor.tokenizer.eos_token_id} - {None})


def shrunk(image: Image.Image, max_edge: int | None) -> Image.Image:
    """The picture in RGB, its longer edge at most `max_edge` pixels, its proportions kept."""
    image = image.convert("RGB")
    if max_edge is None or max(image.size) <= max_edge:
        return image
    scale = max_edge / max(image.size)
    size = [max(1, round(edge * scale)) for edge in image.size]
    return image.resize(size, Image.Resampling.BICUBIC)


def constrains(answers: str) -> bool:
    """Whether an option `answers` asks for constrained ones."""
    if answers not in ANSWERS:
        raise unknown("answers", answers, ANSWERS)
    return answers == "constrained"


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
