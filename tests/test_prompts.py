"""Chat templates as they are exported: typed messages become the very text that our processor makes of them."""

import pytest

import zoo
from tests import published_builders as build
from zoo.published.prompts import template_of
from zoo.registry import ZooError
from zoo.text.tokenizer import CHAT_TEMPLATES

TEMPLATES = {
    **{name: text for name, (text, _) in CHAT_TEMPLATES.items()},
    # Begins with a line feed, and with a block that is set back: white space that jinja may take away.
    "white space": "\n  {% for m in messages %}\n  <{{ m['role'] }}> {{ m['content'] | trim }}\n  {% endfor %}\nend\n",
    "macros": (
        "{%- macro turn(m) %}{{ m.role }}: {{ m.content }}{{ ' / ' ~ messages | length }}\n{% endmacro -%}"
        "{% for m in messages %}{{ turn(m) }}{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
    ),
    "first turn apart": (
        "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
        "{% set head = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}{% set head = '' %}"
        "{% endif %}"
        "{% for message in loop_messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('roles must alternate') }}{% endif %}[{{ message['role'] }}] "
        "{{ (head if loop.first else '') + message['content'] }}</s>{% endfor %}"
    ),
}
IMAGE = {"type": "image", "image": build.photo(32, 32)}
TALKS = {
    "image first": [{"role": "user", "content": [IMAGE, {"type": "text", "text": "what\nis {{ this }}?"}]}],
    "images between": [
        {"role": "system", "content": [{"type": "text", "text": "be brief"}]},
        {"role": "user", "content": [{"type": "text", "text": "one "}, IMAGE, {"type": "text", "text": " two"}, IMAGE]},
        {"role": "assistant", "content": [{"type": "text", "text": "yes"}]},
        {"role": "user", "content": 'and "now"?'},
    ],
    "text alone": [{"role": "user", "content": "hello"}],
}


@pytest.fixture(scope="module")
def processor():
    parts = ["vision=timm", "vision.image_size=32", "vision.depth=2", "projector=mlp", "llm=hf", "llm.num_layers=1"]
    return zoo.compose(*parts, "tokenizer.chat_template=chatml", texts=build.WORDS)[1]


@pytest.mark.parametrize("talk", TALKS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_for_text_takes_parts(processor, name, talk):
    from transformers.utils.chat_template_utils import render_jinja_template

    processor.chat_template = TEMPLATES[name]
    for opening in (True, False):
        want = processor.apply_chat_template(TALKS[talk], add_generation_prompt=opening)
        (got,), _ = render_jinja_template(
            conversations=[TALKS[talk]], chat_template=template_of(processor), add_generation_prompt=opening,
            **processor.tokenizer.special_tokens_map,
        )  # fmt: skip
        assert got == want
    assert want.count("<image>") == sum(p == IMAGE for m in TALKS[talk] for p in m["content"])


def test_other_parts_are_refused_by_the_template(processor):
    from jinja2.exceptions import TemplateError
    from transformers.utils.chat_template_utils import render_jinja_template

    talk = [{"role": "user", "content": [{"type": "video", "video": "a.mp4"}]}]
    with pytest.raises(TemplateError, match="images and text, not video"):
        render_jinja_template(conversations=[talk], chat_template=template_of(processor))


def test_a_token_that_the_layout_needs_is_missing(processor):
    from zoo.published.prompts import tokenizer_of

    with pytest.raises(ZooError, match="the tokenizer has no '<video>'"):
        tokenizer_of(processor, {"video_token": "<video>"})
