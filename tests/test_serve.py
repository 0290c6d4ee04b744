"""`zoo serve` by the official client: answers as of `model.chat`, alone and in batches, whole and streamed."""

import random
import threading
import time

import pytest
import torch

import zoo
from tests.serve_builders import COLORS, ask, long_winded, openai, scene, serving, streamed, text_of, user
from zoo.composed.chat_session import Talk
from zoo.serving import answers
from zoo.serving.answers import Reading
from zoo.text.stops import reader_for


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


@pytest.fixture(scope="module")
def talking(long):
    with serving(*long, batch=8, threads=1) as both:
        yield both


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


def test_a_long_text_that_ends_an_answer_takes_no_time(long):
    """A request may bring 64 MiB of it; what is looked for are beginnings of it at the end of each piece."""
    reader = reader_for(long[0], long[1].template)
    reading = Reading(reader, ["x" * 1_000_000])
    begin = time.process_time()
    assert reading.reader.visible("is there an x", final=False) == "is there an "
    assert time.process_time() - begin < 1  # it took a minute


def test_pruners_by_the_name_of_the_model_and_by_fields(tiny):
    model, _ = tiny
    question = user("Describe the picture.", scene())
    with serving(*tiny, pruners=["random:0.5", "aim"]) as (_, client):
        assert [m.id for m in client.models.list()] == ["tiny", "tiny@random:0.5", "tiny@aim"]
        assert client.models.retrieve("tiny@random:0.25").id == "tiny@random:0.25"
        with pytest.raises(openai.NotFoundError, match="Did you mean 'random'"):
            client.models.retrieve("tiny@randm")
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
