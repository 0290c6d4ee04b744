"""Convert the tokenizer and chat template of a composed model for transformers' processors.

Our processor converts the parts of a message to plain text, with a token for each image, before a template is applied,
so that templates of text-only language models work unchanged. The exported template does the same itself.
"""

import copy
import json
from typing import Any

from zoo.registry import ZooError
from zoo.text.chat_template import takes_parts
from zoo.text.tokenizer import name_tokens

# Ahead of a template that takes plain text. It ends in a newline, which trim_blocks takes away, so that the template
# behind it begins at the start of a line, as it was written to.
_FLATTEN = """\
{%- set plain = namespace(messages=[]) -%}
{%- for message in messages -%}
  {%- set turn = namespace(text='') -%}
  {%- if message['content'] is string or not message['content'] -%}
    {%- set turn.text = message['content'] -%}
  {%- else -%}
    {%- for part in message['content'] -%}
      {%- if part['type'] == 'image' -%}
        {%- set turn.text = turn.text + IMAGE -%}
      {%- elif part['type'] == 'text' -%}
        {%- set turn.text = turn.text + part['text'] -%}
      {%- else -%}
        {{- raise_exception('This model takes images and text, not ' + part['type'] + '.') -}}
      {%- endif -%}
    {%- endfor -%}
  {%- endif -%}
  {%- set plain.messages = plain.messages + [dict(message, content=turn.text)] -%}
{%- endfor -%}
{%- set messages = plain.messages %}
"""


def template_of(processor: Any) -> str:
    """Return the chat template of a processor, for messages with typed parts."""
    tokenizer = processor.tokenizer
    if takes_parts(tokenizer):
        return tokenizer.chat_template
    image = json.dumps(processor.image_token + processor.image_separator)
    return _FLATTEN.replace("IMAGE", image) + tokenizer.get_chat_template()


def tokenizer_of(processor: Any, names: dict[str, str]) -> Any:
    """Copy a tokenizer, with names for the tokens that the processor of a layout needs.

    Where our prompts are all that a template writes, transformers' processors would put a beginning in front that the
    tokenizer adds by itself: it no longer does. Padding goes to the left, as their `generate` needs it: our own asks
    for that side by itself, pipelines of transformers take that of the tokenizer.

    Args:
        processor: ours.
        names: attribute of the tokenizer -> token.

    Raises:
        ZooError: the tokenizer lacks one of the tokens.
    """
    tokenizer = copy.deepcopy(processor.tokenizer)
    vocabulary = tokenizer.get_vocab()
    for token in names.values():
        if token not in vocabulary:
            raise ZooError(f"the tokenizer has no {token!r}, which the layout's processor asks for")
    name_tokens(tokenizer, names)
    tokenizer.padding_side = "left"
    if not takes_parts(processor.tokenizer):
        _add_nothing(tokenizer)
    tokenizer.chat_template = template_of(processor)
    return tokenizer


def _add_nothing(tokenizer: Any) -> None:
    """Remove special tokens that a tokenizer adds around a text."""
    whole, alone = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (True, False))
    if whole == alone:
        return
    if (backend := getattr(tokenizer, "backend_tokenizer", None)) is None:
        raise ZooError(f"{type(tokenizer).__name__} puts tokens around texts that the model was not trained with")
    from tokenizers.processors import TemplateProcessing

    backend.post_processor = TemplateProcessing(single="$A", pair="$A $B")
