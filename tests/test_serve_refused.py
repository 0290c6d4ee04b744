"""What `zoo serve` refuses, each in the protocol's form: fields, images, addresses, bodies, keys."""

import asyncio
import base64
import http.client
import http.server
import io
import json
import socket
import threading
import time
import urllib.request

import pytest
import torch
from PIL import Image

import zoo
from tests.serve_builders import HELLO, ask, data_url, long_winded, openai, scene, serving, text_of, user
from zoo.registry import ZooError
from zoo.serving import answers, bodies, protocol
from zoo.serving.pictures import Pictures
from zoo.serving.server import ServeOptions


@pytest.fixture(scope="module")
def tiny():
    return zoo.load("scenes_tiny")


@pytest.fixture(scope="module")
def long():
    return long_winded()


@pytest.fixture(scope="module")
def served(tiny):
    with serving(*tiny) as both:
        yield both


WRONG = [
    ({"messages": []}, "messages", None),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role", None),
    ({"messages": [HELLO, {"role": "assistant", "content": "x"}]}, "messages", None),
    ({"messages": [{"role": "system", "content": [{"type": "image_url"}]}]}, "messages[0].content[0]", None),
    ({"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]}, "messages[0].content[0]", None),
    ({"messages": [{"role": ["user"], "content": "x"}]}, "messages[0].role", None),
    ({"temperature": 2.5}, "temperature", None),
    ({"temperature": 10**400}, "temperature", None),
    ({"seed": 10**400}, "seed", None),
    ({"temperature": True}, "temperature", None),
    ({"top_p": 0}, "top_p", None),
    ({"n": 0}, "n", None),
    ({"n": 1.5}, "n", None),
    ({"max_tokens": 0}, "max_tokens", None),
    ({"max_tokens": 10**6}, "max_tokens", "context_length_exceeded"),
    ({"messages": [{"role": "user", "content": "red " * 3000}]}, "messages", "context_length_exceeded"),
    ({"stop": ["a"] * 5}, "stop", None),
    ({"stream": "yes"}, "stream", None),
    ({"stream_options": {"include_usage": True}}, "stream_options", None),
    ({"logprobs": True}, "logprobs", "unsupported_parameter"),
    ({"response_format": {"type": "json_object"}}, "response_format", "unsupported_parameter"),
    ({"tools": [{"type": "function"}]}, "tools", "unsupported_parameter"),
]


def test_requests_that_are_refused(served, tiny):
    server, client = served
    for body, param, code in WRONG:
        with pytest.raises(openai.BadRequestError) as found:
            client.post("/chat/completions", body={"model": "tiny", "messages": [HELLO], **body}, cast_to=object)
        assert (found.value.param, found.value.code) == (param, code), body
        assert found.value.type == "invalid_request_error" and found.value.body["message"]
    with pytest.raises(openai.NotFoundError) as found:
        client.chat.completions.create(model="other", messages=[HELLO])
    assert found.value.code == "model_not_found" and "'tiny'" in str(found.value)
    # Neutral values, and fields that are nothing here, change nothing.
    neutral = {"logprobs": False, "response_format": {"type": "text"}, "user": "me", "tools": None, "n": 1}
    assert text_of(ask(client, HELLO, extra_body={"temprature": 1, "made_up": []}, **neutral)) == tiny[0].chat("hello")
    assert any("did you mean 'temperature'" in name for name in server._named)


def test_images_that_are_refused(served, tmp_path):
    _, client = served
    scene().save(tmp_path / "there.png")
    bomb = io.BytesIO()
    Image.new("1", (10_000, 10_000)).save(bomb, "PNG")
    bomb = f"data:image/png;base64,{base64.b64encode(bomb.getvalue()).decode()}"
    assert len(bomb) < 100_000
    for url, code in (
        (f"file://{tmp_path}/there.png", "invalid_image_url"),
        (str(tmp_path / "there.png"), "invalid_image_url"),
        ("http://127.0.0.1:1/x.png", "invalid_image_url"),
        ("https://[broken", "invalid_image_url"),
        ("", "invalid_image_url"),
        ("data:", "invalid_base64_image"),
        ("data:image/png,xyz", "invalid_base64_image"),
        ("data:image/png;base64", "invalid_image"),
        ("data:image/png;base64,é", "invalid_base64_image"),
        ("data:image/svg+xml;base64,PHN2Zy8+", "invalid_image"),
        ("data:image/png;base64,@@@", "invalid_base64_image"),
        ("data:image/png;base64,aGVsbG8=", "invalid_image"),
        (data_url(scene())[:-40], "invalid_image"),
        (bomb, "invalid_image"),
    ):
        with pytest.raises(openai.BadRequestError) as found:
            ask(client, user("what?", url))
        assert (found.value.code, found.value.param) == (code, "messages[0].content[0]"), url[:40]
    held = ask(client, user("an <image> in words", scene())).usage.prompt_tokens_details
    assert held.image_tokens == 64  # of the image alone
    for form in ("JPEG", "WEBP", "GIF"):
        assert text_of(ask(client, user("Is there a square?", data_url(scene(), form)))) in ("yes", "no")


def test_bounds_on_images_bodies_and_keys(tiny):
    with serving(*tiny, image_mb=1, body_mb=2, images=2, image_pixels=5000, api_key="secret") as (_, client):
        noise = Image.effect_noise((1100, 1100), 100)
        for images, code in (
            ([scene()] * 3, None),
            ([scene(size=80)], "invalid_image"),
            ([data_url(noise)], "image_too_large"),
        ):
            with pytest.raises(openai.BadRequestError) as found:
                ask(client, user("what?", *images))
            assert found.value.code == code
        with pytest.raises(openai.APIStatusError) as found:
            ask(client, user("x" * (3 << 20)))
        assert (found.value.status_code, found.value.code) == (413, "request_too_large")
        with pytest.raises(openai.AuthenticationError):
            client.with_options(api_key="secre").models.list()
        assert text_of(ask(client, user("Is there a red square?", scene(size=70)))) in ("yes", "no")


def head_of(client, length, key="none"):
    """Send the head of a request alone, and return the status and the error that come."""
    url = client.base_url
    lines = (
        "POST /v1/chat/completions HTTP/1.1", f"host: {url.host}", "content-type: application/json",
        f"content-length: {length}", f"authorization: Bearer {key}", "", "",
    )  # fmt: skip
    with socket.create_connection((url.host, url.port), timeout=10) as line:
        line.sendall("\r\n".join(lines).encode())
        answer = http.client.HTTPResponse(line)
        answer.begin()
        return answer.status, json.load(answer)["error"]["code"]


def test_a_head_is_enough_to_be_refused(tiny, monkeypatch):
    """No byte of the body is waited for; a client that sends all of it first reads the reason, too."""
    monkeypatch.setattr(bodies, "LINGER", 0.1)
    with serving(*tiny, body_mb=1, queue=2, api_key="secret") as (server, client):
        assert head_of(client, 2 << 20, "secret") == (413, "request_too_large")
        assert head_of(client, 9, "wrong") == (401, "invalid_api_key")
        server.preparing = 2
        assert head_of(client, 9, "secret") == (429, "queue_full")
        monkeypatch.setattr(bodies, "LINGER", 5.0)
        with pytest.raises(openai.RateLimitError):
            ask(client, user("x" * (9 << 16)))
        server.preparing = 0
        with pytest.raises(openai.APIStatusError) as found:
            ask(client, user("x" * (9 << 20)))
        assert found.value.status_code == 413
        monkeypatch.setattr(bodies, "SECONDS", 0.1)
        assert head_of(client, 9, "secret") == (408, None)
        assert client.models.list().data


class Hosts(http.server.BaseHTTPRequestHandler):
    """A host with an image, and with a redirect to a file of another one."""

    def do_GET(self):
        if self.path == "/there.png":
            self.send_response(200)
            self.end_headers()
            scene("red").save(self.wfile, "PNG")
        else:
            self.send_response(302)
            self.send_header("location", "/there.png")
            self.end_headers()

    def log_message(self, *args):
        pass


def test_urls_are_fetched_from_hosts_that_are_named_alone(tiny):
    host = http.server.HTTPServer(("127.0.0.1", 0), Hosts)
    place = f"127.0.0.1:{host.server_port}"
    with host, serving(*tiny, fetch=[place]) as (_, client):
        threading.Thread(target=host.serve_forever, daemon=True).start()
        answer = ask(client, user("What color is the square?", f"http://{place}/there.png"))
        assert text_of(answer) == tiny[0].chat("What color is the square?", scene("red"))
        for url in (f"http://{place}/moved", f"http://localhost:{host.server_port}/there.png", "http://127.0.0.1:1/x",
                    f"http://{place}/two words.png"):  # fmt: skip
            with pytest.raises(openai.BadRequestError) as found:
                ask(client, user("what?", url))
            assert found.value.code == "invalid_image_url"
        host.shutdown()


@pytest.mark.parametrize("temperature", [1e-3, 1e-40, 5e-324])
def test_a_temperature_near_zero_takes_the_most_likely_token(long, temperature):
    model, processor = long
    scores = torch.tensor([1.0, 9.0, 3.0, -torch.inf, 8.9])
    row = answers.Row(model, processor, None, 4, answers.Sampling(temperature=temperature), None, seed=0)
    row.choose(scores)
    assert scores.argmax() == 1 and scores.isinf().sum() == 4


def test_many_unknown_fields_do_not_keep_others_waiting():
    body = {"model": "tiny", "messages": [HELLO], **{f"temperatur_{i}": 1 for i in range(50_000)}, "x" * 10**7: 1}
    begun = time.process_time()
    assert "did you mean 'temperature'" in protocol.read_ask(body).ignored[0]
    assert time.process_time() - begun < 1


def test_plain_http(served):
    _, client = served
    base = str(client.base_url).removesuffix("/v1/")

    def call(path, body=None, kind="application/json"):
        request = urllib.request.Request(base + path, body, {"content-type": kind})
        try:
            with urllib.request.urlopen(request) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)

    status, health = call("/health")
    assert status == 200 and health["status"] == "ok" and health["waiting"] == 0
    asked = "/v1/chat/completions"
    for path, body, kind, expected in (
        ("/v1/nothing", None, "", 404),
        ("/v1/models/other", None, "", 404),
        (asked, None, "", 405),
        (asked, b"{", "application/json", 400),
        (asked, b"[]", "application/json", 400),
        (asked, b"[" * 100_000, "application/json", 400),
        (asked, b"{}", "text/plain", 415),  # what a page of a foreign site can send
    ):
        status, found = call(path, body, kind)
        assert status == expected and set(found["error"]) == {"message", "type", "param", "code"}, (path, body)


@pytest.mark.parametrize(
    ("url", "allowed"),
    [
        ("http://a.org/x.png", True),
        ("https://A.org:443/x.png", True),
        ("http://a.org:8080/x.png", False),  # another service of the host
        ("https://a.org:80/x.png", False),
        ("http://b.org:8080/x.png", True),
        ("http://b.org/x.png", False),
        ("http://c.org/x.png", True),  # named with the port of the scheme
        ("https://c.org/x.png", False),
        ("http://c.org:0/x.png", False),
        ("http://a.org@b.org/x.png", False),
        ("http://[::1]:8080/x.png", True),
        ("http://[::1]/x.png", False),
        ("http://a.org:99999/x.png", False),
        ("http:///x.png", False),
    ],
)
def test_a_host_is_allowed_on_its_port_alone(url, allowed, monkeypatch):
    def opened(handler):
        raise RuntimeError("reached")

    monkeypatch.setattr("urllib.request.build_opener", opened)
    taken = Pictures(1, 1 << 20, 1 << 20, ["a.org", "b.org:8080", "[::1]:8080", "C.org:80"])
    error, words = (RuntimeError, "reached") if allowed else (protocol.RequestError, "is not fetched")
    with pytest.raises(error, match=words):
        taken.take([protocol.Picture(url, "here")], None)


@pytest.mark.parametrize("more", [True, False])
def test_a_body_of_no_stated_size_that_is_too_large_is_refused(more, monkeypatch):
    """Also where its last part alone is too much, behind which nothing is to be read."""
    from starlette.requests import Request

    monkeypatch.setattr(bodies, "LINGER", 0.1)
    parts = [{"type": "http.request", "body": b"x" * 6, "more_body": more}]

    async def receive():
        return parts.pop() if parts else {"type": "http.disconnect"}

    with pytest.raises(protocol.RequestError, match="more than 5 bytes") as found:
        asyncio.run(bodies.read_json(Request({"type": "http", "headers": []}, receive), 5))
    assert found.value.status == 413


@pytest.mark.parametrize("word", ["", "*", "*.a.org", "https://a.org", "a.org/x", "me@a.org", "a.org:x", "a.org:99999"])
def test_what_is_no_host_is_refused_at_once(word):
    with pytest.raises(ZooError, match="name a host, such as"):
        ServeOptions(fetch=[word])
