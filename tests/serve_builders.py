"""A server of `zoo serve` in a thread and the official client of the protocol, small models, and pictures for them.

Needs the extra `serve` and the package openai: tests that import this skip where they are absent.
"""

import base64
import contextlib
import io
import threading
from functools import cache

import pytest
import torch
from PIL import Image, ImageDraw

import zoo
from zoo.loading.other_pruners import Pruned
from zoo.serving.server import ServeOptions, listen, server_for

openai = pytest.importorskip("openai", reason="the package openai is not installed")
uvicorn = pytest.importorskip("uvicorn", reason="the extra serve is not installed")
pytest.importorskip("starlette", reason="the extra serve is not installed")

HELLO = {"role": "user", "content": "hello"}
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


@cache
def long_winded():
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


def held(server):
    """Let batches of a server wait until the event is set."""
    gate, begun, run = threading.Event(), threading.Event(), server.batcher.run

    def wait(rows):
        begun.set()
        gate.wait(30)
        run(rows)

    server.batcher.run = wait
    return gate, begun
