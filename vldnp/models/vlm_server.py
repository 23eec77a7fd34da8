"""VLMs behind a server: a bad reply affects only the answer for its own image."""

import asyncio
import base64
import io
import itertools
import json
import os
import re
import time
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import KW_ONLY, dataclass
from urllib.parse import urlsplit

import httpx2
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import to_pil_image

from vldnp.models.vlm import NONE, Conversation, VLMError, offered

KEY = "OPENAI_API_KEY"  # the environment variable; a server may need none
REPLY_LIMIT = 1_000_000  # bytes; an answer of 64 tokens takes about one thousand
NAMES = r"(?:\w+[:_])?(?:think\w*|thought|reasoning|channel)"
THOUGHT = re.compile(rf"(?i)[<\[◁]\|?(/?){NAMES}\|?[>\]▷]")
UNSUPPORTED = re.compile(r"unsupported|not support|unrecogni|unknown|unexpected|not permit", re.I)


@dataclass(eq=False, repr=False)
class RemoteVLM(Conversation):
    """A VLM behind an OpenAI-compatible server: vLLM, `transformers serve`, llama.cpp, and others.

    Queries are concurrent, with temperature 0. A call without a connection, with a time-out or a
    status 408, 409, 429 or 5xx is repeated after 0.5, 1, 2, 4, 8, 8, … seconds or at the time that
    the server names. Constrained answers are checked against the JSON schema of the request.
    Answers, errors and records never hold the key of `OPENAI_API_KEY`."""

    base_url: str
    model: str  # the name under which the server serves it, and by default that in records
    _: KW_ONLY
    name: str | None = None
    revision: str | None = None
    timeout: float = 60.0  # seconds for one try
    deadline: float = 600.0  # for an answer, all tries and waits
    retries: int = 5  # after the first try
    concurrency: int = 8  # calls under way at once

    def __post_init__(self):
        super().__post_init__()
        address, key = urlsplit(self.base_url), os.environ.get(KEY, "").strip()
        if address.username or address.password or address.query:
            raise ValueError(f"the VLM's address must hold no secrets; set {KEY} instead")
        if not re.fullmatch(r"[!#-\[\]-~]*", key):
            raise ValueError(f"the key in {KEY} holds a character that no key has")
        self.name = self.name or self.model
        self._refused: set[str] = set()  # parameters that the server's API does not have
        # Not packed, so that bytes can be counted; a `Headers` shows no key.
        headers = {"Accept-Encoding": "identity", "Authorization": f"Bearer {key or 'none'}"}
        self._headers, self._tls = httpx2.Headers(headers), httpx2.create_ssl_context()

    def describe(self) -> dict:
        return super().describe() | {"served": True}

    def __call__(self, images: Sequence[Image.Image], question: str, choices=()) -> list[str]:
        """One answer per image, or a `VLMError` for some, which holds the others' answers."""
        choices = offered(choices) if self.takes_choices else []
        key = self._headers["authorization"].removeprefix("Bearer ")
        escaped = re.compile(r"\\*".join(map(re.escape, key)))  # as JSON may escape it

        def redacted(text: str) -> str:  # a short key such as "EMPTY" is no secret
            return escaped.sub("[key]", text) if len(key) >= 8 else text

        def outcome(image: Image.Image) -> tuple[str | None, str | None]:  # or why there is none
            try:
                reply = self._reply(self.messages(image, question, _png), choices)
                return redacted(answer_in(reply, choices)), None
            except (VLMError, httpx2.HTTPError) as error:  # redacted before it is cut
                return None, " ".join(redacted(str(error)).split())[:300] or "nothing"

        with ThreadPoolExecutor(self.concurrency) as pool:
            outcomes = list(pool.map(outcome, images))
        answers, failures = [answer for answer, _ in outcomes], [why for _, why in outcomes]
        if wrong := [why for why in failures if why]:
            which = f"gave no answer about {len(wrong)} of {len(images)} images: {wrong[0]}"
            raise VLMError(f"VLM {self.name!r} at {self.base_url} {which}", answers, failures)
        return answers

    def _reply(self, messages: list[dict], choices: Sequence[str]) -> bytes:
        end, body = time.monotonic() + self.deadline, {"model": self.model, "messages": messages}
        if choices:
            seen = {"seen": {"type": "array", "items": {"enum": list(choices)}}}
            schema = {"type": "object", "properties": seen, "required": ["seen"]}
            named = {"name": "seen", "schema": schema | {"additionalProperties": False}}
            body["response_format"] = {"type": "json_schema", "json_schema": named}
        for attempt in itertools.count():
            limit = "max_completion_tokens" if "max_tokens" in self._refused else "max_tokens"
            own = {limit: self.max_new_tokens}
            own |= {} if "temperature" in self._refused else {"temperature": 0}
            seconds = min(self.timeout, max(end - time.monotonic(), 0.001))
            try:
                status, headers, reply = asyncio.run(self._post(body | own, seconds))
                said = f"status {status}: {reply.decode(errors='replace')}"
            except (httpx2.TransportError, TimeoutError) as error:
                said = f"{type(error).__name__}: {str(error) or 'the call timed out'}"
                status, headers = 599, {}
            if 200 <= status < 300:
                return reply
            others = [n for n in ("max_tokens", "temperature") if n in own and n in said]
            if others and status in (400, 422) and UNSUPPORTED.search(said):
                warnings.warn(f"VLM {self.name!r} takes no {' and '.join(others)}", stacklevel=2)
                self._refused |= {*others}
                continue
            again, wait = status in (408, 409, 429) or status >= 500, 0.5 * 2 ** min(attempt, 4)
            with suppress(KeyError, ValueError):  # the time that the server names
                wait = max(0.0, float(headers["retry-after"]))
            if not again or attempt >= self.retries or time.monotonic() + wait > end:
                raise VLMError(said)
            time.sleep(wait)

    async def _post(self, body: dict, seconds: float) -> tuple[int, httpx2.Headers, bytes]:
        """Status, headers and body, all within `seconds`, however slowly the bytes come."""
        how, whole = {"headers": self._headers, "verify": self._tls, "timeout": None}, bytearray()
        url = f"{self.base_url.rstrip('/')}/chat/completions"
        async with asyncio.timeout(seconds), httpx2.AsyncClient(**how) as client:
            async with client.stream("POST", url, json=body) as response:
                async for chunk in response.aiter_raw():
                    whole += chunk
                    if len(whole) > REPLY_LIMIT:
                        raise VLMError(f"the server's reply is longer than {REPLY_LIMIT:,} bytes")
        return response.status_code, response.headers, bytes(whole)


def answer_in(reply: bytes, choices: Sequence[str] = ()) -> str:
    """The answer in a chat completion, with choices that in its JSON; all else is a `VLMError`."""
    try:
        choice = json.loads(reply)["choices"][0]
        answer, ended = choice["message"].get("content"), choice.get("finish_reason")
    # RecursionError: JSON that is nested too deeply
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        seen = reply.decode(errors="replace")
        raise VLMError(f"the server's reply is no chat completion: {seen}") from None
    if ended == "length":
        raise VLMError("the answer is cut off; max_new_tokens makes room for more")
    if not isinstance(answer, str) or ended == "content_filter" or not answer.strip():
        raise VLMError(f"the answer is empty or no text: {answer!r} (it ended by {ended!r})")
    for last in list(THOUGHT.finditer(answer))[-1:]:
        if not last[1] or not answer[last.end() :].strip():
            raise VLMError(f"the answer is a thought without an end: {answer}")
        answer = answer[last.end() :].strip()
    if not choices:
        return answer
    with suppress(ValueError, TypeError, AttributeError, RecursionError):
        ((key, seen),) = json.loads(answer).items()
        if key == "seen" and isinstance(seen, list) and set(seen) <= set(choices):
            return ", ".join(dict.fromkeys(seen)) or NONE
    raise VLMError(f"the answer does not fit the JSON schema: {answer}")


def _png(pixels: Tensor) -> dict:
    to_pil_image(pixels).save(buffer := io.BytesIO(), "PNG")
    url = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    return {"type": "image_url", "image_url": {"url": url}}
