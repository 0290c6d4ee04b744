"""`zoo serve` under load and at its end: the queue, clients that leave, batches that fail; the command."""

import os
import signal
import socket
import threading
import time

import pytest

import zoo
from tests.serve_builders import HELLO, ask, held, long_winded, openai, serving, text_of
from zoo.cli import serve_command
from zoo.cli.entry import main
from zoo.registry import Dialog, Sample, ZooError
from zoo.runs.lengths import length_of
from zoo.serving import answers
from zoo.serving.answers import Piece
from zoo.serving.batches import Batcher
from zoo.serving.protocol import Sampling


@pytest.fixture(scope="module")
def tiny():
    return zoo.load("scenes_tiny")


@pytest.fixture(scope="module")
def long():
    return long_winded()


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
        for stream in (False, True):  # one runs, and one waits for the first piece of its stream
            with pytest.raises(openai.APITimeoutError):
                ask(client.with_options(timeout=0.3), HELLO, stream=stream)
        end = time.monotonic() + 10
        while not (rows := {*server.batcher.running, *server.batcher.waiting}) or not all(r.cancelled for r in rows):
            assert time.monotonic() < end
            time.sleep(0.005)
        gate.set()
        started = time.monotonic()
        while server.batcher.running and time.monotonic() < started + 10:
            time.sleep(0.005)
        assert not server.batcher.running and len(rows) >= 2


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
    assert words_of(["m", "--fetch", "a.org:80"])[1].fetch == ["a.org:80"]
    assert words_of(["m", "fetch=a.org,b.org"])[1].fetch == ["a.org", "b.org"]
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


@pytest.mark.parametrize(("family", "alone"), [("gpt2", True), ("llama", False)])
def test_answers_that_would_leave_a_table_of_positions_do_not_share_a_batch(family, alone):
    sizes = [
        "vision=timm",
        "vision.width=32",
        "vision.depth=2",
        "vision.heads=2",
        "vision.image_size=32",
        "projector=mlp",
    ]
    sizes += ["llm=hf", f"llm.model_type={family}", "llm.hidden_size=32", "llm.num_layers=1", "llm.max_positions=80"]
    model, processor = zoo.compose(*sizes, "llm.num_heads=2", texts=["what is it? red blue"])
    found = {}

    def row(text, limit):
        dialog = Dialog([{"role": "user", "content": text}])
        prompt = processor.encode_prompt(Sample("a", [], []), dialog, pixel_values=[])
        return answers.Row(model.eval(), processor, prompt, limit, Sampling(), found.setdefault(limit, []).append)

    long, short = row("what is it? " * 14, 3), row("red", 60)
    assert length_of(long.prompt) + short.limit > 80
    assert answers.may_share(long, short) is not alone and answers.may_share(short, row("red", 50))
    batcher = Batcher(size=2)
    batcher.add([long, short])
    while not (long.done and short.done):
        time.sleep(0.01)
    batcher.close()
    assert batcher.batches == 1 + alone and {found[3][-1].finish, found[60][-1].finish} <= {"stop", "length"}
