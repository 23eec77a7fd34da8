"""RemoteVLM against servers that do what no server should, byte by byte, on loopback."""

import gzip
import json
import logging
import socket
import threading
import time
from contextlib import contextmanager, suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import vldnp
from vldnp.models.vlm import VLMError
from vldnp.models.vlm_server import REPLY_LIMIT, answer_in, redacted

KEY = "sk-this-must-not-be-seen-4711"


@contextmanager
def replying(*scripts):
    """A server whose n-th connection is handled by the n-th script, the last one again and again.

    A script is the bytes of a reply, or a function of the connection. Yields its address and the
    heads of the requests that it got.
    """
    listening = socket.create_server(("127.0.0.1", 0))
    heads, ended = [], threading.Event()

    def handle(connection, script):
        with connection, suppress(OSError):
            connection.settimeout(60)
            head = b""
            while b"\r\n\r\n" not in head:
                head += connection.recv(1 << 16)
            heads.append(head.decode())
            (length,) = [
                int(line.split(":")[1])
                for line in heads[-1].split("\r\n")
                if line.lower().startswith("content-length")
            ]
            length -= len(head.split(b"\r\n\r\n", 1)[1])
            while length > 0:
                length -= len(connection.recv(1 << 16))
            if callable(script):
                script(connection, ended)
            else:
                connection.sendall(script)
            connection.shutdown(socket.SHUT_RDWR)

    def accept():
        for number in range(1000):
            try:
                connection, _ = listening.accept()
            except OSError:
                return
            script = scripts[min(number, len(scripts) - 1)]
            threading.Thread(target=handle, args=(connection, script), daemon=True).start()

    thread = threading.Thread(target=accept, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}/v1", heads
    finally:
        ended.set()
        listening.shutdown(socket.SHUT_RDWR)
        listening.close()
        thread.join()


def http(body, status="200 OK", **headers):
    body = body.encode() if isinstance(body, str) else body
    headers = {"content-type": "application/json", "content-length": len(body)} | headers
    lines = "".join(f"{k.replace('_', '-')}: {v}\r\n" for k, v in headers.items())
    return f"HTTP/1.1 {status}\r\n{lines}\r\n".encode() + body


def completion(content, **choice):
    choice = {"index": 0, "message": {"content": content}, "finish_reason": "stop"} | choice
    return json.dumps({"id": "1", "object": "chat.completion", "choices": [choice]})


GOOD = http(completion("a knife"))


def asked(address, count=1, **options):
    options = {"model": "m", "retries": 0, "concurrency": 1} | options
    return vldnp.load_vlm(address, **options)([Image.new("RGB", (8, 8))] * count, "?")


def refused(address, **options):
    with pytest.raises(VLMError) as error:
        asked(address, **options)
    assert "\n" not in str(error.value) and len(str(error.value)) < 500
    return str(error.value)


MALFORMED = {
    "empty": http(""),
    "html": http("<html><body>Gateway</body></html>", content_type="text/html"),
    "html called json": http("<html>"),
    "a number": http("5"),
    "a list": http("[]"),
    "null": http("null"),
    "no choices": http('{"choices": []}'),
    "choices are a text": http('{"choices": "knife"}'),
    "a choice is null": http('{"choices": [null]}'),
    "no message": http('{"choices": [{}]}'),
    "message is a text": http('{"choices": [{"message": "knife"}]}'),
    "content is a number": http(completion(5)),
    "content is a list": http(completion(["a knife"])),
    "cut off by the limit": http(completion("a knife, a", finish_reason="length")),
    "an open thought": http(completion("<think>a knife? No, it is none")),
    "a thought alone": http(completion("<think>none</think>\n")),
    "another mark": http(completion("◁think▷ none")),
    "thinking parts": http(completion([{"type": "thinking", "thinking": "none"}])),
    "content is an object": http(completion({"seen": "a knife"})),
    "content is a boolean": http(completion(True)),
    "nested": http("[" * 100_000),
    "not UTF-8": http(b'{"choices": "\xff\xfe"}'),
    "an error as a list": http("[5]", status="400 Bad"),
    "an error as a text": http('{"error": 5}', status="403 No"),
    "an error in HTML": http("<html>", status="404 Not Found", content_type="text/html"),
    "cut off": GOOD[:-5],
    "no HTTP": b"hello\r\n\r\n",
    "packed": http(gzip.compress(completion("a knife").encode()), content_encoding="gzip"),
    "a strange status": http("", status="304 Not Modified"),
}


@pytest.mark.parametrize("bad", MALFORMED.values(), ids=MALFORMED)
def test_a_malformed_reply_costs_no_other_images_answer(bad):
    with replying(GOOD, bad, GOOD) as (address, _):
        with pytest.raises(VLMError, match="no answer about 1 of 3 images: .") as error:
            asked(address, count=3)
    assert error.value.answers == ["a knife", None, "a knife"]
    assert "\n" not in str(error.value) and len(str(error.value)) < 500


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)


@given(st.binary() | json_values.map(lambda value: json.dumps(value).encode()))
def test_any_bytes_are_no_completion_and_one_line(reply):
    with pytest.raises(VLMError) as error:
        answer_in(reply)
    assert len(str(error.value).splitlines()) == 1


@given(st.text() | json_values, json_values)
def test_only_a_text_is_an_answer(content, ended):
    reply = completion(content, finish_reason=ended).encode()
    text = content.strip() if isinstance(content, str) else ""
    if text and ended not in ("content_filter", "length") and "think" not in text:
        assert answer_in(reply) == content
    else:
        with pytest.raises(VLMError, match="the answer is (empty|no text|cut off)"):
            answer_in(reply)


@pytest.mark.parametrize(
    ("content", "answer"),
    [
        ("<think>a knife?</think>\n\nnone", "none"),
        ("a knife? no</think> none", "none"),
        ("[THINK]a[/THINK]b<thinking>c</thinking>a knife", "a knife"),
        ([{"type": "text", "text": "a "}, {"type": "text", "text": "knife"}], "a knife"),
        ([{"type": "thinking", "thinking": "no"}, {"type": "text", "text": "a knife"}], "a knife"),
    ],
)
def test_what_is_read_of_other_shapes(content, answer):
    assert answer_in(completion(content).encode()) == answer


def test_a_text_that_landed_beside_the_content_is_no_answer():
    message = {"content": "", "reasoning_content": "I see a knife"}
    with pytest.raises(VLMError, match="empty after a thought"):
        answer_in(completion("", message=message).encode())


def test_a_reply_without_end_is_cut_off():
    """What the server got rid of is little more than the limit: socket buffers are a few MB."""
    sent = []

    def endless(connection, ended):
        connection.sendall(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n\r\n")
        while len(sent) < 1000 and not ended.is_set():
            connection.sendall(b" " * 100_000)
            sent.append(100_000)

    with replying(endless) as (address, heads):
        assert f"longer than {REPLY_LIMIT:,} bytes" in refused(address, retries=3)
        assert len(heads) == 1  # and is not asked for again
    assert sum(sent) < 20_000_000


def test_a_packed_reply_is_not_unpacked():
    """A thousandth of what it unpacks to; unpacking it would take the memory."""
    bomb = http(gzip.compress(b" " * 200_000_000), content_encoding="gzip")
    assert len(bomb) < REPLY_LIMIT
    with replying(bomb) as (address, heads):
        assert "is no chat completion" in refused(address)
    assert "accept-encoding: identity" in heads[0].lower()


def drip(before, after, every):
    """A reply that takes for ever, though a byte comes again and again."""

    def script(connection, ended):
        connection.sendall(before)
        while not ended.wait(every):
            connection.sendall(after)

    return script


@pytest.mark.parametrize(
    "script",
    [
        drip(b"HTTP/1.1 200 OK\r\ncontent-length: 1000\r\n\r\n", b" ", 0.05),
        drip(b"HTTP/1.1 200 OK\r\n\r\n", b" ", 0.05),
        drip(b"HTTP/1.1 200 OK\r\n", b"x-more: 1\r\n", 0.05),
        drip(b"", b"", 60),
    ],
    ids=["body", "body without a length", "head", "nothing"],
)
def test_a_call_has_a_deadline_however_the_reply_drips_in(script):
    with replying(script, GOOD) as (address, _):
        assert "timed out" in refused(address, timeout=0.5)
    with replying(script, GOOD) as (address, heads):
        assert asked(address, timeout=0.5, retries=1) == ["a knife"]
        assert len(heads) == 2


def test_redirections_are_not_followed():
    with replying(GOOD) as (elsewhere, seen):
        with replying(http("", status="307 Moved", location=elsewhere)) as (address, _):
            assert f"status 307: {elsewhere}" in refused(address)
    assert seen == []


@pytest.mark.parametrize("name", ["127.0.0.1", "localhost"])
def test_proxies_do_not_apply_to_this_machine(name, monkeypatch):
    for variable in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(variable, "http://127.0.0.1:9")
    for variable in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(variable, raising=False)
    with replying(GOOD) as (address, _):
        assert asked(address.replace("127.0.0.1", name)) == ["a knife"]


def test_proxies_apply_to_other_machines(monkeypatch):
    with replying(GOOD) as (proxy, heads):
        monkeypatch.setenv("http_proxy", proxy.removesuffix("/v1"))
        monkeypatch.delenv("no_proxy", raising=False)
        assert asked("http://vlm.invalid/v1") == ["a knife"]
    assert heads[0].startswith("POST http://vlm.invalid/v1/chat/completions")


def test_the_key_is_stripped_and_in_no_message_or_log(monkeypatch, caplog, capsys):
    monkeypatch.setenv("OPENAI_API_KEY", f"  {KEY}\n")
    caplog.set_level(logging.DEBUG)
    replies = [
        http(f'{{"error": {{"message": "wrong key {KEY}"}}}}', status="401 No", x_seen=KEY),
        http(f"<html>{KEY}"),
        http("", status="307 Moved", location=f"http://127.0.0.1:9/{KEY}"),
        http("", status=f"403 {KEY}"),
        http(completion(KEY, finish_reason="content_filter")),
        http(completion([KEY])),
        http(completion(None, finish_reason=KEY)),
        http("x" * (300 - len(KEY) + 1) + KEY),  # cut after it is redacted, not before
        http("x" * (293 - len(KEY)) + KEY, status="400 No"),
    ]
    said = []
    for bad in replies:
        with replying(bad) as (address, heads):
            vlm = vldnp.load_vlm(address, model="m", retries=0)
            monkeypatch.setenv("OPENAI_API_KEY", "another")  # the one that was read is meant
            with pytest.raises(VLMError) as error:
                vlm([Image.new("RGB", (8, 8))], "?")
            monkeypatch.setenv("OPENAI_API_KEY", f"  {KEY}\n")
        assert f"Bearer {KEY}\r\n" in heads[0]
        said += [str(error.value), repr(error.value), repr(vlm), str(vars(vlm))]
    assert any("[key]" in text for text in said)
    assert caplog.records  # that much is logged at all
    assert KEY[:12] not in "".join(said) + caplog.text + "".join(capsys.readouterr())
    assert redacted(f"a {KEY}") == "a [key]"


def test_an_answer_with_the_key_in_it_is_recorded_without(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with replying(http(completion(f"a knife, {KEY}"))) as (address, _):
        assert asked(address) == ["a knife, [key]"]


def test_a_word_instead_of_a_key_is_no_secret(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "knife")
    with replying(GOOD) as (address, _):
        assert asked(address) == ["a knife"]


@pytest.mark.parametrize("key", ["sk-4711 sk-4712", "sk-47\r\nX: 11", "schlüssel"])
def test_what_cannot_be_a_key_is_refused_without_being_shown(key, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with pytest.raises(ValueError, match="the key in OPENAI_API_KEY holds a char") as error:
        vldnp.load_vlm("http://127.0.0.1:9/v1", model="m")
    assert key not in str(error.value)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"timeout": 0}, "timeout must be 0.01 or more and finite, not 0"),
        ({"timeout": float("nan")}, "timeout must be"),
        ({"retries": -1}, "retries must be 0 or more and finite, not -1"),
        ({"deadline": 0}, "deadline must be"),
    ],
)
def test_numbers_out_of_range(wrong, message):
    with pytest.raises(ValueError, match=message):
        vldnp.load_vlm("http://127.0.0.1:9/v1", model="m", **wrong)


def test_no_server_at_all():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    assert "no answer about 1 of 1 images: ConnectError" in refused(address)


def test_threads_end():
    """No watchdog is left behind."""
    with replying(GOOD) as (address, _):
        asked(address, count=3)
    for _ in range(100):
        if not any(isinstance(thread, threading.Timer) for thread in threading.enumerate()):
            return
        time.sleep(0.05)
    raise AssertionError("a watchdog still runs")
