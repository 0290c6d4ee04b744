"""Chat template and tokenizer set on a processor after it was made, on whichever of the two people set them."""

import numpy as np
import pytest
from transformers import GenerationConfig

import zoo
from tests import published_builders as build
from zoo.registry import Dialog, Sample, ZooError
from zoo.text.processor import ZooProcessor

PARTS = ["vision=hf", "vision.width=16", "vision.depth=1", "vision.heads=2", "vision.image_size=16",
         "vision.patch_size=8", "projector=mlp", "llm=hf", "llm.hidden_size=16", "llm.num_layers=1",
         "tokenizer.chat_template=chatml"]  # fmt: skip
TALK = [{"role": "user", "content": "is there a red circle?"}, {"role": "assistant", "content": "yes"}]
TEMPLATES = {
    "of text": "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}",
    "of parts": "{% for m in messages %}({{ m['role'] }}) {% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<image>{% else %}{{ c['text'] }}{% endif %}{% endfor %}</s>{% endfor %}"
    "{% if add_generation_prompt %}(assistant) {% endif %}",
}


@pytest.fixture
def processor():
    return zoo.compose(*PARTS, texts=build.WORDS)[1]


def sample():
    return Sample("s", images=[], dialogs=[Dialog(TALK)])


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("on", ["processor", "tokenizer"])
def test_what_is_trained_follows_the_template(processor, template, on):
    processor.encode(sample())  # remembered by the template before
    (processor if on == "processor" else processor.tokenizer).chat_template = TEMPLATES[template]
    now = processor.encode(sample())
    fresh = ZooProcessor(
        processor.tokenizer, **{k: v for k, v in processor.to_dict().items() if k != "processor_class"}
    )
    wanted = fresh.encode(sample())
    assert np.array_equal(now.input_ids, wanted.input_ids) and np.array_equal(now.labels, wanted.labels)
    assert processor.tokenizer.decode(now.input_ids) == processor.apply_chat_template(TALK, tokenize=False)
    assert processor.image_separator == fresh.image_separator


def test_a_tokenizer_without_the_image_token_is_refused(processor):
    import transformers as t

    plain = build.tokenizer().backend_tokenizer
    other = t.PreTrainedTokenizerFast(tokenizer_object=plain, pad_token="<pad>", eos_token="</s>")
    other.chat_template = TEMPLATES["of text"]
    own = processor.tokenizer
    options = {k: v for k, v in processor.to_dict().items() if k != "processor_class"} | {"image_token": "<picture>"}
    with pytest.raises(ZooError, match="no image token '<picture>'"):
        ZooProcessor(other, **options)
    other.add_tokens(["x1", "x2", own.image_token])
    processor.tokenizer = other
    with pytest.raises(ZooError, match=f"and {processor.image_token_id} in the model's"):
        processor.apply_chat_template(TALK, tokenize=True)
    processor.tokenizer = own
    assert processor.encode(sample()).input_ids.size


@pytest.mark.parametrize("road", ["chat", "export"])
def test_answers_end_where_the_template_that_was_set_ends_them(tmp_path, road):
    model, processor = zoo.compose(*PARTS, texts=build.WORDS)
    other = next(t for t in processor.tokenizer.all_special_tokens if t != processor.tokenizer.eos_token)
    number = processor.tokenizer.convert_tokens_to_ids(other)
    model.generation_config.eos_token_id = processor.tokenizer.eos_token_id
    processor.chat_template = TEMPLATES["of text"].replace("</s>", other)
    if road == "chat":
        model.chat("is there a red circle?", max_new_tokens=1)
        model.save_pretrained(tmp_path)
    else:
        zoo.export(model, processor, tmp_path)
    assert number in GenerationConfig.from_pretrained(tmp_path).eos_token_id
