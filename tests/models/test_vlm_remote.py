"""RemoteVLM against a real `transformers serve` with the Moji VLM, and against bad servers."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import sd_pipeline

import vldnp
from vldnp.models.vlm import VLMError, ask

MODELS = Path(__file__).parents[2] / "data" / "models"
SERVED = "moji-vlm-s"
QUESTION = "What restricted things can be seen?"
KEY = "sk-this-must-not-be-seen-4711"


def pictures(count=5, seed=0):
    """Blocks of colour, which the Moji VLM answers about in different words."""
    pixels = np.random.default_rng(seed).integers(0, 256, (count, 4, 4, 3), dtype="uint8")
    return [Image.fromarray(block).resize((64, 64), Image.Resampling.BICUBIC) for block in pixels]


def start(port: int) -> subprocess.Popen:
    command = "from transformers.cli.transformers import app; app()"
    return subprocess.Popen(
        [sys.executable, "-c", command, "serve", SERVED, "--host", "127.0.0.1"]
        + ["--port", str(port), "--device", "cpu", "--dtype", "float32"],
        cwd=MODELS,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def wait_until_ready(port: int, process: subprocess.Popen, limit: float = 300) -> None:
    for _ in range(int(limit / 0.2)):
        assert process.poll() is None, "the server ended by itself"
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
            return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(0.2)
    raise AssertionError("the server did not start")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:the prompt")
def test_a_served_vlm_that_is_killed_and_restarted_in_the_middle_of_a_run():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    servers = [start(port)]
    try:
        local = vldnp.load_vlm(MODELS / SERVED, device="cpu", dtype=torch.float32, answers="free")
        address = f"http://127.0.0.1:{port}/v1"
        options = {"retries": 60, "max_new_tokens": 32, "answers": "free"}
        remote = vldnp.load_vlm(address, model=SERVED, **options)
        model = sd_pipeline()
        arguments = (model, ["a cat", "a dog at the cove", "a knife"])
        settings = {"seeds": [0, 1, 2], "num_inference_steps": 4}
        steps = list(vldnp.denoise(*arguments, method_with(local), **settings))

        wait_until_ready(port, servers[0])
        assert remote(pictures(), QUESTION) == local(pictures(), QUESTION)
        seen = []
        for step in vldnp.denoise(*arguments, method_with(remote), **settings):
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


def method_with(vlm):
    return vldnp.VLDNP(vlm, concepts="moji", omega=4, query_steps=[1, 3])


class Handler(BaseHTTPRequestHandler):
    """Replies by the server's script: a function of (number of the request, its body)."""

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            number = len(self.server.requests)
            self.server.requests.append((body, self.headers))
        status, reply = self.server.script(number, body)
        data = json.dumps(reply).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        for name, value in self.server.headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args):
        pass


@contextmanager
def serving(script, headers=None):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.script, server.requests, server.lock = script, [], threading.Lock()
    server.headers = headers or {"Retry-After-Ms": "1"}  # the usual waits are not what is tested
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server, f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        server.shutdown()
        server.server_close()


def reply(content, finish_reason="stop"):
    message = {"role": "assistant", "content": content}
    return 200, {
        "id": "1",
        "object": "chat.completion",
        "created": 0,
        "model": "m",
        "choices": [{"index": 0, "message": message, "finish_reason": finish_reason}],
    }


def refusal(status, text):
    return status, {"error": {"message": text, "type": "invalid_request_error"}}


def shade(body) -> str:
    """The brightness of the last picture in a request, which tells the pictures apart."""
    import base64
    import io

    url = body["messages"][-1]["content"][0]["image_url"]["url"]
    with Image.open(io.BytesIO(base64.b64decode(url.split(",")[1]))) as image:
        return str(image.getpixel((0, 0))[0])


def grey(*shades):
    return [Image.new("RGB", (20, 10), (s, s, s)) for s in shades]


def test_answers_come_in_the_pictures_order_and_calls_overlap():
    together = threading.Barrier(4, timeout=60)

    def script(number, body):
        together.wait()  # four calls must be under way at once for any to be answered
        time.sleep(0.05 * (4 - number % 4))
        return reply(shade(body))

    with serving(script) as (_, address):
        vlm = vldnp.load_vlm(address, model="m", concurrency=4, retries=0)
        assert vlm(grey(1, 2, 3, 4), "?") == ["1", "2", "3", "4"]


def test_what_is_asked():
    with serving(lambda number, body: reply("none")) as (server, address):
        vlm = vldnp.load_vlm(
            address,
            model="m",
            max_edge=10,
            max_new_tokens=7,
            demonstrations=[(grey(9)[0], "a knife")],
        )
        vlm(grey(200), "What?")
    body = server.requests[0][0]
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("m", 0, 7)
    assert [m["role"] for m in body["messages"]] == ["user", "assistant", "user"]
    assert body["messages"][1]["content"] == [{"type": "text", "text": "a knife"}]
    assert body["messages"][2]["content"][1] == {"type": "text", "text": "What?"}
    assert shade(body) == "200" and "response_format" not in body


def test_retries_are_bounded_and_the_error_is_one_line():
    def script(number, body):
        return refusal(503, "overloaded\nand more") if shade(body) == "2" else reply("none")

    with serving(script) as (server, address):
        vlm = vldnp.load_vlm(address, model="m", retries=2)
        with pytest.raises(VLMError, match="no answer about 1 of 3 images: .*503") as error:
            vlm(grey(1, 2, 3), "?")
    assert len(server.requests) == 2 + 3
    assert error.value.answers == ["none", None, "none"] and "\n" not in str(error.value)


def test_a_time_out_is_an_error():
    release = threading.Event()

    def script(number, body):
        release.wait(60)
        return reply("none")

    with serving(script) as (_, address):
        vlm = vldnp.load_vlm(address, model="m", timeout=0.2, retries=0)
        with pytest.raises(VLMError, match="timed out"):
            vlm(grey(1), "?")
        release.set()


@pytest.mark.parametrize(
    "bad", [reply(None), reply(""), reply(" \n"), reply([]), reply("a", "content_filter")]
)
def test_no_answer_is_not_taken_for_nothing_seen(bad):
    with serving(lambda number, body: bad) as (_, address):
        with pytest.raises(VLMError, match="the answer is empty"):
            vldnp.load_vlm(address, model="m")(grey(1), "?")


SEEN = {"items": {"enum": ["knife", "skull"]}, "type": "array"}


def constrained(content, **options):
    """What is asked and answered where "knife" and "skull" are offered."""
    with serving(lambda number, body: reply(content)) as (server, address):
        vlm = vldnp.load_vlm(address, model="m", **options)
        found = ask(vlm, grey(1), "?", choices=["knife", "skull"])
    return server.requests[0][0], found


@pytest.mark.parametrize(
    ("seen", "answer"), [([], "none"), (["skull", "knife", "skull"], "skull, knife")]
)
def test_answers_are_constrained_by_a_schema_and_come_as_a_list(seen, answer):
    body, found = constrained(json.dumps({"seen": seen}))
    schema = body["response_format"]["json_schema"]["schema"]
    assert schema["properties"]["seen"] == SEEN and schema["additionalProperties"] is False
    assert found == [answer]
    body, found = constrained("A knife.", answers="free")
    assert "response_format" not in body and found == ["A knife."]


@pytest.mark.parametrize(
    "bad",
    [
        "knife",
        "none",
        '["knife"]',
        '{"seen": ["dagger"]}',
        '{"seen": "knife"}',
        '{"seen": [["knife"]]}',
        '{"seen": null}',
        '{"seen": [], "why": "x"}',
        '{"seen": ["knife"',
        "{}",
    ],
)
def test_a_reply_that_does_not_fit_the_schema_is_a_failure(bad):
    with pytest.raises(VLMError, match="does not fit the JSON schema") as error:
        constrained(bad)
    assert error.value.answers == [None] and "JSON schema" in error.value.failures[0]


@pytest.mark.parametrize("status", [400, 422])
def test_a_refusal_about_one_image_is_that_images_failure(status):
    def script(number, body):
        small = refusal(status, "the image is below the least size; response_format is supported")
        return small if shade(body) == "2" else reply('{"seen": ["knife"]}')

    with serving(script) as (server, address):
        vlm = vldnp.load_vlm(address, model="m", concurrency=1)
        with pytest.raises(VLMError, match="about 1 of 3 images: status 4") as error:
            vlm(grey(1, 2, 3), "?", choices=["knife"])
        assert error.value.answers == ["knife", None, "knife"]
        assert [bool(failure) for failure in error.value.failures] == [False, True, False]
        assert vlm(grey(4), "?", choices=["knife"]) == ["knife"]
    assert len(server.requests) == 4
    assert all("response_format" in body for body, _ in server.requests)
    assert vlm.describe()["answers"] == "constrained"


def test_an_api_without_max_tokens_and_temperature_is_asked_otherwise_from_then_on():
    def script(number, body):
        if "max_tokens" in body:
            return refusal(400, "Unsupported parameter: 'max_tokens'. Use max_completion_tokens.")
        if "temperature" in body:
            return refusal(400, "'temperature' does not support 0 with this model.")
        return reply("none")

    with serving(script) as (server, address):
        vlm = vldnp.load_vlm(address, model="m", retries=0, max_new_tokens=7)
        with pytest.warns(UserWarning, match="'m' takes no temperature"):
            assert vlm(grey(1), "?") == ["none"]
        assert vlm(grey(2, 3), "?") == ["none"] * 2
    asked = [body.keys() & {"max_tokens", "temperature"} for body, _ in server.requests]
    assert asked == [{"max_tokens", "temperature"}, {"temperature"}, set(), set(), set()]
    assert server.requests[-1][0]["max_completion_tokens"] == 7


def test_what_a_server_asks_to_wait_stays_within_the_deadline():
    tried = []

    def script(number, body):
        tried.append(time.monotonic())
        return refusal(429, "later")

    with serving(script, {"Retry-After": "3600"}) as (_, address):
        vlm = vldnp.load_vlm(address, model="m", deadline=5)
        with pytest.raises(VLMError, match="429"):
            vlm(grey(1), "?")
    assert len(tried) == 1
    with serving(script, {"Retry-After": "0.4"}) as (_, address):
        with pytest.raises(VLMError, match="429"):
            vldnp.load_vlm(address, model="m", deadline=1)(grey(1), "?")
    waits = [later - sooner for sooner, later in zip(tried[1:], tried[2:], strict=False)]
    assert len(waits) in (1, 2) and min(waits) >= 0.4


def test_the_address_is_no_place_for_secrets():
    for address in ("http://me:secret@host/v1", "https://host/v1?key=secret"):
        with pytest.raises(ValueError, match="OPENAI_API_KEY") as error:
            vldnp.load_vlm(address, model="m")
        assert "secret@" not in str(error.value) and "key=secret" not in str(error.value)


def test_a_server_needs_a_models_name():
    with pytest.raises(ValueError, match="pass model="):
        vldnp.load_vlm("http://localhost:1/v1")
    with pytest.raises(ValueError, match="decides on device and dtype"):
        vldnp.load_vlm("http://localhost:1/v1", model="m", device="cpu")
    with pytest.raises(ValueError, match="concurrency must be 1 or more"):
        vldnp.load_vlm("http://localhost:1/v1", model="m", concurrency=0)
