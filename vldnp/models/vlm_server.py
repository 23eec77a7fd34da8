"""VLMs behind a server: nothing that a server sends back can cost more than its own image.

A reply may be anything: no JSON, endless, dripping in byte by byte, a redirection, a repetition of
the key. All of that is one `VLMError` about the image that was asked about.
"""

import base64
import io
import ipaddress
import json
import logging
import math
import os
import socket
import threading
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from itertools import repeat
from urllib.parse import urlsplit

import httpx2
import openai
from PIL import Image

from vldnp.models import reading
from vldnp.models.conversation import (
    Demonstrations,
    check_edge,
    described,
    opened,
    shots,
    shrunk,
    turns,
)
from vldnp.models.vlm import VLMError, way_of_answering

REPLY_LIMIT = 1_000_000
"""A reply of more bytes is cut off; an answer of 64 tokens takes about one thousand."""

SHORTEST_SECRET = 8
"""A shorter key is a word such as "EMPTY", which servers without keys are given: no secret."""

LOGGERS = ("openai", "httpx2", "httpcore2")

_secrets: set[str] = set()
"""All keys that were read."""


class RemoteVLM:
    """A VLM behind an OpenAI-compatible server: vLLM, `transformers serve`, llama.cpp, and others.

    Pictures are asked about concurrently, with temperature 0. A call that meets no server, a
    time-out, or a status 408, 409, 429 or 5xx is tried again after 0.5, 1, 2, 4, 8, 8, … seconds.
    Redirections are not followed, so that pictures go nowhere else. The environment's proxies are
    used, but not for this machine's own addresses.

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
            with the terms of the concept set that is asked about. Or `read`: nothing is written;
            the log-probabilities of the first token, which the server must return
            (`top_logprobs`), say which `choices` are seen (see `vldnp.models.reading`).
        threshold: as for `TransformersVLM`.
        timeout: seconds for one try, from connecting to the last byte of the reply.
        retries: further tries after the first.
        concurrency: calls under way at once.
        key_variable: the environment variable with the API key; servers without keys need none.
            The key is kept out of answers, errors, logs, `repr` and records.

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
        max_new_tokens: int = 64,
        max_edge: int | None = None,
        demonstrations: Demonstrations = (),
        choices: Sequence[str] = (),
        answers: str = "free",
        threshold: float = reading.THRESHOLD,
        timeout: float = 60.0,
        retries: int = 5,
        concurrency: int = 8,
        key_variable: str = "OPENAI_API_KEY",
    ):
        address = urlsplit(base_url)
        if address.username or address.password or address.query:
            raise ValueError(
                f"the address of VLM {model!r} must not carry secrets; put its key into the "
                f"environment variable {key_variable}"
            )
        if concurrency < 1:
            raise ValueError(f"concurrency must be 1 or more, not {concurrency}")
        if retries < 0:
            raise ValueError(f"retries must be 0 or more, not {retries}")
        if not (math.isfinite(timeout) and timeout > 0):
            raise ValueError(f"timeout must be a finite number of seconds, not {timeout}")
        check_edge(max_edge)
        self.base_url, self.model = base_url, model
        self.name, self.revision = name or model, revision
        self.max_new_tokens, self.max_edge = max_new_tokens, max_edge
        self.demonstrations, self.choices = opened(demonstrations), tuple(choices)
        self.concurrency = concurrency
        self._way = way_of_answering(answers, threshold)
        self.takes_choices, self.threshold = bool(self._way), threshold
        self._reads = self._way.get("answers") == "read"
        self._constrained = not self._reads and bool(self.choices or self._way)
        self._client = openai.OpenAI(
            base_url=base_url,
            api_key=_read_key(key_variable) or "none",  # the client insists on some key
            timeout=timeout,
            max_retries=retries,
            http_client=_Client(timeout, trust_env=not _is_loopback(address.hostname)),
        )
        _keep_secrets_out_of_logs()

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
            "demonstrations": described(self.demonstrations),
            "choices": list(self.choices),
            **self._way,
        }

    def __call__(
        self, images: Sequence[Image.Image], question: str, choices: Sequence[str] = ()
    ) -> list[str]:
        """One answer per picture; `choices` go before those of the constructor.

        Raises:
            VLMError: there is none for some of them, after all tries; one line.
            ValueError: two choices begin alike, if they are read.
        """
        if self._reads:
            reading.first_words(choices or self.choices)
        before = shots(self.demonstrations, question, self.max_edge)
        with ThreadPoolExecutor(self.concurrency) as pool:
            conversations = [
                [_sendable(t) for t in before + turns(shrunk(image, self.max_edge), question)]
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
        constrained = self._constrained and bool(choices)
        try:
            reply = self._client.chat.completions.with_raw_response.create(
                model=self.model,
                messages=conversation,
                temperature=0,
                max_tokens=1 if self._reads else self.max_new_tokens,
                **({"response_format": _answer_format(choices)} if constrained else {}),
                **({"logprobs": True, "top_logprobs": reading.TOP} if self._reads else {}),
            )
            if self._reads:
                top = reading.top_logprobs(reply.content)
                seen = reading.served_probabilities(top, choices)
                return reading.said(seen, choices, self.threshold)
            return redacted(answer_in(reply.content))
        except VLMError as error:
            return error
        except ValueError as error:  # what cannot be read
            return VLMError(one_line(error))
        except (openai.BadRequestError, openai.UnprocessableEntityError) as error:
            if not constrained:
                return VLMError(one_line(error))
            if self._constrained:
                self._constrained = False
                warnings.warn(
                    f"VLM {self.name!r} is asked without constraints: its server refuses "
                    f"structured output ({one_line(error)})",
                    stacklevel=2,
                )
            return self._answer(conversation, choices)
        except (openai.OpenAIError, httpx2.HTTPError) as error:
            return VLMError(one_line(error))


def answer_in(reply: bytes) -> str:
    """The answer in the body of a server's reply, a chat completion in JSON.

    Raises:
        VLMError: it is no such thing, or holds no text; one line.
    """
    try:
        choice = json.loads(reply)["choices"][0]
        answer, ended = choice["message"].get("content"), choice.get("finish_reason")
    # RecursionError: JSON that is nested too deeply
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        seen = one_line(reply[:300].decode(errors="replace"))
        raise VLMError(f"the server's reply is no chat completion: {seen}") from None
    # No answer must not pass for the answer that nothing is to be seen.
    if answer is None or ended == "content_filter" or (not answer and ended == "length"):
        raise VLMError(f"the answer is empty (it ended by {one_line(repr(ended))})")
    if not isinstance(answer, str):
        raise VLMError(f"the answer is no text: {one_line(repr(answer))}")
    return answer


def redacted(text: str) -> str:
    """The text without any key, which some servers repeat."""
    for key in _secrets:
        text = text.replace(key, "[key]")
    return text


def one_line(said: Exception | str) -> str:
    """The first line of it that says something, without keys, at most 300 characters."""
    lines = (line.strip() for line in redacted(str(said)).splitlines())
    return next(filter(None, lines), "nothing")[:300]


class _Client(httpx2.Client):
    """Whole replies only: of at most `REPLY_LIMIT` bytes, within `seconds`, from this address.

    HTTP clients limit the time between two bytes and not the time of a call, so a watchdog shuts
    the connection down. Every call has a connection of its own, which it knows by its trace.
    """

    def __init__(self, seconds: float, **options):
        super().__init__(
            timeout=seconds,
            follow_redirects=False,
            limits=httpx2.Limits(max_keepalive_connections=0),
            **options,
        )
        self._seconds = seconds

    def send(self, request: httpx2.Request, **options) -> httpx2.Response:
        """The reply, read to its end.

        Raises:
            httpx2.HTTPError: no reply, or none in time.
            VLMError: one that is not accepted.
        """
        request.headers["Accept-Encoding"] = "identity"  # so bytes counted are bytes unpacked
        watchdog = _Watchdog(self._seconds)
        request.extensions["trace"] = watchdog.trace
        with closing(watchdog):
            try:
                with closing(super().send(request, **options | {"stream": True})) as response:
                    body = _whole(response)
            except httpx2.TransportError as error:
                if not watchdog.bit:
                    raise
                raise httpx2.ReadTimeout("the call took too long", request=request) from error
            if watchdog.bit:  # what a server without a content length sent so far looks whole
                raise httpx2.ReadTimeout("the call took too long", request=request)
        untrue = ("content-encoding", "content-length", "transfer-encoding")
        headers = [(k, v) for k, v in response.headers.multi_items() if k.lower() not in untrue]
        return httpx2.Response(response.status_code, headers=headers, content=body, request=request)


class _Watchdog:
    """Shuts the connections of a call down when its time is over."""

    def __init__(self, seconds: float):
        self.bit, self._sockets, self._lock = False, [], threading.Lock()
        self._timer = threading.Timer(seconds, self._bite)
        self._timer.daemon = True
        self._timer.start()

    def trace(self, event: str, info: dict) -> None:
        """httpcore's trace: the results of its `connect_tcp` and `start_tls` are streams."""
        stream = info.get("return_value")
        if hasattr(stream, "get_extra_info"):
            with self._lock:
                self._sockets.append(stream.get_extra_info("socket"))
            if self.bit:
                self._bite()

    def _bite(self) -> None:
        self.bit = True
        with self._lock:
            for connection in self._sockets:
                with suppress(OSError):  # closed by now, or wrapped by TLS into another
                    connection.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._timer.cancel()


def _whole(response: httpx2.Response) -> bytes:
    if response.has_redirect_location:
        raise VLMError(
            f"the server redirects to {one_line(response.headers['Location'])}, and redirections "
            "are not followed; give that address if it is the right one"
        )
    body = bytearray()
    for chunk in response.iter_raw():
        body += chunk
        if len(body) > REPLY_LIMIT:
            raise VLMError(f"the server's reply is longer than {REPLY_LIMIT:,} bytes")
    return bytes(body)


def _is_loopback(host: str | None) -> bool:
    """Whether the address is this machine's own, to which no proxy is the way."""
    try:
        address = ipaddress.ip_address(host or "")
    except ValueError:
        return host is not None and (host == "localhost" or host.endswith(".localhost"))
    return address.is_loopback or address.is_unspecified


def _read_key(variable: str) -> str:
    key = os.environ.get(variable, "").strip()
    if not all("!" <= character <= "~" for character in key):
        raise ValueError(
            f"the key in {variable} holds a blank, a line break or another character that no key "
            "has; set it again"
        )
    if len(key) >= SHORTEST_SECRET:
        _secrets.add(key)
    return key


def _keep_secrets_out_of_logs() -> None:
    """The HTTP client's loggers write what servers say, among other things, at level DEBUG."""
    for name in list(logging.root.manager.loggerDict):
        if name.split(".")[0] in LOGGERS:
            logging.getLogger(name).addFilter(_redact)  # twice is once


def _redact(record: logging.LogRecord) -> bool:
    said = record.getMessage()
    if (unsaid := redacted(said)) != said:
        record.msg, record.args = unsaid, ()
    return True


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
