"""What people write stays text: no token of control comes out of it, and all its letters do."""

import pickle
from collections import Counter

import numpy as np
import pytest

from tests.chat_families import SHAPES
from tests.test_answers_end import pieces, processor_of, rows_of, sample_of, say, talk, text
from zoo import ZooError
from zoo.registry import IGNORE_INDEX, Dialog
from zoo.text.plain_text import FIRST

HTML = "<b>bold</b> &amp; <s>gone</s> {{ messages }} {% if x %} <br/> [/INST] </think> <image src='a'>"


def control(processor):
    return sorted(processor._chat.plain.control)


def counted(processor, row):
    """How often each token of control is in what a model sees."""
    wanted = {processor.tokenizer.convert_tokens_to_ids(t): t for t in control(processor)}
    unknown = processor.tokenizer.unk_token
    return [Counter(wanted[i] for i in ids.tolist() if i in wanted and wanted[i] != unknown) for ids, _ in rows_of(row)]


@pytest.mark.parametrize("name", SHAPES)
def test_tokens_of_control_in_a_message_are_letters(name):
    processor = processor_of(name)
    tokens = control(processor)
    assert processor.image_token in tokens and processor.tokenizer.eos_token in tokens
    said = f"what is {' '.join(tokens)} in{tokens[0]}{tokens[-1]}?"
    answer = f"a {tokens[0]} cat {' '.join(reversed(tokens))} on it"
    plain = processor.encode(sample_of(talk("what is it?", "a cat", "where?", "on a mat", images=[1])))
    row = processor.encode(sample_of(talk(said, answer, "where?", "on a mat", images=[1])))
    assert counted(processor, row) == counted(processor, plain)
    ids, labels = rows_of(row)[0]
    learnt = pieces(processor.tokenizer, ids, labels)[0] if not SHAPES[name].splits else ""
    whole = text(processor.tokenizer, ids)
    assert said in whole and (answer in whole or SHAPES[name].splits)
    assert answer in learnt or SHAPES[name].splits
    prompt = processor.encode_prompt(sample_of(talk(said, answer, images=[1])), Dialog(talk(said, answer, images=[1])))
    first = np.flatnonzero(labels != IGNORE_INDEX)[0]
    assert SHAPES[name].splits or prompt.input_ids.tolist() == ids[:first].tolist()[: len(prompt.input_ids)]


@pytest.mark.parametrize("name", SHAPES)
def test_a_text_without_them_is_read_as_it_was(name):
    processor = processor_of(name)
    messages = talk(HTML, f"{HTML} it is", "where?", "on a mat")
    row = rows_of(processor.encode(sample_of(messages)))[-1][0]
    if not any(t in HTML for t in control(processor)):
        processor._chat.plain.veil = lambda text, leave=frozenset(): text
        processor._chat_now()[3].clear()  # nothing is remembered
        assert rows_of(processor.encode(sample_of(messages)))[-1][0].tolist() == row.tolist()
    assert HTML in text(processor.tokenizer, row)


@pytest.mark.parametrize("name", SHAPES)
def test_other_tokens_stay_tokens_beside_letters(name):
    processor = processor_of(name)
    processor.tokenizer.add_tokens(["<loc01>", "<box>"], special_tokens=True)
    processor = type(processor)(processor.tokenizer, processor.transform, num_image_tokens=4)
    said = f"a <loc01> {processor.tokenizer.eos_token}<box> {control(processor)[-1]} it"
    ids = rows_of(processor.encode(sample_of(talk(said, "a cat"))))[0][0].tolist()
    for token in ("<loc01>", "<box>"):
        assert ids.count(processor.tokenizer.convert_tokens_to_ids(token)) == 1


@pytest.mark.parametrize("name", ["qwen 2.5", "llama 2"])
def test_characters_of_the_veil_are_characters_too(name):
    processor = processor_of(name)
    odd = f"a {chr(FIRST)}{processor.tokenizer.eos_token}{chr(FIRST + 1)} b"
    ids = rows_of(processor.encode(sample_of(talk(odd, odd))))[0][0]
    assert text(processor.tokenizer, ids).count(odd) == 2
    again = pickle.loads(pickle.dumps(processor))
    assert rows_of(again.encode(sample_of(talk(odd, odd))))[0][0].tolist() == ids.tolist()


def test_a_typed_message_with_image_parts_holds_the_word_for_one():
    processor = processor_of("qwen 2.5")
    messages = [say("user", "what does <image> mean?", 1), say("assistant", "<image> is a tag")]
    ids = rows_of(processor.encode(sample_of(messages)))[0][0]
    assert (ids == processor.image_token_id).sum() == 4
    with pytest.raises(ZooError, match="holds the image token"):  # as transformers reads it, it would be an image
        processor.apply_chat_template(messages)
