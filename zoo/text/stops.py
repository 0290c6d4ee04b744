"""End tokens and end texts of a model's answers, and reading an answer without them.

A checkpoint states end tokens in generation_config.json (Gemma, Llama 3 and Phi-3 several), a tokenizer has its
end-of-sequence token, and a chat template writes something behind each answer. Generation stops at all of them.
"""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any

from zoo.registry import ZooError
from zoo.registry.foreign import CONFIG, require_file
from zoo.text.chat_template import ChatTemplate
from zoo.text.tokenizer_files import read_tokenizer


@dataclass(frozen=True)
class Stops:
    """Ends of an answer: ids of single tokens, and texts of several tokens."""

    ids: tuple[int, ...]
    texts: tuple[str, ...] = ()


def stops_of(template: ChatTemplate) -> Stops:
    """Return the ends of answers of a chat template, the tokenizer's end-of-sequence token included."""
    ids, texts = [], []
    for end in template.ends:
        special = {*template.special, template.tokenizer.eos_token}
        token = max((t for t in special if t and end.endswith(t)), key=len, default=None)
        if token is None:
            texts.append(end)
        else:
            ids.append(template.tokenizer.convert_tokens_to_ids(token))
    return Stops(tuple(dict.fromkeys(ids)), tuple(texts))


def listed(given: Any) -> list[Any]:
    """Convert a value of a generation config that may be one, a list or None (end tokens, stop strings) to a list."""
    return [] if given is None else [given] if isinstance(given, (int, str)) else list(given)


def stated_config(model: Any, folder: Path | None) -> Any:
    """Read the generation config of a checkpoint: that of its folder, or of its language model."""
    from transformers import GenerationConfig

    if folder is None or not (folder / "generation_config.json").is_file():
        return model.llm.lm.generation_config or GenerationConfig()
    require_file(folder / "generation_config.json", CONFIG)
    try:
        config = GenerationConfig.from_pretrained(folder)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ZooError(f"{folder}/generation_config.json cannot be read: {' '.join(str(error).split())}") from error
    for name, value in vars(config).items():
        if wrong := _wrong_type(name, value):
            raise ZooError(f"{folder}/generation_config.json states {name}={value!r:.60}, where {wrong} is needed.")
    return config


def _wrong_type(name: str, value: Any) -> str:
    """Describe the type that a field of a generation config must have and has not; transformers does not check it."""
    if value is None:
        return ""
    if name.endswith("_token_id"):
        ids = value if isinstance(value, list) else [value]
        return "" if all(type(token) is int for token in ids) else "an id of a token, or a list of them,"
    if name.startswith("output_") or name in ("use_cache", "do_sample", "return_dict_in_generate"):
        return "" if isinstance(value, bool) else "true or false"
    return "a finite number" if isinstance(value, float) and not isfinite(value) else ""


def require_valid(config: Any) -> None:
    """Refuse to save a generation config that could not be read again.

    Raises:
        ZooError: with the values that are not allowed.
    """
    try:
        config.validate()
    except ValueError as error:
        raise ZooError(f"model.generation_config cannot be saved: {' '.join(str(error).split())}") from error


def write_config(config: Any, folder: Path) -> None:
    """Write generation_config.json.

    Published checkpoints state options of sampling without `do_sample` (Vicuna). transformers' own `save_pretrained`
    refuses these as soon as another field differs from the file that was read, such as an end token.
    """
    config.to_json_file(folder / "generation_config.json", keys_to_pop=["compile_config"])


def keep_shared(config: Any, tokenizer: Any, llm: Mapping[str, Any], source: str | None) -> None:
    """Keep those of a language model's end tokens that are the same tokens in the composed model's tokenizer.

    Args:
        config: the generation config of the language model.
        tokenizer: of the composed model.
        llm: node of the language model.
        source: where the tokenizer came from; None or empty: from the language model.
    """
    checkpoint = llm.get("checkpoint")
    stated = listed(config.eos_token_id)
    if not source or source == checkpoint or not (stated or config.pad_token_id is not None):
        return
    kept: list[int] = []
    if checkpoint and stated:
        with suppress(ZooError):  # without a tokenizer the meaning of its ids is unknown
            theirs = read_tokenizer(checkpoint, revision=llm.get("revision") or None)
            ours, tokens = tokenizer.convert_ids_to_tokens(stated), theirs.convert_ids_to_tokens(stated)
            kept = [i for i, a, b in zip(stated, ours, tokens, strict=True) if a == b and a is not None]
    config.eos_token_id, config.pad_token_id = kept or None, None


def end_tokens(config: Any, tokenizer: Any) -> list[str]:
    """Return the added tokens that a generation config states as ends, except the end-of-sequence token."""
    added = tokenizer.added_tokens_decoder  # ordinary words may be stated as ends too: these are not marks of an answer
    return [added[i].content for i in listed(config.eos_token_id) if i in added and i != tokenizer.eos_token_id]


def set_stops(model: Any, template: ChatTemplate, config: Any) -> None:
    """Let a model stop where its answers end.

    Args:
        model: composed.
        template: of its processor.
        config: the generation config that its checkpoint states; it becomes the model's.
    """
    stops = stops_of(template)
    ids = list(dict.fromkeys([*listed(config.eos_token_id), *stops.ids]))
    config.eos_token_id = ids[0] if len(ids) == 1 else ids
    config.stop_strings = list(dict.fromkeys([*listed(config.stop_strings), *stops.texts])) or None
    if config.pad_token_id is None:
        config.pad_token_id = template.tokenizer.pad_token_id
    model.generation_config = config
    model.config.eos_token_id = config.eos_token_id


def keep_stops(model: Any, template: ChatTemplate) -> None:
    """Let a model stop where its chat template ends answers now: it may have been set after loading."""
    config, stops = model.generation_config, stops_of(template)
    known = {*listed(config.eos_token_id)}, {*listed(config.stop_strings)}
    if not (known[0].issuperset(stops.ids) and known[1].issuperset(stops.texts)):
        set_stops(model, template, config)


def reader_for(model: Any, template: ChatTemplate) -> "AnswerReader":
    """Return a reader of a model's answers, and let the model stop at their ends."""
    if model.generation_config is not None:
        keep_stops(model, template)
    config = model.generation_config
    return AnswerReader(template.tokenizer, template, listed(config.eos_token_id if config else None))


class AnswerReader:
    """Extracts answers from generated tokens, without their ends and the template's lead before them.

    Args:
        tokenizer: of the model.
        template: its chat template.
        ids: further end tokens, stated by the checkpoint.
    """

    def __init__(self, tokenizer: Any, template: ChatTemplate, ids: Iterable[int] = ()) -> None:
        self.tokenizer = tokenizer
        stops = stops_of(template)
        self.ids = {*stops.ids, *ids}
        self.ends = stops.texts
        lead = tokenizer(template.closing.lead, add_special_tokens=False)["input_ids"]
        self.lead = tokenizer.decode(lead, skip_special_tokens=True).strip()

    def read(self, ids: Sequence[int]) -> str:
        """Return the answer of generated tokens."""
        return self.visible(self.tokenizer.decode(self.before_end(ids), skip_special_tokens=True)).strip()

    def before_end(self, ids: Sequence[int]) -> Sequence[int]:
        """Return the tokens before the first end token, which decoding would show if it is not special."""
        return ids[: next((at for at, token in enumerate(ids) if token in self.ids), len(ids))]

    def visible(self, text: str, final: bool = True) -> str:
        """Return the part of a text that is the answer.

        Args:
            text: generated so far.
            final: no text follows; else a possible beginning of an end, or of the lead, is held back.
        """
        begun = text.lstrip()
        if self.lead and begun.startswith(self.lead):
            text = begun[len(self.lead) :]
        elif self.lead and not final and self.lead.startswith(begun):
            return ""
        found = [at for end in self.ends if (at := text.find(end)) >= 0]
        if found:
            return text[: min(found)]
        held = 0
        if not final:
            sizes = (n for end in self.ends for n in range(1, min(len(end), len(text) + 1)) if text.endswith(end[:n]))
            held = max(sizes, default=0)
        return text[: len(text) - held]


def streamer(reader: AnswerReader, stream: Any) -> Any:
    """Return a streamer for `generate` that calls `stream` with each new piece of the answer."""
    from transformers import TextStreamer

    class Pieces(TextStreamer):
        text, sent = "", 0

        def put(self, value: Any) -> None:
            if not self.next_tokens_are_prompt:
                value = value.new_tensor(reader.before_end(value.flatten().tolist()))
            super().put(value)

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            self.text += text
            shown = reader.visible(self.text, final=stream_end)
            if len(shown) > self.sent:
                stream(shown[self.sent :])
                self.sent = len(shown)

    return Pieces(reader.tokenizer, skip_prompt=True, skip_special_tokens=True)
