"""Tokenizers: the LLM's own, or a byte-level BPE trained on the run's text; and the zoo's chat templates.

Messages are given to a template with plain string content, with the image token for each image, so that the templates
of text-only LLMs work unchanged.
"""

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from zoo.registry import ZooError, unknown
from zoo.text.chat_template import ChatTemplate, variables_of
from zoo.text.stops import stops_of
from zoo.text.tokenizer_files import read_tokenizer

IMAGE_TOKEN = "<image>"
OF_MODEL = "model:"  # before a model's name: the tokenizer of this model (`zoo.settings.source.tokenizer_at`)

# name -> (template, text between an image and the text after it)
CHAT_TEMPLATES = {
    "plain": (
        "{% for m in messages %}{% if m['role'] == 'assistant' %}<|assistant|>{{ m['content'] }}<|end|>"
        "{% else %}{{ m['content'] }}{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}",
        "",
    ),
    "chatml": (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        "\n",
    ),
    "vicuna": (
        "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}{{ m['content'] }} {% elif m['role'] == "
        "'user' %}USER: {{ m['content'] }} {% else %}ASSISTANT: {{ m['content'] }}</s>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}ASSISTANT:{% endif %}",
        "\n",
    ),
}
_BEGIN = "{{ bos_token }}"
TEXTS = {begin + text: name for name, (text, _) in CHAT_TEMPLATES.items() for begin in ("", _BEGIN)}
_SPECIAL = {"plain": ("<|assistant|>", "<|end|>"), "chatml": ("<|im_start|>", "<|im_end|>"), "vicuna": ("<s>", "</s>")}

_LONG = re.compile(r"\S{4096}|\s{4096}")  # not a word, but base64 or a line of symbols


def image_separator(template: str) -> str:
    """Return the text between an image and the text after it; for foreign templates a newline, as in LLaVA."""
    return CHAT_TEMPLATES[template][1] if template in CHAT_TEMPLATES else "\n"


def template_for(name: str, tokenizer: Any) -> str:
    """Return the text of one of `CHAT_TEMPLATES`, with the beginning (`<s>`) that the tokenizer puts ahead of texts.

    A template of text writes the whole prompt, and language models whose texts had a beginning were trained with it.
    """
    text = CHAT_TEMPLATES[name][0]
    begins = tokenizer.bos_token and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    return _BEGIN + text if begins and not text.startswith(_BEGIN) else text


def train_tokenizer(texts: Iterable[str], vocab_size: int, template: str = "plain") -> Any:
    """Train a byte-level BPE on `texts`; every byte stays representable, frequent words become one token.

    Args:
        texts: user and assistant turns, without special tokens.
        vocab_size: an upper bound, special tokens included; at least 256 + 4.
        template: name of one of `CHAT_TEMPLATES`; its markers become special tokens.

    Returns:
        A transformers tokenizer with pad, end-of-sequence and image token, and the chat template.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    if template not in CHAT_TEMPLATES:
        raise unknown("chat template", template, CHAT_TEMPLATES)
    require_vocab_size(vocab_size, template)
    special = ["<pad>", IMAGE_TOKEN, *_SPECIAL[template]]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator((piece for text in texts for piece in _pieces(text)), trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token="<pad>",
        eos_token=_SPECIAL[template][1],
        padding_side="right",
        extra_special_tokens={"image_token": IMAGE_TOKEN},
    )
    tokenizer.chat_template = CHAT_TEMPLATES[template][0]
    return tokenizer


def _pieces(text: str) -> Iterator[str]:
    """Cut a text at very long words: the trainer's time grows with the square of a word's length.

    Lone surrogates are not characters and are left out; records with one are reported when they are read.
    """
    text, start = text.encode("utf-8", "ignore").decode(), 0
    for run in _LONG.finditer(text):
        yield text[start : run.end()]
        start = run.end()
    yield text[start:]


def require_vocab_size(vocab_size: int, template: str) -> None:
    """Refuse a vocabulary that cannot hold all bytes and the special tokens."""
    least = 256 + 2 + len(_SPECIAL[template])
    if vocab_size < least:
        raise ZooError(
            f"tokenizer.vocab_size must be at least {least} (all bytes and special tokens), got {vocab_size}."
        )


def load_tokenizer(checkpoint: str, template: str = "", image_token_id: int | None = None, **hub: Any) -> Any:
    """Load the tokenizer of an LLM and give it what a vision-language model needs: an image token, padding, a template.

    Args:
        checkpoint: hub name or folder.
        template: name of one of `CHAT_TEMPLATES` to use in place of the tokenizer's own; required if it has none.
        image_token_id: of the placeholder of images, if it is known; None: that of the tokenizer.
        hub: options of `from_pretrained`.

    Raises:
        ZooError: there is no chat template; or neither an end-of-sequence token nor one at the end of answers.
    """
    tokenizer = read_tokenizer(checkpoint, **hub)
    if image_token_id is not None and 0 <= image_token_id < len(tokenizer):
        tokenizer.image_token = tokenizer.convert_ids_to_tokens(image_token_id)
    return fit_tokenizer(tokenizer, checkpoint, template)


def set_template_options(tokenizer: Any, options: Mapping[str, Any]) -> Any:
    """Set other defaults for variables of the chat template, in place, such as `enable_thinking: false` of Qwen 3.

    They become part of the template, and are saved and exported with it; a call may still override them.

    Raises:
        ZooError: the template has no such variable, or the value is not plain.
    """
    for name, value in options.items():
        if not isinstance(value, (bool, int, float, str)):
            raise ZooError(f"tokenizer.template_options.{name} must be true, false, a number or a text, got {value!r}.")
        template = tokenizer.get_chat_template()
        require_variables([name], template)
        line = "{% set " + f"{name} = {name} | default({value!r})" + " %}"
        if line not in template:  # a saved template has them already
            tokenizer.chat_template = line + ("\n" if template.startswith("\n") else "") + template
    return tokenizer


def require_variables(names: Iterable[str], template: str) -> None:
    """Refuse names that a chat template has no variable of, and those of what it is always given.

    Raises:
        ZooError: with the nearest.
    """
    known = variables_of(template) - {"messages", "tools", "documents", "add_generation_prompt"}
    for name in names:
        if name not in known:
            raise unknown("variable of the chat template", name, known)


def fit_tokenizer(tokenizer: Any, source: str, template: str = "") -> Any:
    """Add the image token, padding and the chat template in place; see `load_tokenizer`."""
    if template:
        if template not in CHAT_TEMPLATES:
            raise unknown("chat template", template, CHAT_TEMPLATES)
        tokenizer.chat_template = template_for(template, tokenizer)
        missing = [t for t in _SPECIAL[template] if t not in tokenizer.get_vocab()]
        if missing:
            tokenizer.add_special_tokens({"extra_special_tokens": missing}, replace_extra_special_tokens=False)
    if not tokenizer.chat_template:
        raise ZooError(
            f"The tokenizer of {source!r} has no chat template. "
            f"Set tokenizer.chat_template to one of: {', '.join(CHAT_TEMPLATES)}."
        )
    if getattr(tokenizer, "image_token", None) is None:
        if IMAGE_TOKEN not in tokenizer.get_vocab():
            tokenizer.add_tokens([IMAGE_TOKEN], special_tokens=True)
        name_tokens(tokenizer, {"image_token": IMAGE_TOKEN})
    tokenizer.image_token_id = tokenizer.convert_tokens_to_ids(tokenizer.image_token)
    if tokenizer.eos_token is None:  # use the template's end of answers, if it is a single token
        ends = stops_of(ChatTemplate(tokenizer)).ids
        if not ends:
            raise ZooError(f"The tokenizer of {source!r} has no end-of-sequence token, so answers could never end.")
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(ends[0])
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def add_special(tokenizer: Any, tokens: Iterable[str]) -> None:
    """Add special tokens that the tokenizer lacks; they are never split, anywhere in a text."""
    known = tokenizer.get_vocab()
    if missing := [token for token in dict.fromkeys(tokens) if token not in known]:
        tokenizer.add_tokens(missing, special_tokens=True)


def name_tokens(tokenizer: Any, names: Mapping[str, str]) -> None:
    """Give tokens of the vocabulary names such as `image_token`, which are saved with the tokenizer."""
    tokenizer._set_model_specific_special_tokens(special_tokens=dict(names))


def shared_tokens(student: Any, teacher: Any) -> int:
    """Count the tokens that two tokenizers share: all of the smaller one.

    Raises:
        ZooError: an id has different tokens, or the chat templates differ.
    """
    ours, theirs = (t.get_vocab() for t in (student, teacher))
    size = min(len(ours), len(theirs))
    mine, other = ({i: token for token, i in v.items() if i < size} for v in (ours, theirs))
    odd = next((i for i in range(size) if mine.get(i) != other.get(i)), None)
    if odd is not None:
        raise ZooError(
            f"student and teacher have different tokenizers: token {odd} is {mine.get(odd)!r} for the student and "
            f"{other.get(odd)!r} for the teacher"
        )
    if student.chat_template != teacher.chat_template:
        raise ZooError("student and teacher have different chat templates, so their sequences do not match")
    return size


def tokens_hash(tokenizer: Any) -> str:
    """Hash the tokens of a tokenizer in the order of their ids, and its chat template."""
    words = [w for w, _ in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])]
    return hashlib.sha256("\n".join([*words, tokenizer.chat_template or ""]).encode()).hexdigest()


def require_token(tokenizer: Any, token: str, wanted: int | None) -> None:
    """Refuse the tokenizer of another model, which would split the image token into letters.

    Raises:
        ZooError: it lacks the token, or has it under another id.
    """
    found = tokenizer.convert_tokens_to_ids(token)
    if found is None or found == tokenizer.unk_token_id:
        raise ZooError(
            f"The tokenizer has no image token {token!r}. Take the one that was saved with the model: "
            "AutoTokenizer.from_pretrained(<its folder>)."
        )
    if found != wanted:
        raise ZooError(f"The image token {token!r} has id {found} in this tokenizer, and {wanted} in the model's.")


def pad_id_of(tokenizer: Any, rows: int) -> int:
    """The id of padding; any id where there is one row, whose padding is masked.

    Raises:
        ZooError: several rows, and the tokenizer has no padding token.
    """
    if tokenizer.pad_token_id is not None:
        return int(tokenizer.pad_token_id)
    if rows > 1:
        raise ZooError(
            "The tokenizer has no padding token, and several rows are padded to one length: set "
            "processor.tokenizer.pad_token = processor.tokenizer.eos_token, or pass padding=False."
        )
    return 0
