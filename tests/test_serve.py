"""`zoo serve` by the official client of the protocol: answers as of `model.chat`, batches, limits, errors, the end.

Needs the extra `serve` and the package openai; skips where they are absent.
"""

import base64
import contextlib
import http.server
import io
import json
import os
import random
import signal
import socket
import threading
import time
import urllib.request

import pytest
import torch
from PIL import Image, ImageDraw

import zoo
from zoo.cli import serve_command
from zoo.cli.entry import main
from zoo.composed.chat_session import Talk
from zoo.loading.other_pruners import Pruned
from zoo.registry import ZooError
from zoo.serving.server import ServeOptions, listen, server_for

openai = pytest.importorskip("openai", reason="the package openai is not installed")
uvicorn = pytest.importorskip("uvicorn", reason="the extra serve is not installed")
pytest.importorskip("starlette", reason="the extra serve is not installed")

from zoo.serving import answers, protocol  # noqa: E402
from zoo.serving.answers import Piece, Reading  # noqa: E402
from zoo.serving.batches import Batcher  # noqa: E402
from zoo.text.stops import reader_for  # noqa: E402

COLORS = ("blue", "red", "green", "gold", "purple", "white", "black", "orange")


def scene(color="blue", size=64):
    image = Image.new("RGB", (size, size), "slategray")
    ImageDraw.Draw(image).rectangle((size // 2, size // 2, size * 3 // 4, size * 3 // 4), fill=color)
    return image


def data_url(image, form="PNG"):
    file = io.BytesIO()
    image.save(file, form)
    return f"data:image/{form.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"


def user(text, *images):
    shown = [{"type": "image_url", "image_url": {"url": i if isinstance(i, str) else data_url(i)}} for i in images]
    return {"role": "user", "content": [*shown, {"type": "text", "text": text}]}


def own(model, processor, name="scenes_tiny"):
    """What `Pruned(name)` is, without loading it again."""
    pruned = object.__new__(Pruned)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("zoo.loading.other_pruners.load", lambda *a, **k: (model, processor))
        pruned.__init__(name)
    return pruned


@contextlib.contextmanager
def serving(model, processor, name="tiny", **options):
    """A server on a free port, in a thread, and a client of it."""
    options = ServeOptions(port=0, **options)
    listening = listen(options)
    server = server_for(name, own(model, processor), options)
    http = uvicorn.Server(uvicorn.Config(server.app(), log_level="critical", lifespan="on"))
    thread = threading.Thread(target=http.run, kwargs={"sockets": [listening]})
    thread.start()
    url = f"http://127.0.0.1:{listening.getsockname()[1]}/v1"
    client = openai.OpenAI(base_url=url, api_key=options.api_key or "none", max_retries=0, timeout=60)
    try:
        yield server, client
    finally:
        client.close()
        http.should_exit = True
        thread.join()
        listening.close()
    assert server.batcher.closed and not server.batcher.running


@pytest.fixture(scope="module")
def tiny():
    return zoo.load("scenes_tiny")


@pytest.fixture(scope="module")
def long():
    """A model with random weights, whose answers are long, unlike and full of odd characters."""
    torch.manual_seed(0)
    texts = ["is there a red circle?", "wie heißt das? ❤ 你好", *COLORS]
    parts = ["vision=timm", "vision.width=32", "vision.depth=2", "vision.heads=2", "vision.image_size=32"]
    sizes = ["vision.patch_size=8", "projector=mlp", "llm=hf", "llm.hidden_size=64", "llm.num_layers=2"]
    model, processor = zoo.compose(*parts, *sizes, "llm.num_heads=4", texts=texts)
    with torch.no_grad():  # as it begins, it repeats one token
        for weight in model.llm.parameters():
            weight.normal_(std=0.3) if weight.ndim > 1 else weight
    return model.eval(), processor


@pytest.fixture(scope="module")
def served(tiny):
    with serving(*tiny) as both:
        yield both


@pytest.fixture(scope="module")
def talking(long):
    with serving(*long, batch=8, threads=1) as both:
        yield both


def ask(client, *messages, **options):
    return client.chat.completions.create(model="tiny", messages=list(messages), **options)


def text_of(answer):
    return answer.choices[0].message.content


def streamed(client, *messages, **options):
    """The texts of the choices of a streamed answer, their reasons to end, and the last chunk."""
    texts, reasons, last = {}, {}, None
    for last in ask(client, *messages, stream=True, **options):
        for choice in last.choices:
            texts[choice.index] = texts.get(choice.index, "") + (choice.delta.content or "")
            reasons[choice.index] = choice.finish_reason or reasons.get(choice.index)
    return texts, reasons, last


# ---- answers ------------------------------------------------------------------------------------------------------


def test_answers_are_those_of_chat(served, tiny):
    (_, client), (model, _) = served, tiny
    assert [m.id for m in client.models.list()] == ["tiny"] and client.models.retrieve("tiny").id == "tiny"
    for color in COLORS[:2]:
        for question in ("What color is the square?", "Is there a red square?"):
            answer = ask(client, user(question, scene(color)))
            assert text_of(answer) == model.chat(question, scene(color)) != ""
            assert answer.choices[0].finish_reason == "stop" and answer.object == "chat.completion"
            assert streamed(client, user(question, scene(color)))[0] == {0: text_of(answer)}


def test_turns_with_several_images_and_a_system_message(talking, long):
    _, client = talking
    talk = Talk(*long, system="be short")
    first = talk.say("is there a red circle?", [scene("red", 32), scene("gold", 48)], max_new_tokens=12)
    second = talk.say("and blue?", [scene("blue", 32)], max_new_tokens=12)
    turns = [
        {"role": "developer", "content": "be short"},
        user("is there a red circle?", scene("red", 32), scene("gold", 48)),
    ]
    answer = ask(client, *turns, max_tokens=12)
    assert text_of(answer) == first
    turns += [{"role": "assistant", "content": first}, user("and blue?", scene("blue", 32))]
    again = ask(client, *turns, max_completion_tokens=12)
    assert text_of(again) == second
    assert again.usage.prompt_tokens_details.image_tokens == 3 * long[0].num_image_tokens
    assert again.usage.total_tokens == again.usage.prompt_tokens + again.usage.completion_tokens
    assert text_of(ask(client, {"role": "user", "content": "is there?"}, max_tokens=8)) == long[0].chat(
        "is there?", max_new_tokens=8
    )


def test_eight_at_once_get_what_each_gets_alone_from_shared_batches(talking):
    server, client = talking
    questions = [
        (user("is there " * (i % 4 + 1) + COLORS[i], *[scene(COLORS[i], 32)] * (i % 3)), 4 + 3 * i)
        for i in range(len(COLORS))
    ]
    options = [{}, {"temperature": 1.0, "seed": 5}, {"temperature": 0.7, "top_p": 0.8, "seed": 6}, {"n": 2}]
    options = [{**options[i % 4], "max_tokens": most} for i, (_, most) in enumerate(questions)]
    alone = [ask(client, q, **o) for (q, _), o in zip(questions, options, strict=True)]
    assert len({text_of(a) for a in alone}) == len(alone)
    batches, rows = server.batcher.batches, server.batcher.rows
    found = [None] * len(questions)

    def work(i):
        if i % 2:
            texts, reasons, last = streamed(
                client, questions[i][0], stream_options={"include_usage": True}, **options[i]
            )
            found[i] = [texts[k] for k in sorted(texts)], [reasons[k] for k in sorted(texts)], last.usage
        else:
            answer = ask(client, questions[i][0], **options[i])
            chosen = answer.choices
            found[i] = [c.message.content for c in chosen], [c.finish_reason for c in chosen], answer.usage

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(questions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for one, same in zip(alone, found, strict=True):
        assert same[0] == [c.message.content for c in one.choices]
        assert same[1] == [c.finish_reason for c in one.choices] and same[2] == one.usage
    batches, rows = server.batcher.batches - batches, server.batcher.rows - rows
    assert rows == 10 and batches < rows / 2


def test_seeds_choices_and_penalties(talking, long):
    _, client = talking
    question = user("is there a red circle?", scene("red", 32))
    drawn = [ask(client, question, temperature=1.5, seed=s, n=3, max_tokens=10) for s in (1, 1, 2)]
    texts = [[c.message.content for c in d.choices] for d in drawn]
    assert texts[0] == texts[1] != texts[2] and len(set(texts[0])) == 3
    assert drawn[0].usage.completion_tokens == 30
    greedy = text_of(ask(client, question, max_tokens=10))
    assert text_of(ask(client, question, max_tokens=10, temperature=1.0, top_p=1e-6)) == greedy
    assert text_of(ask(client, question, max_tokens=10, frequency_penalty=2.0, presence_penalty=2.0)) != greedy


def test_draws_have_the_probabilities_of_the_scores():
    row = object.__new__(answers.Row)
    row.done, row.generator = False, torch.Generator().manual_seed(0)
    row.reading = type("Read", (), {"ids": []})
    scores = torch.tensor([2.0, 1.0, 0.0, -3.0])
    for top_p, possible in ((1.0, 4), (0.9, 3), (0.4, 1)):
        row.sampling = answers.Sampling(temperature=2.0, top_p=top_p)
        expected = (scores / 2).softmax(-1)
        expected[possible:] = 0
        expected = expected / expected.sum()
        counts = torch.zeros(4)
        for _ in range(2000):
            left = scores.clone()
            row.choose(left)
            counts[left.argmax()] += 1
        assert (counts / 2000 - expected).abs().max() < 0.04, top_p  # more than three standard errors
        assert (counts[possible:] == 0).all()


def test_what_ends_an_answer(talking, long):
    _, client = talking
    question = user("is there a red circle?", scene("red", 32))
    whole = ask(client, question, max_tokens=30)
    assert whole.choices[0].finish_reason == "length" and whole.usage.completion_tokens == 30
    stop = text_of(whole)[9:12]
    before = text_of(whole).split(stop)[0].strip()
    for found in (ask(client, question, max_tokens=30, stop=stop), ask(client, question, max_tokens=30, stop=[stop])):
        assert text_of(found) == before and found.choices[0].finish_reason == "stop"
        assert found.usage.completion_tokens < 30
    texts, reasons, last = streamed(client, question, max_tokens=30, stop=stop)
    assert texts == {0: before} and reasons == {0: "stop"} and last.usage is None


def test_pieces_of_any_tokens_are_the_answer_that_is_read_at_the_end(long):
    """Characters of several tokens, blanks at both ends, ends and beginnings of ends, at random."""
    reader = reader_for(long[0], long[1].template)
    draw = random.Random(0)
    size = len(reader.tokenizer)
    for stop in ((), ("e", "is"), ("ab", "\ufffd")):
        for _ in range(60):
            reading = Reading(reader, stop)
            shown = ""
            for _ in range(draw.randrange(1, 30)):
                shown += reading.take(draw.randrange(size))
                if reading.ended:
                    break
            assert shown + reading.rest() == reading.reader.read(reading.ids)


def test_pruners_by_the_name_of_the_model_and_by_fields(tiny):
    model, _ = tiny
    question = user("Describe the picture.", scene())
    with serving(*tiny, pruners=["random:0.5", "aim"]) as (_, client):
        assert [m.id for m in client.models.list()] == ["tiny", "tiny@random:0.5", "tiny@aim"]
        pruned, _ = zoo.load("scenes_tiny", "pruner=random", "pruner.random.keep_ratio=0.25")
        expected = pruned.chat("Describe the picture.", scene())
        whole = model.chat("Describe the picture.", scene())
        for name, body, count, text in (
            ("tiny@random:0.25", {}, 16, expected),
            ("tiny", {"pruner": "random", "keep_ratio": 0.25}, 16, expected),
            ("tiny@none", {}, 64, whole),
            ("tiny", {}, 64, whole),
        ):
            answer = client.chat.completions.create(model=name, messages=[question], extra_body=body)
            assert (answer.usage.prompt_tokens_details.image_tokens, text_of(answer)) == (count, text)
            assert answer.model == name
        for name, body, message in (
            ("tiny@randm", {}, "Did you mean 'random'"),
            ("tiny@random:2", {}, "at most 1"),
            ("tiny@fastervlm", {}, "fastervlm"),  # needs a [CLS] token
            ("tiny@pool:0.5", {}, "no option keep_ratio"),
            ("tiny@random", {"pruner": "aim"}, "give it once"),
            ("tiny", {"keep_ratio": 0.5}, "there is none"),
            ("tiny", {"pruner": 3}, "name of a pruner"),
        ):
            with pytest.raises(openai.BadRequestError, match=message):
                client.chat.completions.create(model=name, messages=[question], extra_body=body)


# ---- what is refused ----------------------------------------------------------------------------------------------

HELLO = {"role": "user", "content": "hello"}
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
        ("data:image/png,xyz", "invalid_base64_image"),
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
    with http.server.HTTPServer(("127.0.0.1", 0), Hosts) as host, serving(*tiny, fetch=["127.0.0.1"]) as (_, client):
        threading.Thread(target=host.serve_forever, daemon=True).start()
        place = f"127.0.0.1:{host.server_port}"
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


# ---- waiting and the end ------------------------------------------------------------------------------------------


def held(server):
    """Let batches of a server wait until the event is set."""
    gate, begun, run = threading.Event(), threading.Event(), server.batcher.run

    def wait(rows):
        begun.set()
        gate.wait(30)
        run(rows)

    server.batcher.run = wait
    return gate, begun


def test_a_full_queue_refuses(tiny):
    with serving(*tiny, queue=2, threads=1) as (server, client):
        gate, begun = held(server)
        found = []
        threads = [threading.Thread(target=lambda: found.append(text_of(ask(client, HELLO)))) for _ in range(3)]
        threads[0].start()
        begun.wait(10)
        for thread in threads[1:]:
            thread.start()
        end = time.monotonic() + 10
        while len(server.batcher.waiting) < 2 and time.monotonic() < end:
            time.sleep(0.005)
        with pytest.raises(openai.RateLimitError) as full:
            ask(client, HELLO)
        assert full.value.code == "queue_full" and full.value.response.headers["retry-after"]
        gate.set()
        for thread in threads:
            thread.join()
        assert found == [tiny[0].chat("hello")] * 3 and server.batcher.batches == 2


def test_who_leaves_is_not_answered(long):
    with serving(*long, threads=1, max_tokens=900) as (server, client):
        stream = ask(client, HELLO, stream=True)
        next(iter(stream))
        stream.close()  # in the middle of 900 tokens
        gate, _ = held(server)
        with pytest.raises(openai.APITimeoutError):
            ask(client.with_options(timeout=0.3), HELLO)
        end = time.monotonic() + 10
        while not (server.batcher.running and all(r.cancelled for r in server.batcher.running)):
            assert time.monotonic() < end
            time.sleep(0.005)
        gate.set()
        started = time.monotonic()
        while server.batcher.running and time.monotonic() < started + 10:
            time.sleep(0.005)
        assert not server.batcher.running


def test_a_batch_that_fails_is_tried_row_by_row(long, monkeypatch):
    model, processor = long
    with serving(model, processor, threads=1) as (server, client):
        whole = answers._generate

        def fails(rows):
            if any(row.limit == 7 for row in rows):
                raise RuntimeError("a secret of the machine")
            whole(rows)

        monkeypatch.setattr(answers, "_generate", fails)
        gate, _ = held(server)
        found = {}

        def work(most):
            try:
                found[most] = text_of(ask(client, HELLO, max_tokens=most))
            except openai.InternalServerError as error:
                found[most] = error

        threads = [threading.Thread(target=work, args=(most,)) for most in (4, 5, 6, 7)]
        for thread in threads:
            thread.start()
        end = time.monotonic() + 10
        while len(server.batcher.waiting) + len(server.batcher.running) < 4 and time.monotonic() < end:
            time.sleep(0.005)
        gate.set()
        for thread in threads:
            thread.join()
        assert {m: found[m] for m in (4, 5, 6)} == {m: model.chat("hello", max_new_tokens=m) for m in (4, 5, 6)}
        assert "RuntimeError" in str(found[7]) and "secret" not in str(found[7])
        with pytest.raises(openai.InternalServerError):  # streams too, before they begin
            ask(client, HELLO, max_tokens=7, stream=True)


def test_rows_that_wait_at_the_end_are_failed():
    gate, pieces = threading.Event(), []

    class Waits:
        cancelled, model = False, None
        prompt = ()

        def fail(self, error):
            pieces.append(Piece(error=error))

    batcher = Batcher(1, run=lambda rows: gate.wait(10))
    first, second = Waits(), Waits()
    Waits.model = type("Model", (), {"generation_config": None})
    batcher.add([first])
    while not batcher.running:
        time.sleep(0.005)
    batcher.add([second])
    closing = threading.Thread(target=batcher.close)
    closing.start()
    while not pieces:
        time.sleep(0.005)
    assert first.cancelled and isinstance(pieces[0].error, ZooError)
    gate.set()
    closing.join()
    with pytest.raises(ZooError, match="shutting down"):
        batcher.add([first])


# ---- the command --------------------------------------------------------------------------------------------------


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
def test_the_command_serves_until_it_is_interrupted(tiny, monkeypatch, capsys):
    monkeypatch.setattr("zoo.loading.other_pruners.load", lambda *a, **k: tiny)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    said = {}

    def talks():
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=20)
        try:
            said["answer"] = text_of(client.chat.completions.create(model="scenes_tiny", messages=[HELLO]))
        finally:
            os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=talks)
    thread.start()
    assert main(["serve", "scenes_tiny", "--port", str(port)]) == 0
    thread.join()
    assert said["answer"] == tiny[0].chat("hello")
    assert f"http://127.0.0.1:{port}/v1" in capsys.readouterr().out
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert main(["serve", "scenes_tiny", f"port={port}"]) == 2
    assert "Cannot listen on 127.0.0.1" in capsys.readouterr().err


def words_of(words):
    args, options = serve_command.parsed(words)
    return args.model, options, args.options


def test_words_of_the_command(capsys):
    model, options, rest = words_of(
        [
            "port=1",
            "dir:x",
            "--api-key=k",
            "pruner=random",
            "--batch",
            "4",
            "pruner.random.keep_ratio=0.5",
            "fetch=[a,b]",
        ]
    )
    assert (model, rest) == ("dir:x", ["pruner=random", "pruner.random.keep_ratio=0.5"])
    assert (options.port, options.api_key, options.batch, options.fetch) == (1, "k", 4, ["a", "b"])
    for words, message in (
        (["a", "b"], "takes no 'b'"),
        (["port=1"], "it needs model"),
        (["a", "port=x"], "'port' of zoo serve takes int"),
        (["a", "prot=80"], "Did you mean 'port'"),
        (["a", "--prot", "80"], "Did you mean '--port'"),
        (["a", "batch=0"], "at least 1"),
        (["a", "grace=-1"], "grace has to be at least 0, got -1"),
        (["a", "--port"], "needs a value"),
    ):
        with pytest.raises(ZooError, match=message):
            words_of(words)
    assert main(["serve", "--help"]) == 0 and "api_key" in capsys.readouterr().out
