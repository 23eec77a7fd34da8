"""VLMs behind a server: nothing that a server sends back can cost more than its own image.

A reply may be anything: no JSON, endless, dripping in byte by byte, a redirection, a repetition of
the key. All of that is a failure of the image that was asked about, with its reason.
"""

import base64
import io
import itertools
import json
import logging
import math
import os
import re
import socket
import threading
import time
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from urllib.parse import urlsplit

import httpx2
from PIL import Image

from vldnp.models.constrained import NONE, offered
from vldnp.models.vlm import Conversation, VLMError

REPLY_LIMIT = 1_000_000
"""A reply of more bytes is cut off; an answer of 64 tokens takes about one thousand."""

SHORTEST_SECRET = 8
"""A shorter key is a word such as "EMPTY", which servers without keys are given: no secret."""

OTHERWISE = ("max_tokens", "temperature")
"""Parameters that newer APIs refuse and that can be left out, from the first refusal on."""

LOOPBACK = ("localhost", "127.0.0.1", "::1", "0.0.0.0")
THOUGHT = re.compile(r"[<\[◁](/?)(?:think|thinking|thought|reasoning)[>\]▷]", re.IGNORECASE)
UNSUPPORTED = re.compile(r"unsupported|not support|unrecogni|unknown|unexpected|not permit", re.I)

_secrets: set[str] = set()
"""All keys that were read."""


class RemoteVLM(Conversation):
    """A VLM behind an OpenAI-compatible server: vLLM, `transformers serve`, llama.cpp, and others.

    Images are asked about concurrently, with temperature 0. A call that meets no server, a
    time-out, or a status 408, 409, 429 or 5xx is tried again after 0.5, 1, 2, 4, 8, 8, … seconds
    or when the server says. Redirections are not followed, and proxies not used for this machine.
    Constrained answers are asked for by a JSON schema, against which the reply is checked. The
    address is not recorded, and the key kept out of answers, errors, logs, `repr` and records.

    Args:
        model: the name under which the server serves it, and by default the `name` in records.
        timeout, deadline: seconds for one try; and for an answer, all tries and waits together.
        retries, concurrency: further tries after the first; calls under way at once.
        key_variable: the environment variable with the API key; servers without keys need none.
        options: of `Conversation`.

    Raises:
        ValueError: the address carries a user, a password or a query (those get into logs), the
            key holds characters that no key has, or a number is out of its range.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        name: str | None = None,
        revision: str | None = None,
        timeout: float = 60.0,
        deadline: float = 600.0,
        retries: int = 5,
        concurrency: int = 8,
        key_variable: str = "OPENAI_API_KEY",
        **options,
    ):
        super().__init__(**options)
        address, key = urlsplit(base_url), _read_key(key_variable)
        if address.username or address.password or address.query:
            raise ValueError(
                f"the address of VLM {model!r} must not carry secrets; put its key into the "
                f"environment variable {key_variable}"
            )
        seconds = [("timeout", timeout, 0.01), ("deadline", deadline, 0.01)]
        counts = [("retries", retries, 0), ("concurrency", concurrency, 1)]
        for option, value, least in seconds + counts:
            if not least <= value < math.inf:
                raise ValueError(f"{option} must be {least} or more and finite, not {value}")
        self.base_url, self.model, self.concurrency = base_url, model, concurrency
        self.name, self.revision = name or model, revision
        self.timeout, self.deadline, self.retries = timeout, deadline, retries
        self._refused: set[str] = set()  # parameters that the server's API does not have
        self._client = httpx2.Client(
            # Unpacked, so that bytes can be counted.
            headers={"Accept-Encoding": "identity", "Authorization": f"Bearer {key or 'none'}"},
            trust_env=address.hostname not in LOOPBACK,
            limits=httpx2.Limits(max_keepalive_connections=0),  # each call has its own connection
        )
        for logger in list(logging.root.manager.loggerDict):  # they write what servers say
            if logger.startswith(("httpx2", "httpcore2")):
                logging.getLogger(logger).addFilter(_redact)  # twice is once

    def __repr__(self) -> str:
        return f"RemoteVLM({self.base_url!r}, {self.model!r})"

    def describe(self) -> dict:
        """Everything that is known here and decides its answers, JSON-able."""
        return {"name": self.name, "revision": self.revision, "served": True} | self.described()

    def __call__(
        self, images: Sequence[Image.Image], question: str, choices: Sequence[str] = ()
    ) -> list[str]:
        """One answer per image; a constrained one is "none" or a list of `choices`.

        `VLMError`, of one line: there is none for some of them, after all tries.
        """
        choices = offered(choices) if self.takes_choices else []

        def outcome(image: Image.Image) -> tuple[str | None, str | None]:
            """The answer, or why there is none, so that the other images get theirs."""
            try:
                answer = answer_in(self._reply(self.messages(image, question, _png), choices))
                return redacted(listed(answer, choices) if choices else answer), None
            except (VLMError, httpx2.HTTPError) as error:
                return None, one_line(error)

        with ThreadPoolExecutor(self.concurrency) as pool:
            outcomes = list(pool.map(outcome, images))
        answers, failures = [answer for answer, _ in outcomes], [why for _, why in outcomes]
        if wrong := list(filter(None, failures)):
            said = f"VLM {self.name!r} at {self.base_url} gave no answer about {len(wrong)} of "
            raise VLMError(f"{said}{len(images)} images: {wrong[0]}", answers, failures)
        return answers

    def _reply(self, messages: list[dict], choices: Sequence[str]) -> bytes:
        """The body of the server's reply, after as many tries as it takes."""
        end = time.monotonic() + self.deadline
        for attempt in itertools.count():
            asked = self._asked(choices)
            seconds = min(self.timeout, max(end - time.monotonic(), 0.001))
            try:
                status, headers, body = self._post(asked | {"messages": messages}, seconds)
            except httpx2.TransportError as error:
                status, headers, body = 599, {}, f"{type(error).__name__}: {error}".encode()
            if 200 <= status < 300:
                return body
            said = headers.get("location", "") + body.decode(errors="replace")
            if status in (400, 422) and UNSUPPORTED.search(said):
                others = {name for name in OTHERWISE if name in asked and name in said}
                if "temperature" in others - self._refused:
                    warnings.warn(f"VLM {self.name!r} takes no temperature", stacklevel=2)
                self._refused |= others
                if others:
                    continue
            wait, again = _wait(headers, attempt), status in (408, 409, 429) or status >= 500
            if not again or attempt >= self.retries or time.monotonic() + wait > end:
                raise VLMError(one_line(f"status {status}: {said}" if status != 599 else said))
            time.sleep(wait)
        raise AssertionError

    def _asked(self, choices: Sequence[str]) -> dict:
        limit = "max_completion_tokens" if "max_tokens" in self._refused else "max_tokens"
        asked = {"model": self.model, limit: self.max_new_tokens}
        asked |= {"temperature": 0} if "temperature" not in self._refused else {}
        if choices:
            items = {"type": "array", "items": {"enum": list(choices)}}
            schema = {"type": "object", "properties": {"seen": items}, "required": ["seen"]}
            named = {"name": "seen", "schema": schema | {"additionalProperties": False}}
            asked["response_format"] = {"type": "json_schema", "json_schema": named}
        return asked

    def _post(self, body: dict, seconds: float) -> tuple[int, Mapping[str, str], bytes]:
        """Status, headers and the whole body.

        HTTP clients limit the time between two bytes and not that of a call, so a timer shuts the
        connection down, which the call knows by its trace.
        """
        sockets, over = [], threading.Event()

        def end() -> None:
            over.set()
            for connection in list(sockets):
                with suppress(OSError):  # closed by now, or wrapped by TLS into another
                    connection.shutdown(socket.SHUT_RDWR)

        def trace(event: str, info: dict) -> None:
            """httpcore's: the results of its `connect_tcp` and `start_tls` are streams."""
            if hasattr(stream := info.get("return_value"), "get_extra_info"):
                sockets.append(stream.get_extra_info("socket"))
                if over.is_set():
                    end()

        timer = threading.Timer(seconds, end)
        timer.daemon = True
        timer.start()
        call = {"json": body, "timeout": seconds, "extensions": {"trace": trace}}
        late, whole = httpx2.ReadTimeout("the call timed out"), bytearray()
        url = f"{self.base_url.rstrip('/')}/chat/completions"
        try:
            with self._client.stream("POST", url, **call) as response:
                for chunk in response.iter_raw():
                    whole += chunk
                    if len(whole) > REPLY_LIMIT:
                        raise VLMError(f"the server's reply is longer than {REPLY_LIMIT:,} bytes")
        except httpx2.TransportError as error:
            raise (late if over.is_set() else error) from error
        finally:
            timer.cancel()
        if over.is_set():  # what a server without a content length sent so far looks whole
            raise late
        return response.status_code, response.headers, bytes(whole)


def _wait(headers: Mapping[str, str], attempt: int) -> float:
    """Seconds until the next try: what the server says, else ever longer ones."""
    for name, unit in (("retry-after-ms", 1000), ("retry-after", 1)):
        with suppress(KeyError, ValueError):
            return max(0.0, float(headers[name]) / unit)
    return min(0.5 * 2.0 ** min(attempt, 8), 8.0)


def answer_in(reply: bytes) -> str:
    """The answer in the body of a server's reply, a chat completion in JSON; else a `VLMError`."""
    try:
        choice = json.loads(reply)["choices"][0]
        message, ended = choice["message"], choice.get("finish_reason")
        answer = message.get("content")
    # RecursionError: JSON that is nested too deeply
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        seen = one_line(reply.decode(errors="replace"))
        raise VLMError(f"the server's reply is no chat completion: {seen}") from None
    if isinstance(answer, list) and all(isinstance(part, dict) for part in answer):
        answer = "".join(str(part.get("text") or "") for part in answer)
    if ended == "length":
        raise VLMError("the answer is cut off; max_new_tokens makes room for more")
    if answer is None or ended == "content_filter" or not str(answer).strip():
        thought = " after a thought" if message.get("reasoning_content") else ""
        raise VLMError(f"the answer is empty{thought} (it ended by {one_line(repr(ended))})")
    if not isinstance(answer, str):
        raise VLMError(f"the answer is no text: {one_line(repr(answer))}")
    *_, last = [None, *THOUGHT.finditer(answer)]
    if last and not (last[1] and answer[last.end() :].strip()):
        raise VLMError(f"the answer is a thought without an end: {one_line(answer)}")
    return answer[last.end() :].strip() if last else answer


def listed(answer: str, choices: Sequence[str]) -> str:
    """The terms of a JSON answer that fits the schema, with commas, or "none"; else `VLMError`."""
    with suppress(ValueError, TypeError, AttributeError, RecursionError):
        ((key, seen),) = json.loads(answer).items()
        if key == "seen" and isinstance(seen, list) and set(seen) <= set(choices):
            return ", ".join(dict.fromkeys(seen)) or NONE
    raise VLMError(f"the answer does not fit the JSON schema: {one_line(answer)}")


def redacted(text: str) -> str:
    """The text without any key, which some servers repeat."""
    for key in _secrets:
        text = text.replace(key, "[key]")
    return text


def one_line(said: Exception | str) -> str:
    """What it says, on one line and without keys, at most 300 characters."""
    return " ".join(redacted(str(said)).split())[:300] or "nothing"


def _read_key(variable: str) -> str:
    key = os.environ.get(variable, "").strip()
    if not all("!" <= character <= "~" for character in key):
        raise ValueError(f"the key in {variable} holds a character that no key has; set it again")
    if len(key) >= SHORTEST_SECRET:
        _secrets.update({key, json.dumps(key)[1:-1]})
    return key


def _redact(record: logging.LogRecord) -> bool:
    said = record.getMessage()
    if (unsaid := redacted(said)) != said:
        record.msg, record.args = unsaid, ()
    return True


def _png(image: Image.Image) -> dict:
    """An image as an OpenAI-compatible server takes it."""
    image.save(buffer := io.BytesIO(), "PNG")
    url = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    return {"type": "image_url", "image_url": {"url": url}}
