"""RemoteVLM against a real `transformers serve`, and against servers that do what none should."""

import base64
import gzip
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from tiny import sd_pipeline

import vldnp
from vldnp.models.vlm import VLMError, ask
from vldnp.models.vlm_server import REPLY_LIMIT, answer_in

KEY = "sk-this-must-not-be-seen-4711"
MODELS, SERVED = Path(__file__).parents[2] / "data" / "models", "moji-vlm-s"


@contextmanager
def serving(script):
    """Each request is handled by `script(number, body)`, which gives the bytes of a reply, or a
    function of (connection, ended). Yields the address, and (head, body) of the requests."""
    listening = socket.create_server(("127.0.0.1", 0))
    requests, ended, lock = [], threading.Event(), threading.Lock()

    def handle(connection):
        with connection, suppress(OSError):
            connection.settimeout(60)
            data = b""
            while b"\r\n\r\n" not in data:
                data += connection.recv(1 << 16)
            head, _, body = data.partition(b"\r\n\r\n")
            length = int(re.search(rb"(?i)content-length: (\d+)", head)[1])
            while len(body) < length:
                body += connection.recv(1 << 16)
            with lock:
                requests.append((head.decode(), json.loads(body)))
                number = len(requests) - 1
            reply = script(number, requests[number][1])
            reply(connection, ended) if callable(reply) else connection.sendall(reply)
            connection.shutdown(socket.SHUT_RDWR)

    def accept():
        with suppress(OSError):
            while True:
                args = listening.accept()[:1]
                threading.Thread(target=handle, args=args, daemon=True).start()

    thread = threading.Thread(target=accept, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}/v1", requests
    finally:
        ended.set()
        listening.shutdown(socket.SHUT_RDWR)
        listening.close()
        thread.join()


def in_turn(*replies):
    """A script: the n-th request gets the n-th reply, the last one again and again."""
    return lambda number, body: replies[min(number, len(replies) - 1)]


def http(body, status="200 OK", **headers):
    body = body.encode() if isinstance(body, str) else body
    headers = {"content-type": "application/json", "content-length": len(body)} | headers
    headers = {"retry-after": 0.001} | headers  # the usual waits are not what is tested
    lines = "".join(f"{k.replace('_', '-')}: {v}\r\n" for k, v in headers.items())
    return f"HTTP/1.1 {status}\r\n{lines}\r\n".encode() + body


def completion(content, **choice):
    choice = {"index": 0, "message": {"content": content}, "finish_reason": "stop"} | choice
    return json.dumps({"id": "1", "object": "chat.completion", "choices": [choice]})


def refusal(status, text, **headers):
    return http(json.dumps({"error": {"message": text}}), f"{status} No", **headers)


GOOD = http(completion("a knife"))


def grey(*shades):
    return [Image.new("RGB", (20, 10), (s, s, s)) for s in shades]


def shade(body):
    """The brightness of the last image in a request, which tells the images apart."""
    url = body["messages"][-1]["content"][0]["image_url"]["url"]
    with Image.open(io.BytesIO(base64.b64decode(url.split(",")[1]))) as image:
        return str(image.getpixel((0, 0))[0])


def asked(address, count=1, **options):
    options = {"model": "m", "retries": 0, "concurrency": 1} | options
    return vldnp.load_vlm(address, **options)(grey(*range(count)), "?")


def refused(address, **options):
    with pytest.raises(VLMError) as error:
        asked(address, **options)
    assert "\n" not in str(error.value) and len(str(error.value)) < 500
    return str(error.value)


def start(port):
    command = "from transformers.cli.transformers import app; app()"
    arguments = f"serve {SERVED} --host 127.0.0.1 --port {port} --device cpu --dtype float32"
    how = {"cwd": MODELS, "env": os.environ | {"HF_HUB_OFFLINE": "1"}}
    how |= dict.fromkeys(("stdout", "stderr"), subprocess.DEVNULL)
    return subprocess.Popen([sys.executable, "-c", command, *arguments.split()], **how)


def wait_until_ready(port, process, limit=300):
    for _ in range(int(limit / 0.2)):
        assert process.poll() is None, "the server ended by itself"
        with suppress(OSError):
            return urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
        time.sleep(0.2)
    raise AssertionError("the server did not start")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:the prompt")
def test_a_served_vlm_that_is_killed_and_restarted_in_the_middle_of_a_run():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    servers = [start(port)]
    blocks = np.random.default_rng(0).integers(0, 256, (5, 4, 4, 3), dtype="uint8")
    images = [Image.fromarray(b).resize((64, 64), Image.Resampling.BICUBIC) for b in blocks]
    try:
        local = vldnp.load_vlm(MODELS / SERVED, device="cpu", dtype=torch.float32, answers="free")
        options = {"model": SERVED, "retries": 60, "max_new_tokens": 32, "answers": "free"}
        remote = vldnp.load_vlm(f"http://127.0.0.1:{port}/v1", **options)
        model, prompts = sd_pipeline(), ["a cat", "a dog at the cove", "a knife"]

        def steps_with(vlm):
            method = vldnp.VLDNP(vlm, concepts="moji", omega=4, query_steps=[1, 3])
            settings = {"seeds": [0, 1, 2], "num_inference_steps": 4}
            return vldnp.denoise(model, prompts, method, **settings)

        steps, seen = list(steps_with(local)), []
        wait_until_ready(port, servers[0])
        assert remote(images, "What can be seen?") == local(images, "What can be seen?")
        for step in steps_with(remote):
            seen.append(step)
            if step.index == 1:
                servers[0].send_signal(signal.SIGKILL)
                servers[0].wait()
                servers.append(start(port))  # not waited for: the next query has to
        assert [step.vlm_answers for step in seen] == [step.vlm_answers for step in steps]
        torch.testing.assert_close(seen[-1].latents, steps[-1].latents)
    finally:
        for server in servers:
            server.kill()
            server.wait()


def test_answers_come_in_the_images_order_and_calls_overlap():
    together = threading.Barrier(4, timeout=60)

    def script(number, body):
        together.wait()  # four calls must be under way at once for any to be answered
        time.sleep(0.05 * (4 - number % 4))
        return http(completion(shade(body)))

    with serving(script) as (address, _):
        assert asked(address, 4, concurrency=4) == ["0", "1", "2", "3"]
        assert vldnp.load_vlm(address, model="m")([], "?") == []


def test_what_is_asked():
    with serving(in_turn(GOOD)) as (address, requests):
        options = {"max_edge": 10, "max_new_tokens": 7, "demonstrations": [(grey(9)[0], "a knife")]}
        vldnp.load_vlm(address, model="m", **options)(grey(200), "What?")
    body = requests[0][1]
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("m", 0, 7)
    assert [m["role"] for m in body["messages"]] == ["user", "assistant", "user"]
    assert body["messages"][1]["content"] == [{"type": "text", "text": "a knife"}]
    assert body["messages"][2]["content"][1] == {"type": "text", "text": "What?"}
    assert shade(body) == "200" and "response_format" not in body


def constrained(content, **options):
    """What is asked and answered where "knife" and "skull" are offered."""
    with serving(in_turn(http(completion(content)))) as (address, requests):
        vlm = vldnp.load_vlm(address, model="m", **options)
        found = ask(vlm, grey(1), "?", choices=["knife", "skull"])
    return requests[0][1], found


def test_answers_are_constrained_by_a_schema_and_come_as_a_list():
    for seen, answer in (([], "none"), (["skull", "knife", "skull"], "skull, knife")):
        body, found = constrained(json.dumps({"seen": seen}))
        schema, items = body["response_format"]["json_schema"]["schema"], ["knife", "skull"]
        assert schema["properties"]["seen"] == {"items": {"enum": items}, "type": "array"}
        assert schema["additionalProperties"] is False and found == [answer]
    body, found = constrained("A knife.", answers="free")
    assert "response_format" not in body and found == ["A knife."]


UNFIT = ["knife", "none", '["knife"]', '{"seen": ["dagger"]}', '{"seen": "knife"}', "{}"]
UNFIT += ['{"seen": [["knife"]]}', '{"seen": null}', '{"seen": [], "why": "x"}', '{"seen": ["kn']


@pytest.mark.parametrize("bad", UNFIT)
def test_a_reply_that_does_not_fit_the_schema_is_a_failure(bad):
    with pytest.raises(VLMError, match="does not fit the JSON schema") as error:
        constrained(bad)
    assert error.value.answers == [None] and "JSON schema" in error.value.failures[0]


@pytest.mark.parametrize("status", [400, 422])
def test_a_refusal_about_one_image_is_that_images_failure(status):
    small = refusal(status, "the image is below the least size; response_format is supported")

    def script(number, body):
        return small if shade(body) == "2" else http(completion('{"seen": ["knife"]}'))

    with serving(script) as (address, requests):
        vlm = vldnp.load_vlm(address, model="m", concurrency=1)
        with pytest.raises(VLMError, match="about 1 of 3 images: status 4") as error:
            vlm(grey(1, 2, 3), "?", choices=["knife"])
        assert error.value.answers == ["knife", None, "knife"]
        assert [bool(failure) for failure in error.value.failures] == [False, True, False]
        assert vlm(grey(4), "?", choices=["knife"]) == ["knife"]
    assert len(requests) == 4 and all("response_format" in body for _, body in requests)
    assert vlm.describe()["answers"] == "constrained"


def test_an_api_without_max_tokens_and_temperature_is_asked_otherwise_from_then_on():
    def script(number, body):
        if "max_tokens" in body:
            return refusal(400, "Unsupported parameter: 'max_tokens'. Use max_completion_tokens.")
        if "temperature" in body:
            return refusal(400, "'temperature' does not support 0 with this model.")
        return GOOD

    with serving(script) as (address, requests):
        vlm = vldnp.load_vlm(address, model="m", retries=0, max_new_tokens=7)
        with pytest.warns(UserWarning, match="'m' takes no temperature"):
            assert vlm(grey(1), "?") == ["a knife"]
        assert vlm(grey(2, 3), "?") == ["a knife"] * 2
    names = [body.keys() & {"max_tokens", "temperature"} for _, body in requests]
    assert names == [{"max_tokens", "temperature"}, {"temperature"}, set(), set(), set()]
    assert requests[-1][1]["max_completion_tokens"] == 7


MALFORMED = {
    "empty": http(""),
    "html": http("<html><body>Gateway</body></html>", content_type="text/html"),
    "no choices": http('{"choices": []}'),
    "a choice is null": http('{"choices": [null]}'),
    "message is a text": http('{"choices": [{"message": "knife"}]}'),
    "no content": http(completion(None)),
    "blank content": http(completion(" \n")),
    "filtered": http(completion("a", finish_reason="content_filter")),
    "beside the content": http(completion("", message={"content": "", "reasoning_content": "a"})),
    "cut off by the limit": http(completion("a knife, a", finish_reason="length")),
    "an open thought": http(completion("<think>a knife? No, it is none")),
    "a thought alone": http(completion("<think>none</think>\n")),
    "another mark": http(completion("◁think▷ none")),
    "a name before it": http(completion("<seed:think>a knife? none")),
    "a channel": http(completion("<|channel|>analysis<|message|>none")),
    "thinking parts": http(completion([{"type": "thinking", "thinking": "none"}])),
    "nested": http("[" * 100_000),
    "not UTF-8": http(b'{"choices": "\xff\xfe"}'),
    "an error in HTML": http("<html>", status="404 Not Found", content_type="text/html"),
    "cut off": GOOD[:-5],
    "no HTTP": b"hello\r\n\r\n",
    "packed": http(gzip.compress(completion("a knife").encode()), content_encoding="gzip"),
    "a strange status": http("", status="304 Not Modified"),
}


@pytest.mark.parametrize("bad", MALFORMED.values(), ids=MALFORMED)
def test_a_malformed_reply_costs_no_other_images_answer(bad):
    with serving(in_turn(GOOD, bad, GOOD)) as (address, _):
        with pytest.raises(VLMError, match="no answer about 1 of 3 images: .") as error:
            asked(address, count=3)
    assert error.value.answers == ["a knife", None, "a knife"]
    assert "\n" not in str(error.value) and len(str(error.value)) < 500


scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text()
json_values = st.recursive(scalars, lambda x: st.lists(x) | st.dictionaries(st.text(), x))


@given(st.binary(), st.text() | json_values, json_values)
def test_only_a_text_is_an_answer(junk, content, ended):
    for reply in (junk, json.dumps(content).encode()):
        with pytest.raises(VLMError, match="no chat completion"):
            answer_in(reply)
    reply = completion(content, finish_reason=ended).encode()
    text = content.strip() if isinstance(content, str) else ""
    if text and ended not in ("content_filter", "length") and "think" not in text:
        assert answer_in(reply) == content
    else:
        with pytest.raises(VLMError, match="the answer is (empty|no text|cut off)"):
            answer_in(reply)


def test_what_is_read_of_other_shapes():
    thoughts = "<think>a knife?</think>\n\n", "a knife? no</think> "
    for thought in (*thoughts, "[THINK]a[/THINK]b<thinking>c</thinking>"):
        assert answer_in(completion(f"{thought}none").encode()) == "none"


def test_a_reply_without_end_is_cut_off_and_a_packed_one_not_unpacked():
    """What the server got rid of is little more than the limit: socket buffers are a few MB."""
    sent, bomb = [], http(gzip.compress(b" " * 200_000_000), content_encoding="gzip")

    def endless(connection, ended):
        connection.sendall(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n\r\n")
        while len(sent) < 1000 and not ended.is_set():
            connection.sendall(b" " * 100_000)
            sent.append(100_000)

    with serving(in_turn(endless)) as (address, requests):
        assert f"longer than {REPLY_LIMIT:,} bytes" in refused(address, retries=3)
        assert len(requests) == 1  # and is not asked for again
    assert sum(sent) < 20_000_000 and len(bomb) < REPLY_LIMIT
    with serving(in_turn(bomb)) as (address, requests):
        assert "is no chat completion" in refused(address)
    assert "accept-encoding: identity" in requests[0][0].lower()


def drip(before, after, every):
    def script(connection, ended):
        connection.sendall(before)
        while not ended.wait(every):
            connection.sendall(after)

    return script


SLOW = {
    "body": drip(b"HTTP/1.1 200 OK\r\ncontent-length: 1000\r\n\r\n", b" ", 0.05),
    "body without a length": drip(b"HTTP/1.1 200 OK\r\n\r\n", b" ", 0.05),
    "head": drip(b"HTTP/1.1 200 OK\r\n", b"x-more: 1\r\n", 0.05),
    "nothing": drip(b"", b"", 60),
}


@pytest.mark.parametrize("script", SLOW.values(), ids=SLOW)
def test_a_call_has_a_deadline_however_the_reply_drips_in(script):
    with serving(in_turn(script, script, GOOD)) as (address, requests):
        assert "timed out" in refused(address, timeout=0.5)
        assert asked(address, timeout=0.5, retries=1) == ["a knife"] and len(requests) == 3


def test_retries_are_bounded_and_the_error_is_one_line():
    def script(number, body):
        return refusal(503, "overloaded\nand more") if shade(body) == "2" else GOOD

    with serving(script) as (address, requests):
        said = refused(address, count=3, retries=2)
    assert "about 1 of 3 images: status 503" in said and len(requests) == 2 + 3


def test_what_a_server_asks_to_wait_stays_within_the_deadline():
    tried = []

    def script(number, body):
        tried.append(time.monotonic())
        return refusal(429, "later", **{"retry-after": 3600 if number == 0 else 0.4})

    with serving(script) as (address, _):
        assert "429" in refused(address, retries=5, deadline=5) and len(tried) == 1
        assert "429" in refused(address, retries=5, deadline=1)
    waits = [later - sooner for sooner, later in zip(tried[1:], tried[2:], strict=False)]
    assert len(waits) in (1, 2) and min(waits) >= 0.4


def test_no_server_and_elsewhere():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    assert "no answer about 1 of 1 images: ConnectError" in refused(address)
    with serving(in_turn(GOOD)) as (elsewhere, seen):
        with serving(in_turn(http("", "307 Moved", location=elsewhere))) as (address, _):
            assert "status 307" in refused(address)
    assert seen == []


def test_the_key_is_stripped_and_in_no_message(monkeypatch, capsys):
    replies = [
        http(f'{{"error": {{"message": "wrong key {KEY}"}}}}', status="401 No", x_seen=KEY),
        http(f"<html>{KEY}"),
        http("", status=f"403 {KEY}"),
        http(completion([KEY])),
        http(completion(None, finish_reason=KEY)),
        http("x" * (300 - len(KEY) + 1) + KEY),  # cut after it is redacted, not before
        http("x" * (287 - len(KEY)) + KEY, status="400 No"),
        http("\\".join(KEY), status="400 No"),
    ]
    said = []
    for bad in replies:
        monkeypatch.setenv("OPENAI_API_KEY", f"  {KEY}\n")
        with serving(in_turn(bad)) as (address, requests):
            vlm = vldnp.load_vlm(address, model="m", retries=0)
            monkeypatch.setenv("OPENAI_API_KEY", "another")  # the one that was read is meant
            with pytest.raises(VLMError) as error:
                vlm([Image.new("RGB", (8, 8))], "?")
        assert f"bearer {KEY}\r\n" in requests[0][0].replace("Bearer", "bearer") + "\r\n"
        said += [str(error.value), repr(error.value), repr(vlm), str(vars(vlm))]
    assert any("[key]" in text for text in said)
    assert KEY[:12] not in ("".join(said) + "".join(capsys.readouterr())).replace("\\", "")


def test_an_answer_is_recorded_without_the_key_but_a_word_is_no_secret(monkeypatch):
    for key, said in ((KEY, "[key]"), ("knife", "knife")):
        monkeypatch.setenv("OPENAI_API_KEY", key)
        with serving(in_turn(http(completion(f"a knife, {key}")))) as (address, _):
            assert asked(address) == [f"a knife, {said}"]


@pytest.mark.parametrize("key", ["sk-4711 sk-4712", "sk-47\r\nX: 11", "schlüssel"])
def test_what_cannot_be_a_key_and_secrets_in_the_address_are_refused_unseen(key, monkeypatch):
    for address in ("http://me:secret@host/v1", "https://host/v1?key=secret"):
        with pytest.raises(ValueError, match="OPENAI_API_KEY") as error:
            vldnp.load_vlm(address, model="m")
        assert "secret@" not in str(error.value) and "key=secret" not in str(error.value)
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with pytest.raises(ValueError, match="the key in OPENAI_API_KEY holds a char") as error:
        vldnp.load_vlm("http://127.0.0.1:9/v1", model="m")
    assert key not in str(error.value)
