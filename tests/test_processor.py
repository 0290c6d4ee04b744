"""Chat templates, labels and placeholders: nothing is masked in silence."""

import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from tests.conftest import ANSWERS, QUESTIONS, picture, sample
from zoo.registry import IGNORE_INDEX, Dialog, ImageTransform, Sample, ZooError
from zoo.text.processor import ZooProcessor
from zoo.text.tokenizer import CHAT_TEMPLATES, _pieces, fit_tokenizer, train_tokenizer

TRANSFORM = ImageTransform((32, 32), (0.5,) * 3, (0.5,) * 3)
TEXTS = [f"{q} {a}" for q in QUESTIONS for a in ANSWERS]

# Shapes of templates that people meet: trimmed content, text before the answer, turns that depend on what follows.
FOREIGN = {
    "trimmed": "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m['role'] }}\n\n{{ m['content'] | trim }}"
    "<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n\n{% endif %}",
    "thinking": "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' and loop.last %}"
    "<think>\n\n</think>\n\n{% endif %}{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
}


def processor_with(template: str) -> ZooProcessor:
    known = template in CHAT_TEMPLATES
    tokenizer = train_tokenizer(TEXTS, 400, template if known else "chatml")
    if not known:
        tokenizer.bos_token = "<|im_start|>"
        tokenizer.chat_template = FOREIGN[template]
    return ZooProcessor(tokenizer, TRANSFORM, num_image_tokens=4)


def learnt(processor: ZooProcessor, messages: list) -> list[str]:
    """The supervised text, turn by turn."""
    ids, labels = processor.tokenize_dialog(messages)
    assert ((labels == ids) | (labels == IGNORE_INDEX)).all()
    on = labels != IGNORE_INDEX
    starts = np.flatnonzero(on & ~np.r_[False, on[:-1]])
    turns = [ids[s : s + int((~on[s:]).argmax() or len(ids) - s)] for s in starts]
    return [processor.tokenizer.decode(t) for t in turns]


@pytest.mark.parametrize("template", [*CHAT_TEMPLATES, *FOREIGN])
def test_only_answers_and_their_end_are_learnt(template):
    processor = processor_with(template)
    end = processor.tokenizer.eos_token
    one = sample((QUESTIONS[0], "yes")).dialogs[0].messages
    (turn,) = learnt(processor, one)
    assert turn.strip().removeprefix("<think>\n\n</think>\n\n") == f"yes{end}"
    two = [*one, {"role": "user", "content": "sure?"}, {"role": "assistant", "content": "no"}]
    first, second = learnt(processor, two)
    assert first.strip() == f"yes{end}" and second.strip().endswith(f"no{end}")


@pytest.mark.parametrize("template", [*CHAT_TEMPLATES, *FOREIGN])
def test_the_quick_ways_agree_with_the_plain_one(template):
    """Skeletons and the split at special tokens give what rendering and tokenizing the whole text gives."""
    quick, plain = processor_with(template), processor_with(template)
    plain._chat._special = None
    plain._chat.answers.verbatim = ()
    for question, answer in [
        (QUESTIONS[0], "yes"),
        (QUESTIONS[3], "3 7 12 19"),
        ("what  is  this?", "a 'red' circle\nand more"),
    ]:
        messages = sample((question, answer)).dialogs[0].messages
        for a, b in zip(quick.tokenize_dialog(messages), plain.tokenize_dialog(messages), strict=True):
            assert np.array_equal(a, b)


def test_a_later_turn_that_looks_like_the_end_token_changes_nothing():
    """What follows an answer is never searched for in the text."""
    processor = processor_with("thinking")
    messages = [
        {"role": r, "content": c}
        for r, c in [("user", "hi"), ("assistant", "yes"), ("user", "im"), ("assistant", "no")]
    ]
    end = processor.tokenizer.eos_token
    assert [t.strip().removeprefix("<think>\n\n</think>\n\n") for t in learnt(processor, messages)] == [
        f"yes{end}",
        f"no{end}",
    ]


def test_every_image_becomes_its_placeholders():
    processor = processor_with("chatml")
    row = processor.encode(sample((QUESTIONS[0], "yes"), images=3))
    assert (row.input_ids == processor.image_token_id).sum() == 12 and len(row.pixel_values) == 3
    none = ZooProcessor(processor.tokenizer, TRANSFORM, num_image_tokens=0)
    assert (none.encode(sample((QUESTIONS[0], "yes"))).input_ids != processor.image_token_id).all()


def test_dialogs_share_the_prefix_that_holds_the_images():
    processor = processor_with("chatml")
    row = processor.encode(sample((QUESTIONS[0], "yes"), (QUESTIONS[1], "blue")))
    assert (row.input_ids == processor.image_token_id).sum() == 4
    prefix = int((row.blocks == 0).sum())
    assert row.input_ids[prefix - 1] == processor.image_token_id
    for block in (1, 2):
        positions = row.positions[row.blocks == block]
        assert positions[0] == prefix and (np.diff(positions) == 1).all()


def test_prompts_end_where_answers_begin():
    processor = processor_with("plain")
    s = sample((QUESTIONS[0], "yes"))
    whole, prompt = processor.encode(s), processor.encode_prompt(s, s.dialogs[0])
    first = int((whole.labels != IGNORE_INDEX).argmax())
    assert np.array_equal(whole.input_ids[:first], prompt.input_ids)


def test_an_empty_answer_is_an_error():
    with pytest.raises(ZooError, match="'s' has an empty answer"):
        processor_with("chatml").encode(sample((QUESTIONS[0], "  ")))


def test_a_dialog_without_answer_is_an_error_that_shows_the_text():
    dialog = Dialog([{"role": "user", "content": "hello"}])
    with pytest.raises(ZooError, match=r"nothing to learn.*hello"):
        processor_with("chatml").encode(Sample("x", [], [dialog]))


def test_a_template_that_hides_the_answer_is_an_error():
    processor = processor_with("chatml")
    processor.tokenizer.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'user' %}{{ m['content'] }}{% endif %}{% endfor %}"
    )
    with pytest.raises(ZooError, match="does not show the answer 'yes'"):
        processor.encode(sample((QUESTIONS[0], "yes")))


def test_a_template_that_changes_earlier_turns_is_an_error_that_says_where():
    processor = processor_with("chatml")
    processor.tokenizer.chat_template = "{{ messages | length }} {% for m in messages %}{{ m['content'] }} {% endfor %}"
    with pytest.raises(ZooError, match=r"renders turn 1 differently.*They part at '2 "):
        processor.encode(sample((QUESTIONS[0], "yes")))


def test_a_token_across_the_border_is_split_as_a_prompt_splits_it():
    processor = processor_with("chatml")
    processor.tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    dialog = Dialog([{"role": "user", "content": "a circ"}, {"role": "assistant", "content": "le"}])
    whole = processor.tokenizer("a circle")["input_ids"]
    row = processor.encode(Sample("x", [], [dialog]))
    prompt = processor.encode_prompt(Sample("x", [], []), dialog)
    assert row.input_ids[: len(whole)].tolist() != whole
    assert np.array_equal(row.input_ids[: len(prompt)], prompt.input_ids)
    assert processor.tokenizer.decode(row.labels[row.labels != IGNORE_INDEX]) == "le" + processor.tokenizer.eos_token


def test_a_token_across_the_border_is_an_error_where_text_cannot_be_split():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, "<image>": 2, "a": 3, "circle": 4}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="</s>")
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    dialog = Dialog([{"role": "user", "content": "a circ"}, {"role": "assistant", "content": "le"}])
    with pytest.raises(ZooError, match=r"'x'.*runs across the border.*>>>"):
        ZooProcessor(fit_tokenizer(tokenizer, "words"), TRANSFORM).encode(Sample("x", [], [dialog]))


def test_images_and_image_parts_must_match():
    s = sample((QUESTIONS[0], "yes"), images=2)
    s.images.pop()
    with pytest.raises(ZooError, match="'s' has 1 images, but a dialog shows 2"):
        processor_with("chatml").encode(s)


def test_an_image_token_in_a_text_is_letters():
    processor = processor_with("chatml")
    row = processor.encode(sample(("what is <image>?", "yes")))
    assert (row.input_ids == processor.image_token_id).sum() == 4
    assert "what is <image>?" in processor.tokenizer.decode(row.input_ids)


def test_the_call_of_transformers_works():
    processor = processor_with("chatml")
    image = Image.fromarray(picture(size=48))
    batch = processor(images=[image, image], text=["<image>\nhi", "<image> there you are"])
    assert batch["pixel_values"].shape == (2, 3, 32, 32)
    assert (batch["input_ids"] == processor.image_token_id).sum(1).tolist() == [4, 4]
    with pytest.raises(ZooError, match="holds 1 times '<image>', but 2 images"):
        processor(images=[image, image], text="<image>")
    messages = [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": "hi"}]}]
    out = processor.apply_chat_template(messages, tokenize=True, add_generation_prompt=True, return_dict=True)
    assert out["pixel_values"].shape[0] == 1 and torch.equal(out["attention_mask"], torch.ones_like(out["input_ids"]))
    assert processor.decode(out["input_ids"][0]).endswith("<|im_start|>assistant\n")


def test_saved_and_loaded_is_the_same(tmp_path):
    processor = processor_with("plain")
    processor.save_pretrained(tmp_path)
    again = ZooProcessor.from_pretrained(tmp_path)
    assert (again.transform, again.num_image_tokens, again.image_separator) == (TRANSFORM, 4, "\n")
    s = sample((QUESTIONS[0], "yes"), (QUESTIONS[1], "blue"))
    assert np.array_equal(processor.encode(s).input_ids, again.encode(s).input_ids)


def test_a_tokenizer_is_trained_in_time_where_a_word_is_a_whole_file():
    took = time.process_time()
    long = train_tokenizer(["what " + "w" * 200_000, *TEXTS], 400)
    assert time.process_time() - took < 4  # 11 seconds as one word, and the square of the length beyond
    assert long.decode(long("what ww").input_ids) == "what ww"
    for text in (*TEXTS, "", "a" * 4096, "a" * 9000, " " * 5000 + "é b" * 4000):
        assert "".join(_pieces(text)) == text and (len(text) >= 4096 or len(list(_pieces(text))) == 1)


def test_a_tokenizer_is_trained_beside_a_text_that_is_none():
    assert train_tokenizer([*TEXTS, "\ud800 and \udfff"], 300).vocab_size == train_tokenizer(TEXTS, 300).vocab_size


def test_tokens_that_are_kept_do_not_fill_the_memory(monkeypatch):
    """Dialogs of most data sets are read once in an epoch; those that repeat are found."""
    monkeypatch.setattr("zoo.text.processor._CACHED", 400)
    monkeypatch.setattr("zoo.text.tokenized_chat._CACHED", 400)
    processor, fresh = processor_with("chatml"), processor_with("chatml")
    for number in range(40):
        one = sample((f"{QUESTIONS[0]} {number % 30}", f"{ANSWERS[0]} {number}"))
        kept, alone = processor.encode(one), fresh.encode(one)
        assert (kept.input_ids == alone.input_ids).all() and (kept.labels == alone.labels).all()
        assert processor.encode(one).input_ids is kept.input_ids
        for held in (processor._chat_now()[3], processor._chat._segments):
            assert 0 < held.tokens <= 400
        fresh._made = None


def test_dialogs_that_cannot_share_their_images_are_refused_with_what_helps(processor_of_captions):
    """Behind an image at once, a second caption would be predicted from the end of the first one."""
    captions = sample(("", "red"), ("", "blue"))
    with pytest.raises(ZooError, match=r"nothing between an image and an answer.* Set pack=none"):
        processor_of_captions.encode(captions)
    for one in captions.dialogs:
        row = processor_of_captions.encode(replace(captions, dialogs=[one]))
        assert row.labels[3] == IGNORE_INDEX and (row.labels[4:] == row.input_ids[4:]).all()
    asked = sample(("what is it?", "red"), ("what else?", "blue"))
    for dialog in asked.dialogs:
        dialog.messages[0]["content"].reverse()  # the question ahead of the image
    with pytest.raises(ZooError, match=r"do not begin alike.* Set pack=none"):
        processor_with("chatml").encode(asked)


@pytest.fixture
def processor_of_captions() -> ZooProcessor:
    """Its template writes images by itself, and nothing around them."""
    tokenizer = train_tokenizer(TEXTS, 400, "chatml")
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m['content'] is string %}{{ m['content'] }}{% else %}"
        "{% for part in m['content'] %}{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}"
        "{% endfor %}{% endif %}{% if m['role'] == 'assistant' %}<|im_end|>{% endif %}{% endfor %}"
    )
    return ZooProcessor(tokenizer, TRANSFORM, num_image_tokens=4)
