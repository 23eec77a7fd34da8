"""VLMs: show pictures, ask one question about each, get the answers.

A VLM is any callable `(images, question) -> answers` with one text per image, with a `name` and a
`revision` if it has them; what is unsafe and what an answer means is no concern of it. One with
`takes_choices = True` is called with `choices=` besides: the terms of the concept set, the only
ones that its answers may hold.
"""

import reprlib
from collections.abc import Callable, Iterable, Sequence

import torch
from PIL import Image
from torch import Tensor

from vldnp._files import first_line, unknown
from vldnp.models import constrained, reading
from vldnp.models.conversation import (
    Demonstrations,
    check_edge,
    described,
    opened,
    shots,
    shrunk,
    turns,
)
from vldnp.models.errors import out_of_memory
from vldnp.models.hub import default_device
from vldnp.models.prefix import PrefixCache

ANSWERS = ("free", "constrained", "read")
"""How a VLM answers: in its own words; with "none" or the terms that it is offered; or not at all:
the terms are read off the probabilities of its first word."""


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
    for inner in ("vlm", "screen", "confirm"):
        if callable(asked := getattr(vlm, inner, None)):
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
            Or `read`: nothing is written; one forward pass gives the probability that an answer
            begins with each choice (see `vldnp.models.reading`).
        prefix_cache: encode the demonstrations once and not with every picture (`PrefixCache`),
            for pictures of one size. Without demonstrations it does nothing: the picture comes
            first. It changes logits by rounding only.
        threshold: a choice is seen where that probability is as large, if answers are `read`.

    Raises:
        ValueError: the processor has no chat template, `max_edge` is less than 1, or `threshold`
            is no probability.
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
        threshold: float = reading.THRESHOLD,
        prefix_cache: bool = False,
    ):
        if getattr(processor, "chat_template", None) is None:
            raise ValueError(f"the processor of VLM {name!r} has no chat template")
        check_edge(max_edge)
        self._way = way_of_answering(answers, threshold)
        self.takes_choices, self.threshold = bool(self._way), threshold
        processor.tokenizer.padding_side = "left"
        processor.tokenizer.pad_token = (
            processor.tokenizer.pad_token or processor.tokenizer.eos_token
        )
        self.model, self.processor = model.eval(), processor
        self.name, self.revision = name, revision
        self.max_new_tokens, self.max_edge, self.batch_size = max_new_tokens, max_edge, batch_size
        self.demonstrations = opened(demonstrations)
        self.prefix = None
        if prefix_cache:
            image_token = processor.tokenizer.convert_tokens_to_ids(processor.image_token)
            self.prefix = PrefixCache(model, self._encoded, image_token)

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
                `batch_size`, `answers`, `threshold`, `prefix_cache`.
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
            **self._way,
        }

    def __call__(
        self, images: Sequence[Image.Image], question: str, choices: Sequence[str] = ()
    ) -> list[str]:
        """One answer per picture, as the model wrote it (special tokens dropped).

        Args:
            choices: what a constrained or read answer may name; free answers need none.

        Raises:
            ValueError: the processor does not take pictures of this size, the tokenizer cannot
                write one of `choices`, or two begin alike, if they are read; one line.
            torch.OutOfMemoryError: one line that says which setting lowers what is needed.
        """
        if self._way.get("answers") == "read":
            seen = self.probabilities(images, question, choices).tolist()
            return [reading.said(row, choices, self.threshold) for row in seen]
        answers: list[str] = []
        for start in range(0, len(images), self.batch_size):
            answers += self._answer(images[start : start + self.batch_size], question, choices)
        return answers

    @torch.inference_mode()
    def probabilities(
        self, images: Sequence[Image.Image], question: str, choices: Sequence[str]
    ) -> Tensor:
        """P(k), `[B, K]`: that an answer about each picture begins with choice k, in 0 … 1.

        One forward pass per picture. Errors are those of a call.
        """
        starts = reading.first_tokens(self.processor.tokenizer, choices)
        if not len(images):
            return torch.empty(0, len(starts) - 1)
        return reading.probabilities(self.first_logits(images, [question] * len(images)), starts)

    @torch.inference_mode()
    def first_logits(self, images: Sequence[Image.Image], questions: Sequence[str]) -> Tensor:
        """Logits `[B, V]` of the first token of each picture's answer to its question, on the CPU.

        Raises:
            ValueError: there are not as many questions as pictures, or none.
        """
        pairs = list(zip(images, questions, strict=True))
        if not pairs:
            raise ValueError("there is no picture to ask about; give at least one")
        parts = []
        for start in range(0, len(pairs), self.batch_size):
            inputs = self._inputs(*zip(*pairs[start : start + self.batch_size], strict=True))
            # By generate(), which knows the positions of each family behind padding.
            written = self._generate(
                inputs, max_new_tokens=1, output_logits=True, return_dict_in_generate=True
            )
            parts.append(written.logits[0].cpu())
        return torch.cat(parts)

    @torch.inference_mode()
    def _answer(
        self, images: Sequence[Image.Image], question: str, choices: Sequence[str]
    ) -> list[str]:
        inputs = self._inputs(images, [question] * len(images))
        start, only = inputs["input_ids"].shape[1], {}
        if self.takes_choices:
            spelling = constrained.spelled(self.processor.tokenizer, choices)
            only["prefix_allowed_tokens_fn"] = constrained.prefix_function(
                spelling, start, self._end_tokens, self.max_new_tokens
            )
        tokens = self._generate(inputs, max_new_tokens=self.max_new_tokens, **only)
        return self.processor.batch_decode(tokens[:, start:], skip_special_tokens=True)

    def _generate(self, inputs, **options):
        # Greedy: the sampling settings that a model's generation config may bring are switched
        # off too, because transformers warns about each that has no effect.
        hint = f"lower batch_size (now {self.batch_size}) or max_edge (now {self.max_edge})"
        with out_of_memory(self.name, hint):
            return self.model.generate(
                **inputs,
                do_sample=False,
                num_beams=1,
                temperature=None,
                top_p=None,
                top_k=None,
                eos_token_id=self._end_tokens,
                pad_token_id=self.processor.tokenizer.pad_token_id,
                **options,
            )

    def _inputs(self, images: Sequence[Image.Image], questions: Sequence[str]):
        images = [shrunk(image, self.max_edge) for image in images]
        asked = [turns(*pair) for pair in zip(images, questions, strict=True)]
        before = {q: shots(self.demonstrations, q, self.max_edge) for q in set(questions)}
        alike = len({image.size for image in images}) == len(before) == 1
        try:
            if self.prefix and alike and before[questions[0]]:
                inputs = self.prefix.inputs(before[questions[0]], asked)
                if inputs is not None:
                    return inputs
            return self._encoded(
                [before[q] + turn for q, turn in zip(questions, asked, strict=True)]
            )
        except ValueError as error:
            sizes = sorted({"×".join(map(str, image.size)) for image in images})
            raise ValueError(
                f"the processor of VLM {self.name!r} refuses pictures of {', '.join(sizes)} "
                f"pixels: {first_line(error)}; max_edge (now {self.max_edge}) makes them smaller"
            ) from error

    def _encoded(self, conversations: Sequence[list[dict]], add_generation_prompt: bool = True):
        return self.processor.apply_chat_template(
            conversations,
            add_generation_prompt=add_generation_prompt,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True},
        ).to(self.model.device, dtype=self.model.dtype)

    @property
    def _end_tokens(self) -> list[int]:
        """What ends an answer: the model's end tokens, and the tokenizer's, which chat models
        write at the end of a turn and some generation configs do not list."""
        listed = self.model.generation_config.eos_token_id
        listed = listed if isinstance(listed, list) else [listed]
        return sorted({*listed, self.processor.tokenizer.eos_token_id} - {None})


def way_of_answering(answers: str, threshold: float) -> dict:
    """The options `answers` and `threshold` as records have them: nothing for free answers.

    Raises:
        ValueError: an unknown way, or a threshold that is no probability; one line.
    """
    if answers not in ANSWERS:
        raise unknown("answers", answers, ANSWERS)
    if not 0 < threshold < 1:
        raise ValueError(f"threshold must be between 0 and 1, not {threshold}")
    if answers == "read":
        return {"answers": answers, "threshold": threshold}
    return {"answers": answers} if answers != "free" else {}
