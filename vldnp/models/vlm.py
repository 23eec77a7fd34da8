"""VLMs: any callable `(images, question) -> answers` with one text per image, and a `name` and a
`revision` if it has them. With `takes_choices = True` a VLM also gets `choices=`: the terms of the
concept set, to which its answers are limited. Images are PIL images, or with `takes_pixels = True`
uint8 `[k, 3, H, W]` on the model's device."""

import hashlib
import re
import reprlib
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import interpolate
from torchvision.transforms.functional import pil_to_tensor
from transformers import AutoModelForImageTextToText, AutoProcessor, ProcessorMixin

from vldnp._files import unknown
from vldnp.models.hub import default_device, open_whole, out_of_memory

ANSWER_LIMIT = 4000  # a longer answer is cut, because records hold it
# Settings of a model's config that have no effect would cause warnings.
GREEDY = {"do_sample": False, "num_beams": 1, "temperature": None, "top_p": None, "top_k": None}
NONE = "none"
# (tokens, choice) at the start of an answer, also of "none"; and after a term, with the comma.
Spelling = tuple[list[tuple[tuple[int, ...], str]], list[tuple[tuple[int, ...], str]]]


class VLMError(RuntimeError):
    """A VLM gave no answer for some images: `answers` has None there, and `failures` the reason."""

    def __init__(self, reason: str, answers: Sequence = (), failures: Sequence = ()):
        super().__init__(reason)
        self.answers, self.failures = list(answers), list(failures)


def describe(vlm: Callable) -> dict:
    """What identifies a VLM in records: its own `describe()`, else its name and revision."""
    if hasattr(vlm, "describe"):
        return vlm.describe()
    name = getattr(vlm, "name", None) or getattr(vlm, "__qualname__", type(vlm).__qualname__)
    return {"name": name, "revision": getattr(vlm, "revision", None)}


def ask(vlm: Callable, images: Sequence, question: str, choices: Iterable[str] = ()) -> list[str]:
    """The VLM's answers, one text per image, or a `VLMError`; choices go to one that takes them."""
    taken = {"choices": tuple(choices)} if getattr(vlm, "takes_choices", False) else {}
    given = vlm(images, question, **taken)
    if None in (answers := texts(given, len(images))):
        said = f"VLM {describe(vlm)['name']!r} gave {reprlib.repr(given)} for {len(images)} images"
        raise VLMError(f"{said}; it must give a list of texts, one for each", answers)
    return answers


def texts(given, count: int) -> list[str | None]:
    """The texts among the answers for `count` images; None for each if their number is wrong."""
    if isinstance(given, str | bytes) or not isinstance(given, Sequence) or len(given) != count:
        return [None] * count
    return [cleaned(answer) if isinstance(answer, str) else None for answer in given]


def cleaned(text: str) -> str:
    """At most `ANSWER_LIMIT` characters, with "?" for lone surrogates, which no file can hold."""
    return text[:ANSWER_LIMIT].encode("utf-8", "replace").decode()


def resized(image: Image.Image | Tensor, max_edge: int | None = None) -> Tensor:
    """An image as uint8 `[3, H, W]`, its longer edge `max_edge` pixels by bicubic interpolation up
    or down, in two passes that are rounded, as PIL's; its proportions are kept."""
    pixels = image if isinstance(image, Tensor) else pil_to_tensor(image.convert("RGB"))
    height, width = pixels.shape[1:]
    if max_edge in (None, longer := max(height, width)):
        return pixels
    new = [max(1, round(n * max_edge / longer)) for n in (height, width)]
    x = pixels[None].to(torch.float32 if pixels.is_mps else torch.float64)
    for size in ((height, new[1]), new):
        x = interpolate(x, size, mode="bicubic", antialias=True).add(0.5).floor().clamp(0, 255)
    return x[0].to(torch.uint8)


def _words(text: str) -> list[str]:
    return re.findall(r"[^\W_]+", text.casefold())


def offered(choices: Sequence[str]) -> list[str]:
    """The choices, each once; `ValueError` for one that cannot stand in a list."""
    choices = list(dict.fromkeys(choices))
    if wrong := [c for c in choices if "," in c or _words(c) in ([], [NONE])]:
        raise ValueError(f"{wrong[0]!r} cannot be a choice: an answer is none or a list")
    return choices


def spelled(tokenizer, choices: Sequence[str]) -> Spelling:
    """How `tokenizer` spells the choices; `ValueError` of `offered`, or if it has no tokens."""

    def tokens(text: str) -> tuple[int, ...]:
        return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])

    def says(ids: Sequence[int], text: str) -> bool:
        return _words(tokenizer.decode(list(ids), skip_special_tokens=True)) == _words(text)

    first, more, before = [], [], tokens(NONE)
    for choice in (*offered(choices), NONE):
        starts = {start for start in (tokens(choice), tokens(f" {choice}")) if says(start, choice)}
        # In context, because some tokenizers put a space before the first word of any text.
        both = tokens(f"{NONE}, {choice}")
        whole = both[: len(before)] == before
        after = both[len(before) :] if whole else tokens(f", {choice}")
        if not starts or not says((*before, *after), f"{NONE}, {choice}"):
            raise ValueError(f"the tokenizer has no tokens for {choice!r} in a list")
        first += [(start, choice) for start in sorted(starts)]
        more += [(after, choice)] if choice != NONE else []
    return first, more


def allowed(spelling: Spelling, written: Sequence[int], ends: Collection[int], left: int) -> list:
    """The tokens that may come after those `written`; a `ValueError` where there are none. An end
    may come after every whole term; a term starts only if it fits into `left` tokens."""
    written, found = tuple(written), set()
    if set(ends) & set(written):
        return sorted(ends)

    def walk(position: int, used: frozenset[str], paths) -> None:
        rest = written[position:]
        for tokens, choice in paths:
            if choice in used:
                continue
            if rest[: len(tokens)] == tokens:
                if len(rest) == len(tokens):
                    found.update(ends)
                if choice != NONE:
                    walk(position + len(tokens), used | {choice}, spelling[1])
            elif tokens[: len(rest)] == rest and len(tokens) - len(rest) <= left:
                found.add(tokens[len(rest)])

    walk(0, frozenset(), spelling[0])
    if not found:
        raise ValueError(f"max_new_tokens leaves {left} tokens, and no answer is as short")
    return sorted(found)


@dataclass(eq=False, repr=False, kw_only=True)
class Conversation:
    """A VLM's input and the form of its answers. Demonstrations precede the image and the question.
    With `answers="constrained"`, an answer is "none" or a list of the `choices` of a call."""

    max_new_tokens: int = 64
    max_edge: int | None = None  # the longer edge of an image in pixels (the paper: 448)
    demonstrations: Sequence[tuple[Image.Image | str | Path, str]] = ()  # (image or file, answer)
    answers: str = "constrained"

    def __post_init__(self):
        if self.max_edge is not None and self.max_edge < 1:
            raise ValueError(f"max_edge must be 1 or more pixels, or None, not {self.max_edge}")
        if self.answers not in ("constrained", "free"):
            raise unknown("answers", self.answers, ["constrained", "free"])
        self.takes_choices = self.answers == "constrained"
        self.demonstrations = [
            (i if isinstance(i, Image.Image) else Image.open(i).convert("RGB"), answer)
            for i, answer in self.demonstrations
        ]

    def describe(self) -> dict:
        """Everything that decides its answers, JSON-able, with a digest for an image."""
        own = {k: getattr(self, k) for k in ("name", "revision", "max_new_tokens", "max_edge")}
        shown = [(hashlib.sha256(i.convert("RGB").tobytes()), a) for i, a in self.demonstrations]
        own["demonstrations"] = [{"image": i.hexdigest()[:12], "answer": a} for i, a in shown]
        return own | ({"answers": self.answers} if self.answers != "free" else {})

    def messages(self, image: Image.Image | Tensor, question: str, part: Callable) -> list[dict]:
        """The question as chat messages; `part` makes the content of an image, `resized`."""
        said = []
        for shown, answer in (*self.demonstrations, (image, "")):
            content = [part(resized(shown, self.max_edge)), {"type": "text", "text": question}]
            said += [{"role": "user", "content": content}]
            said += [{"role": "assistant", "content": [{"type": "text", "text": answer}]}]
        return said[:-1]


@dataclass(eq=False, repr=False)
class TransformersVLM(Conversation):
    """A `transformers` image-text-to-text model, whose processor has a chat template: greedy
    answers, `batch_size` images at a time, which stay on its device. See `Conversation`."""

    model: nn.Module
    processor: ProcessorMixin
    name: str  # in records, with the revision
    revision: str | None = None
    batch_size: int = 16
    takes_pixels = True

    def __post_init__(self):
        super().__post_init__()
        tokenizer = self.processor.tokenizer
        tokenizer.padding_side = "left"  # as generation needs
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        self.model.eval()

    @classmethod
    def from_pretrained(
        cls, source, revision=None, name=None, device=None, dtype=None, quantization=None, **options
    ) -> "TransformersVLM":
        """Open a folder or a hub id; safetensors only, never remote code. `quantization` is
        transformers' `quantization_config`, such as `{"load_in_4bit": True}`."""
        device = torch.device(device or default_device())
        safe = {"revision": revision, "trust_remote_code": False}
        dtype = dtype or (torch.float32 if device.type == "cpu" else "auto")  # half is slow
        how = safe | {"device_map": {"": device}, "dtype": dtype}  # quantized models stay there
        how |= {"quantization_config": quantization} if quantization else {}
        model = open_whole(AutoModelForImageTextToText, source, **how)
        processor = AutoProcessor.from_pretrained(source, **safe)
        return cls(model, processor, name or str(source), revision, **options)

    def describe(self) -> dict:
        quantized = getattr(self.model.config, "quantization_config", None)
        own = {"quantization": getattr(quantized, "to_dict", lambda: quantized)()}
        return super().describe() | own | {"dtype": str(self.model.dtype).removeprefix("torch.")}

    @torch.inference_mode()
    def __call__(self, images: Sequence, question: str, choices=()) -> list[str]:
        """One answer per image, as the model wrote it; a constrained one names `choices` only."""
        if len(images) > self.batch_size:
            first, rest = images[: self.batch_size], images[self.batch_size :]
            return self(first, question, choices) + self(rest, question, choices)
        if not len(images):
            return []
        inputs, tokenizer = self._inputs(images, question), self.processor.tokenizer
        start, listed = inputs["input_ids"].shape[1], self.model.generation_config.eos_token_id
        # Some generation configs lack the tokenizer's end token.
        ends = {*(listed if isinstance(listed, list) else [listed]), tokenizer.eos_token_id}
        ends, limit = sorted(ends - {None}), self.max_new_tokens
        how = {"eos_token_id": ends, "pad_token_id": tokenizer.pad_token_id}
        if self.takes_choices and choices:
            known, end = spelled(tokenizer, choices), start + limit
            how["prefix_allowed_tokens_fn"] = lambda _, ids: allowed(
                known, ids[start:].tolist(), ends, end - len(ids)
            )
        hint = f"lower batch_size (now {self.batch_size}) or max_edge (now {self.max_edge})"
        with out_of_memory(self.name, hint):
            tokens = self.model.generate(**inputs, **GREEDY, **how, max_new_tokens=limit)
        return self.processor.batch_decode(tokens[:, start:], skip_special_tokens=True)

    def _inputs(self, images: Sequence[Image.Image | Tensor], question: str):
        def part(pixels: Tensor) -> dict:
            return {"type": "image", "image": pixels.to(self.model.device)}

        asked = [self.messages(image, question, part) for image in images]
        how = dict.fromkeys(("tokenize", "return_dict", "add_generation_prompt"), True)
        how |= {"return_tensors": "pt", "processor_kwargs": {"padding": True}}
        inputs = self.processor.apply_chat_template(asked, **how)
        return inputs.to(self.model.device, dtype=self.model.dtype)
