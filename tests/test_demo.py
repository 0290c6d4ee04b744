"""`zoo demo`: what its page does, by calls, by Gradio's client and in a headless Chromium.

Gradio (extra `demo`) and Chromium are optional; the tests that need them skip where they are absent.
"""

import json
import re
import socket
import threading
import urllib.request
from itertools import pairwise

import numpy as np
import pytest
from PIL import Image, ImageDraw

import zoo
from tests.browser import Browser
from zoo.cli.demo_command import DemoOptions, parser_of_demo
from zoo.cli.entry import main
from zoo.cli.serve_command import own_options
from zoo.composed.chat_session import Talk as Chat
from zoo.inspection.demo import AS_LOADED, Demo, Side, Talk, examples
from zoo.inspection.xray import inspect
from zoo.inspection.xray_picture import paint
from zoo.loading.other_pruners import NONE, Pruned
from zoo.registry import ZooError

TINY = "scenes_tiny"


@pytest.fixture(scope="module")
def demo():
    demo = Demo({TINY: Pruned(TINY), "again": Pruned(TINY, ["pruner=random"])}, pruners=["random", "aim", "dart"])
    yield demo
    demo.close()


@pytest.fixture(scope="module")
def photo(tmp_path_factory):
    image = Image.new("RGB", (120, 100), "slategray")
    draw = ImageDraw.Draw(image)
    draw.rectangle((60, 50, 95, 85), fill="blue")
    draw.ellipse((10, 10, 45, 45), fill="red")
    file = tmp_path_factory.mktemp("demo") / "photo.png"
    image.save(file)
    return file


def ask(demo, talk, question, *sides):
    found = [list(texts) for texts in demo.answer(talk, question, sides or (Side(TINY),))]
    assert all(b[i].startswith(a[i]) for a, b in pairwise(found) for i in range(len(a)))
    return found[-1]


# ---- without Gradio -----------------------------------------------------------------------------------------------


def test_answers_are_those_of_chat_in_several_turns_on_both_sides(demo, photo):
    other, _ = zoo.load(TINY, "pruner=random", "pruner.random.keep_ratio=0.25")
    chats = Chat(demo.models[TINY].model), Chat(other)
    talk = Talk(photo)
    for i, question in enumerate(("is there a red circle?", "what color is the square?", "is there a green cross?")):
        texts = ask(demo, talk, question, Side(TINY), Side(TINY, "random", 0.25))
        assert texts == [chat.say(question, [] if i else [photo]) for chat in chats]
    assert len(talk.turns) == 3
    alone = Chat(other)
    late = Talk(photo)  # a side that is asked from the second turn on has the picture, and not the first question
    ask(demo, late, "is there a red circle?", Side(TINY))
    texts = ask(demo, late, "what color is the square?", Side(TINY), Side(TINY, "random", 0.25))
    assert texts[1] == alone.say("what color is the square?", [photo])


def test_visitors_do_not_meet(demo):
    shown = examples(3)
    alone = [ask(demo, Talk(image), text) for image, text in shown]
    found = [None] * 12

    def visit(i):
        image, text = shown[i % 3]
        found[i] = ask(demo, Talk(image), text, Side(TINY, "random", 1.0) if i % 2 else Side(TINY))

    threads = [threading.Thread(target=visit, args=(i,)) for i in range(len(found))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [alone[i % 3] for i in range(12)]


def test_the_xray_is_that_of_inspect(demo, photo):
    question = "is there a red circle?"
    expected = inspect(TINY, ["pruner.random.keep_ratio=0.25"], photo, ["random", "aim"], question)
    for name, ratio in (("random", 0.25), ("aim", 0.5), (NONE, 0.5)):
        picture, caption = demo.xray(photo, question, Side(TINY, name, ratio))
        view = next(v for v in expected.views if v.name == name)
        layer = max(i for i in view.moments if view.tokens[i] or i == 0)
        assert np.abs(picture / 255 - paint(expected.image, view, layer)).max() < 0.01
        assert caption.startswith(f"{view.tokens[0]} image tokens") and "ms for the prompt" in caption
    assert "16 image tokens of 64;" in demo.xray(photo, "", Side(TINY, "random", 0.25))[1]
    assert "0 from layer 3" in demo.xray(photo, "", Side(TINY, "aim"))[1]


def test_pruners_that_are_offered(demo, monkeypatch):
    assert demo.pruners == {name: [AS_LOADED, NONE, "random", "aim", "dart"] for name in (TINY, "again")}
    ratios = [demo.has_ratio(Side(*s)) for s in ((TINY,), ("again",), (TINY, "random"), (TINY, "aim"), ("again", NONE))]
    assert ratios == [False, True, True, False, False]
    assert demo.model_of(Side("again", AS_LOADED, 0.5))[0].num_image_tokens == 32
    with pytest.raises(ZooError, match="cls_attention"):
        Demo(demo.models, pruners=["fastervlm"])
    # fastervlm needs a [CLS] token, evs and frames act on videos alone
    monkeypatch.setattr("zoo.registry.names", lambda kind: ["evs", "fastervlm", "frames", "hiprune", "dart"])
    whole = Demo({TINY: demo.models[TINY]})
    whole.close()
    assert whole.pruners[TINY] == [AS_LOADED, NONE, "hiprune", "dart"]


def test_what_is_refused_leaves_the_conversation_as_it_was(demo, photo, tmp_path):
    talk = Talk(photo)
    ask(demo, talk, "is there a red circle?")
    for question, sides, message in (
        (" ", [Side(TINY)], "no question"),
        ("red " * 3000, [Side(TINY)], "no room for an answer"),
        ("what?", [Side("tiny")], "scenes_tiny"),
        ("what?", [Side(TINY, "fastervlm")], "cls_attention"),
    ):
        with pytest.raises(ZooError, match=message):
            ask(demo, talk, question, *sides)
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nbroken")
    with pytest.raises(ZooError, match="broken"):
        ask(demo, Talk(tmp_path / "broken.png"), "what?")
    assert len(talk.turns) == 1 and ask(demo, talk, "what color is the square?") == ["blue"]


def test_words_of_the_command(capsys, monkeypatch):
    args = parser_of_demo().read(["a", "port=1", "--share", "dir:b", "pruner=random", "--max-tokens", "9"])
    options = own_options(args, DemoOptions, "zoo demo")
    assert (args.model, options.port, options.share, options.max_tokens) == (["a", "dir:b"], 1, True, 9)
    assert args.options == ["pruner=random"]
    assert DemoOptions().share is False and DemoOptions().host == "127.0.0.1"
    for words, why in (
        (["a", "prot=1"], "'port'?"),
        (["a", "batch=0"], "batch has to"),
        ([*"abcde"], "one to 4 models"),
    ):
        assert main(["demo", *words]) == 2 and why in capsys.readouterr().err
    assert main(["demo", "--help"]) == 0 and "share=false" in capsys.readouterr().out
    monkeypatch.setitem(__import__("sys").modules, "gradio", None)
    monkeypatch.delitem(__import__("sys").modules, "zoo.inspection.demo_page", raising=False)
    assert main(["demo", TINY]) == 2 and "zoo-vlm[demo]" in capsys.readouterr().err


# ---- with Gradio --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def page(demo):
    """The address of the page; nothing but this machine may be connected to while it starts and answers."""
    pytest.importorskip("gradio", reason="the extra demo is not installed")
    from zoo.inspection.demo_page import build_page, launch

    connect = socket.socket.connect

    def local(self, address):
        assert not isinstance(address, tuple) or address[0] in ("127.0.0.1", "::1", "localhost"), address
        return connect(self, address)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", local)
        blocks = build_page(demo, "zoo demo")
        yield launch(blocks)
        blocks.close(verbose=False)


def test_the_client_of_gradio_keeps_visitors_apart(page, demo, photo):
    from gradio_client import Client, handle_file

    clients = [Client(page, verbose=False, analytics_enabled=False) for _ in range(2)]
    red, none = handle_file(str(photo)), None
    sides = (TINY, "random", 0.5, "again", AS_LOADED, 0.5)
    first = clients[0].predict(red, "what color is the square?", True, *sides, api_name="/ask")
    clients[1].predict(none, "hello", False, *sides, api_name="/ask")
    second = clients[0].predict(red, "is there a red circle?", True, *sides, api_name="/ask")
    chats = [[m["content"][0]["text"] for m in chat] for chat in second[1:3]]
    assert chats[0] == ["what color is the square?", "blue", "is there a red circle?", "yes"]
    assert chats[1][0::2] == chats[0][0::2] and first[0] == ""
    assert "32 image tokens of 64" in second[5] and "32 image tokens of 64" in second[6]
    stolen = {"path": str(photo), "meta": {"_type": "gradio.FileData"}}  # a file that nobody uploaded
    body = json.dumps({"data": [stolen, "what color is the square?", False, *sides]}).encode()
    request = urllib.request.Request(f"{page}gradio_api/call/ask", body, {"content-type": "application/json"})
    event = json.load(urllib.request.urlopen(request))["event_id"]
    answer = urllib.request.urlopen(f"{page}gradio_api/call/ask/{event}").read().decode()
    assert "event: error" in answer and "blue" not in answer
    with pytest.raises(Exception, match="no question"):
        clients[1].predict(none, "", False, *sides, api_name="/ask")
    with pytest.raises(Exception, match="Value: other is not in the list"):
        clients[1].predict(none, "x", False, "other", *sides[1:], api_name="/ask")


FILL = """((query, text) => {
  const box = document.querySelector(query);
  Object.getOwnPropertyDescriptor(Object.getPrototypeOf(box), 'value').set.call(box, text);
  for (const kind of ['input', 'change', 'pointerup']) box.dispatchEvent(new Event(kind, {bubbles: true}));
})"""
PICK = """((query, text) => [...document.querySelectorAll('[role=option]')].find(e => e.innerText.includes(text))
  .dispatchEvent(new MouseEvent('mousedown', {bubbles: true})))"""


def test_a_browser_uploads_asks_moves_the_slider_and_compares(page, photo, tmp_path):
    browser = Browser(tmp_path / "profile")
    kept = "(document.querySelector('#kept-{}')?.innerText.match(/^\\d+ image tokens( of \\d+)?/) || [''])[0]"
    chat = (
        "[...document.querySelectorAll('#chat-{} [data-testid]')].map(e => e.innerText.trim()).filter(t => t).join('|')"
    )
    try:
        browser.open(page)
        browser.size(1280, 900)
        browser.until("!!document.querySelector('#picture input[type=file]') && !!document.querySelector('#ask')")
        browser.upload("#picture input[type=file]", photo)
        browser.until(kept.format("a"), "64 image tokens")
        browser.value(f"{FILL}('#question textarea, #question input', 'what color is the square?')")
        browser.value("document.querySelector('#ask').click()")
        browser.until(chat.format("a"), "what color is the square?|blue")
        browser.value("document.querySelector('#pruner-a input').focus()")
        browser.until("document.querySelectorAll('[role=option]').length > 3")
        browser.value(f"{PICK}('#pruner-a', 'random')")
        browser.until(kept.format("a"), "32 image tokens of 64")
        browser.value(f"{FILL}('#ratio-a input[type=range]', '0.25')")
        browser.until(kept.format("a"), "16 image tokens of 64")
        browser.value("document.querySelector('#compare input').click()")
        browser.until(kept.format("b"), "32 image tokens of 64")
        browser.until("document.querySelector('#question textarea, #question input').value", "")
        browser.value(f"{FILL}('#question textarea, #question input', 'is there a red circle?')")
        browser.value("document.querySelector('#ask').click()")
        browser.until(f"/^is there a red circle\\?\\|(yes|no)$/.test({chat.format('b')})")
        said = browser.value(chat.format("a")).split("|")
        assert said[:3] == ["what color is the square?", "blue", "is there a red circle?"] and len(said) == 4
        for width in (1280, 390):  # nothing is cut off, at the width of a phone either
            browser.size(width, 900)
            browser.until(f"document.documentElement.scrollWidth <= {width} && innerWidth <= {width}")
        names = "performance.getEntriesByType('resource').map(e => e.name)"
        assert (
            browser.value(f"{names}.filter(n => !n.startsWith(location.origin) && !n.startsWith('data:')).join()") == ""
        )
        assert not re.search(r"fonts\.(googleapis|gstatic)", browser.value("document.documentElement.outerHTML"))
    finally:
        browser.close()
