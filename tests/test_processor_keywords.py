"""Keywords of a processor's `from_pretrained`, tokenizers without padding, and what a chat takes."""

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoConfig, AutoProcessor, AutoTokenizer, PreTrainedTokenizerFast

import zoo
from tests import published_builders as build
from tests.test_model_keywords import PARTS
from zoo.registry import ZooError


@pytest.fixture(scope="module")
def pair():
    return zoo.compose(*PARTS, "llm.extra={hidden_act: relu}", texts=build.WORDS)


@pytest.fixture(scope="module")
def folder(pair, tmp_path_factory):
    place = tmp_path_factory.mktemp("model")
    for part in pair:
        part.save_pretrained(place)
    return place


def test_keywords_are_known_or_refused(folder):
    with pytest.raises(ZooError, match=r"named 'foo'"):
        AutoProcessor.from_pretrained(folder, foo=1)
    with pytest.raises(ZooError, match=r"named 'padding_sid'\. Did you mean 'padding_side'"):
        AutoProcessor.from_pretrained(folder, padding_sid="left")
    with pytest.raises(ZooError, match=r"image_processor= is not possible here"):
        AutoProcessor.from_pretrained(folder, image_processor=object())
    found = AutoProcessor.from_pretrained(
        folder, padding_side="left", end_tokens=["x"], use_fast=True, local_files_only=True, trust_remote_code=False
    )
    assert found.tokenizer.padding_side == "left" and found.end_tokens == ["x"]


def test_a_tokenizer_of_ones_own(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    tokenizer.chat_template = None
    found = AutoProcessor.from_pretrained(folder, tokenizer=tokenizer)
    assert found.tokenizer is tokenizer and tokenizer.chat_template
    batch = found(text=["a", "a a"])
    assert batch["attention_mask"][0, 0] == 0  # on the left
    other = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"a": 0, "?": 1}, "?")), unk_token="?")
    with pytest.raises(ZooError, match="image token"):
        AutoProcessor.from_pretrained(folder, tokenizer=other)
    with pytest.raises(ZooError, match="takes a tokenizer of transformers, got str"):
        AutoProcessor.from_pretrained(folder, tokenizer="there")


def test_rows_without_a_padding_token(folder):
    processor = AutoProcessor.from_pretrained(folder)
    wanted = processor(text="a a")
    processor.tokenizer.pad_token = None
    for text in ("a a", ["a a"]):
        assert torch.equal(processor(text=text)["input_ids"], wanted["input_ids"])
    with pytest.raises(ZooError, match=r"no padding token.*pad_token = processor\.tokenizer\.eos_token"):
        processor(text=["a", "a a"])
    with pytest.raises(ZooError, match="no padding token"):
        processor(text="a", padding="max_length", max_length=8)
    assert len(processor(text=["a", "a a"], padding=False)["input_ids"]) == 2


def test_a_chat_takes_text(pair):
    with pytest.raises(ZooError, match=r"question as a text, got list.*apply_chat_template"):
        pair[0].chat([{"role": "user", "content": "hi"}])


def test_sizes_of_the_text_side_before_there_is_a_model(pair, folder):
    text = AutoConfig.from_pretrained(folder).get_text_config()
    assert (text.vocab_size, text.hidden_size) == (len(pair[1].tokenizer), 16)
    assert not hasattr(text, "nothing_of_the_kind") and not hasattr(zoo.ZooConfig(), "vocab_size")
    text.slots["llm"]["checkpoint"] = "org/name"
    with pytest.raises(AttributeError, match=r"hidden_size follows from the checkpoint 'org/name'"):
        _ = text.hidden_size
    assert pair[0].config.get_text_config().hidden_size == 16


def test_a_checkpoint_beside_a_model_that_holds_all_weights(folder):
    with pytest.raises(ZooError, match=r"has all weights of its llm.*omit the option"):
        zoo.load(f"dir:{folder}", "llm.checkpoint=./moved", device="cpu")
