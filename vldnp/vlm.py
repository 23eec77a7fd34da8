"""VLMs: show pictures, ask one question about each, get the answers.

A VLM is any callable `(images, question) -> answers` with one answer per image, with a `name` and a
`revision` if it has them; what is unsafe and what an answer means is no concern of it. One with
`takes_choices = True` is called with `choices=` besides: the terms of the concept set, the only
ones that its answers may hold.
"""

import base64
import hashlib
import io
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import repeat
from pathlib import Path

import torch
from PIL import Image

from vldnp import constrained
from vldnp.files import unknown

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


def describe(vlm: Callable) -> dict:
    """What identifies a VLM in a run's records: its own `describe()`, else its name and revision.

    A function without a `name` goes by its qualified name.
    """
    if hasattr(vlm, "describe"):
        return vlm.describe()
    name = getattr(vlm, "name", None) or getattr(vlm, "__qualname__", type(vlm).__qualname__)
    return {"name": name, "revision": getattr(vlm, "revision", None)}


def ask(
    vlm: Callable,
    images: Sequence[Image.Image],
    question: str,
    identities: Sequence = (),
    choices: Iterable[str] = (),
) -> list[str]:
    """The VLM's answers, one per image.

    Args:
        identities: which images of the world these are; only a VLM with `by_identity = True` is
            told, as its third argument.
        choices: the terms that an answer is read for; only a VLM with `takes_choices = True` is
            told, as `choices=`.

    Raises:
        ValueError: it gives more or fewer answers than there are images.
    """
    told = (identities,) if getattr(vlm, "by_identity", False) else ()
    offered = {"choices": tuple(choices)} if getattr(vlm, "takes_choices", False) else {}
    answers = list(vlm(images, question, *told, **offered))
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
        _check_edge(max_edge)
        self.takes_choices = _constrained(answers)
        processor.tokenizer.padding_side = "left"
        processor.tokenizer.pad_token = (
            processor.tokenizer.pad_token or processor.tokenizer.eos_token
        )
        self.model, self.processor = model.eval(), processor
        self.name, self.revision = name, revision
        self.max_new_tokens, self.max_edge, self.batch_size = max_new_tokens, max_edge, batch_size
        self.demonstrations = _opened(demonstrations)

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

        Raises:
            torch.OutOfMemoryError: one line that says what is needed and what lowers it.
        """
        from transformers import AutoModelForImageTextToText, AutoProcessor

        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        dtype = dtype or (torch.float32 if device.type == "cpu" else "auto")
        with _memory_to_load(source, revision, dtype, name or str(source)):
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
            "demonstrations": _described(self.demonstrations),
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
        try:
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
        except torch.OutOfMemoryError as error:
            raise torch.OutOfMemoryError(
                f"not enough GPU memory for VLM {self.name!r} to look at {len(images)} pictures at "
                f"once; lower its batch_size (now {self.batch_size}) or max_edge (now "
                f"{self.max_edge})"
            ) from error
        return self.processor.batch_decode(tokens[:, start:], skip_special_tokens=True)

    def _inputs(self, images: Sequence[Image.Image], question: str):
        before = _shots(self.demonstrations, question, self.max_edge)
        try:
            return self.processor.apply_chat_template(
                [before + _turns(image, question) for image in images],
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
                processor_kwargs={"padding": True},
            ).to(self.model.device, dtype=self.model.dtype)
        except ValueError as error:
            sizes = sorted({"×".join(map(str, image.size)) for image in images})
            reason = next(iter(str(error).splitlines()), "no reason given")
            raise ValueError(
                f"the processor of VLM {self.name!r} refuses pictures of {', '.join(sizes)} "
                f"pixels: {reason}; max_edge (now {self.max_edge}) makes them smaller"
            ) from error

    @property
    def _end_tokens(self) -> list[int]:
        """What ends an answer: the model's end tokens, and the tokenizer's, which chat models
        write at the end of a turn and some generation configs do not list."""
        listed = self.model.generation_config.eos_token_id
        listed = listed if isinstance(listed, list) else [listed]
        return sorted({*listed, self.processor.tokenizer.eos_token_id} - {None})


class RemoteVLM:
    """A VLM behind an OpenAI-compatible server: vLLM, `transformers serve`, llama.cpp, and others.

    Pictures are asked about concurrently, with temperature 0. A call that meets no server, a
    time-out, or a status 408, 409, 429 or 5xx is tried again after 0.5, 1, 2, 4, 8, 8, … seconds.

    Args:
        base_url: such as "http://localhost:8000/v1".
        model: the name under which the server serves it.
        name, revision: what identifies it in records; the default name is `model`. The server's
            address is not recorded.
        max_new_tokens, max_edge, demonstrations: as for `TransformersVLM`.
        choices: the answer is constrained to a JSON list of these texts, where the server can do
            structured output (`response_format`); where it refuses to, one warning is given and
            the answers are free. Some servers ignore it in silence.
        answers: `free`, or `constrained`: the same with the `choices` that each call offers, so
            with the terms of the concept set that is asked about.
        timeout: seconds for one try.
        retries: further tries after the first.
        concurrency: calls under way at once.
        key_variable: the environment variable with the API key; servers without keys need none.
            The key is kept out of errors, `repr` and records.

    Raises:
        ValueError: the address carries a user, a password or a query (those get into logs), or
            `concurrency` or `max_edge` is less than 1.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        name: str | None = None,
        revision: str | None = None,
        max_new_tokens: int = 64,
        max_edge: int | None = None,
        demonstrations: Demonstrations = (),
        choices: Sequence[str] = (),
        answers: str = "free",
        timeout: float = 60.0,
        retries: int = 5,
        concurrency: int = 8,
        key_variable: str = "OPENAI_API_KEY",
    ):
        from urllib.parse import urlsplit

        from openai import OpenAI

        address = urlsplit(base_url)
        if address.username or address.password or address.query:
            raise ValueError(
                f"the address of VLM {model!r} must not carry secrets; put its key into the "
                f"environment variable {key_variable}"
            )
        if concurrency < 1:
            raise ValueError(f"concurrency must be 1 or more, not {concurrency}")
        _check_edge(max_edge)
        self.base_url, self.model = base_url, model
        self.name, self.revision = name or model, revision
        self.max_new_tokens, self.max_edge = max_new_tokens, max_edge
        self.demonstrations, self.choices = _opened(demonstrations), tuple(choices)
        self.concurrency, self.key_variable = concurrency, key_variable
        self.takes_choices = _constrained(answers)
        self._constrained = bool(self.choices) or self.takes_choices
        self._client = OpenAI(
            base_url=base_url,
            api_key=os.environ.get(key_variable) or "none",  # the client insists on some key
            timeout=timeout,
            max_retries=retries,
        )

    def __repr__(self) -> str:
        return f"RemoteVLM({self.base_url!r}, {self.model!r})"

    def describe(self) -> dict:
        """Everything that is known here and decides its answers, JSON-able."""
        return {
            "name": self.name,
            "revision": self.revision,
            "served": True,
            "max_new_tokens": self.max_new_tokens,
            "max_edge": self.max_edge,
            "demonstrations": _described(self.demonstrations),
            "choices": list(self.choices),
            **({"answers": "constrained"} if self.takes_choices else {}),
        }

    def __call__(
        self, images: Sequence[Image.Image], question: str, choices: Sequence[str] = ()
    ) -> list[str]:
        """One answer per picture; `choices` go before those of the constructor.

        Raises:
            VLMError: there is none for some of them, after all tries; one line.
        """
        before = _shots(self.demonstrations, question, self.max_edge)
        with ThreadPoolExecutor(self.concurrency) as pool:
            conversations = [
                [_sendable(t) for t in before + _turns(shrunk(image, self.max_edge), question)]
                for image in images
            ]
            outcomes = list(pool.map(self._answer, conversations, repeat(choices or self.choices)))
        failures = [outcome for outcome in outcomes if isinstance(outcome, VLMError)]
        if failures:
            answers = [None if isinstance(answer, VLMError) else answer for answer in outcomes]
            raise VLMError(
                f"VLM {self.name!r} at {self.base_url} gave no answer about {len(failures)} of "
                f"{len(images)} pictures: {failures[0]}",
                answers,
            )
        return outcomes

    def _answer(self, conversation: list[dict], choices: Sequence[str]) -> str | VLMError:
        """The answer, or why there is none (returned, so that the other pictures get theirs)."""
        import openai

        constrained = self._constrained and bool(choices)
        try:
            response = self._client.chat.completions.create(
                model=self.model,
                messages=conversation,
                temperature=0,
                max_tokens=self.max_new_tokens,
                **({"response_format": _answer_format(choices)} if constrained else {}),
            )
        except (openai.BadRequestError, openai.UnprocessableEntityError) as error:
            if not constrained:
                return VLMError(self._reason(error))
            if self._constrained:
                self._constrained = False
                warnings.warn(
                    f"VLM {self.name!r} is asked without constraints: its server refuses "
                    f"structured output ({self._reason(error)})",
                    stacklevel=2,
                )
            return self._answer(conversation, choices)
        except openai.OpenAIError as error:
            return VLMError(self._reason(error))
        if not response.choices:
            return VLMError("the server's reply holds no answer")
        choice = response.choices[0]
        answer, ended = choice.message.content, choice.finish_reason
        # No answer must not pass for the answer that nothing is to be seen.
        if answer is None or ended == "content_filter" or (not answer and ended == "length"):
            return VLMError(f"the answer is empty (it ended by {ended!r})")
        return answer

    def _reason(self, error: Exception) -> str:
        """One line without the key, which some servers repeat in their errors."""
        text = next((line for line in str(error).splitlines() if line.strip()), "no reason given")
        key = os.environ.get(self.key_variable)
        return text.replace(key, "[key]") if key else text


@contextmanager
def _memory_to_load(source: str, revision: str | None, dtype, name: str) -> Iterator[None]:
    """Where the GPU's memory does not last, say what is needed and which setting lowers it."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        from transformers import AutoConfig, AutoModelForImageTextToText

        config = AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=False)
        kind = getattr(config, "dtype", None) if dtype == "auto" else dtype
        with torch.device("meta"):
            model = AutoModelForImageTextToText.from_config(config, dtype=kind or torch.float32)
        needed = sum(p.numel() * p.element_size() for p in model.parameters()) / 2**30
        raise torch.OutOfMemoryError(
            f"VLM {name!r} needs {needed:.1f} GiB of GPU memory for its weights in {model.dtype}; "
            'load it with quantization={"load_in_4bit": True}, which needs the package '
            "bitsandbytes, or take a smaller one"
        ) from error


def shrunk(image: Image.Image, max_edge: int | None) -> Image.Image:
    """The picture in RGB, its longer edge at most `max_edge` pixels, its proportions kept."""
    image = image.convert("RGB")
    if max_edge is None or max(image.size) <= max_edge:
        return image
    scale = max_edge / max(image.size)
    size = [max(1, round(edge * scale)) for edge in image.size]
    return image.resize(size, Image.Resampling.BICUBIC)


def _constrained(answers: str) -> bool:
    if answers not in ANSWERS:
        raise unknown("answers", answers, ANSWERS)
    return answers == "constrained"


def _check_edge(max_edge: int | None) -> None:
    if max_edge is not None and max_edge < 1:
        raise ValueError(f"max_edge must be 1 or more pixels, or None, not {max_edge}")


def _opened(demonstrations: Demonstrations) -> tuple[tuple[Image.Image, str], ...]:
    opened = []
    for picture, answer in demonstrations:
        if not isinstance(picture, Image.Image):
            with Image.open(picture) as file:
                picture = file.convert("RGB")
        opened.append((picture, answer))
    return tuple(opened)


def _described(demonstrations: Sequence[tuple[Image.Image, str]]) -> list[dict]:
    return [
        {"image": hashlib.sha256(image.convert("RGB").tobytes()).hexdigest()[:12], "answer": answer}
        for image, answer in demonstrations
    ]


def _turns(image: Image.Image, question: str, answer: str | None = None) -> list[dict]:
    """A question about a picture, and the answer where it is known, as chat messages."""
    content = [{"type": "image", "image": image}, {"type": "text", "text": question}]
    asked = [{"role": "user", "content": content}]
    if answer is None:
        return asked
    return [*asked, {"role": "assistant", "content": [{"type": "text", "text": answer}]}]


def _shots(
    demonstrations: Sequence[tuple[Image.Image, str]], question: str, max_edge: int | None
) -> list[dict]:
    """The worked examples as chat messages, all asked about in the same words."""
    return [
        turn
        for image, answer in demonstrations
        for turn in _turns(shrunk(image, max_edge), question, answer)
    ]


def _sendable(turn: dict) -> dict:
    """A chat message as an OpenAI-compatible server takes it: pictures as PNG data addresses."""
    return {"role": turn["role"], "content": [_sendable_part(part) for part in turn["content"]]}


def _sendable_part(part: dict) -> dict:
    if part["type"] != "image":
        return part
    buffer = io.BytesIO()
    part["image"].save(buffer, "PNG")
    data = base64.b64encode(buffer.getvalue()).decode()
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}


def _answer_format(choices: Sequence[str]) -> dict:
    """`{"seen": [...]}` with nothing but `choices`, as OpenAI's `response_format` says it."""
    schema = {
        "type": "object",
        "properties": {"seen": {"type": "array", "items": {"enum": list(choices)}}},
        "required": ["seen"],
        "additionalProperties": False,
    }
    return {"type": "json_schema", "json_schema": {"name": "seen", "schema": schema}}
