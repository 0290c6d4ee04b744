"""`apply_chat_template` of the processor: render chat messages, and tokenize them with their images."""

from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from zoo.registry import ZooError, one_line, unknown
from zoo.text.chat_sandbox import bounded
from zoo.text.chat_template import GENERATION, takes_parts, variables_of
from zoo.text.processor_options import known_options
from zoo.vision.images.decode import base64_bytes

_SOURCES = {"image": ("image", "url", "path", "base64"), "video": ("video", "url", "path")}


class ChatMixin:
    """`apply_chat_template` of `ZooProcessor`, and conversion of messages to the form that a template takes."""

    tokenizer: Any
    num_image_tokens: int
    image_separator: str
    image_token: str
    video_token: str | None
    pictures: Any
    _chat: Any
    _content: Callable[[Any], str]
    flatten: Callable[..., list[dict[str, str]]]
    asked: Callable[..., list[Any]]
    __call__: Callable[..., Any]

    def apply_chat_template(
        self,
        conversation: Any,
        chat_template: str | None = None,
        tools: list[Any] | None = None,
        documents: list[dict[str, str]] | None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool | str = False,
        return_assistant_tokens_mask: bool = False,
        tokenize: bool = False,
        return_tensors: str | None = "auto",
        return_dict: bool = False,
        load_audio_from_video: bool = False,
        processor_kwargs: Mapping[str, Any] | None = None,
        sanitize_control_tokens: bool = False,
        *,
        images: Any = None,
        **kwargs: Any,
    ) -> Any:
        """Render chat messages; with `tokenize=True` also tokenize them and transform their images.

        Args:
            conversation: messages, or a list of conversations. A message has plain string content, or typed parts:
                `{"type": "text", "text": ...}` and `{"type": "image", "image": ...}` (or `url`, `path`: a file, or
                `base64`).
            chat_template: a template, or the name of one of several; None: the processor's.
            tools, documents: for templates that show them.
            add_generation_prompt: the text ends with the opening of an answer.
            continue_final_message: the text ends within the last message.
            return_assistant_tokens_mask: give `assistant_masks` (B, T), 1 in `{% generation %}` blocks.
            tokenize: return tokens instead of the text.
            return_tensors: as in the call.
            return_dict: return all results of the call; else input_ids.
            load_audio_from_video, sanitize_control_tokens: refused.
            processor_kwargs: options of the call.
            images: of all image parts, if the parts do not hold them.
            kwargs: variables of the template, and options of the call.

        Returns:
            The text, or one for each conversation; tokens with `tokenize=True`.

        Raises:
            ZooError: an option that is unknown or unsupported, an argument that the template does not use, and
                whatever the call refuses.
        """
        template = self.tokenizer.get_chat_template(chat_template, tools)
        variables = variables_of(template)
        _refuse(
            ("load_audio_from_video", load_audio_from_video, "the model takes no sound"),
            ("sanitize_control_tokens", sanitize_control_tokens, "special tokens in texts are read as such"),
            ("tools", tools and "tools" not in variables, "the chat template does not show them"),
            ("documents", documents and "documents" not in variables, "the chat template does not show them"),
            (
                "continue_final_message",
                continue_final_message and add_generation_prompt,
                "add_generation_prompt asks for another answer behind it",
            ),
            (
                "return_assistant_tokens_mask",
                return_assistant_tokens_mask and not (tokenize and return_dict),
                "it comes with tokenize=True and return_dict=True",
            ),
            (
                "return_assistant_tokens_mask",
                return_assistant_tokens_mask and not GENERATION.search(template),
                "the chat template has no {% generation %} block, which marks the assistant's text",
            ),
        )
        shown = {name: value for name, value in kwargs.items() if name in variables}
        options = {**(processor_kwargs or {}), **{n: v for n, v in kwargs.items() if n not in variables}}
        images = options.pop("images", images)
        self._require_known(options, variables)
        if options and not tokenize:
            raise ZooError(f"tokenize=False gives the text, which the option {sorted(options)[0]!r} does not change.")

        if isinstance(conversation, Mapping):
            raise ZooError("A conversation is a list of messages, got a mapping: put one message into a list.")
        several = bool(conversation) and not isinstance(conversation[0], Mapping)
        talks = [_plain(talk) for talk in (conversation if several else [conversation])]
        texts, spans = self._rendered(
            talks, template, tools=tools, documents=documents, add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message, return_assistant_tokens_mask=return_assistant_tokens_mask,
            **shown,
        )  # fmt: skip
        if not tokenize:
            return texts if several else texts[0]
        found = [_media(talk, "image") for talk in talks]
        if any(found) and images is not None:
            raise ZooError("Images are given in the messages and in images=: give them once.")
        if images is None:
            images = found if any(found) else None
        elif not several and not _nested(images):
            images = [images]  # all of one conversation
        if "add_special_tokens" not in options:  # as for samples: a template that writes <s> itself must not get two
            bos = self.tokenizer.bos_token
            whole = template == self.tokenizer.chat_template and not self._chat.typed  # templates of text write it all
            options["add_special_tokens"] = not (whole or (bos and texts[0].startswith(bos)))
        if return_assistant_tokens_mask:
            options |= {"return_offsets_mapping": True, "return_text_replacement_offsets": True}
        batch = self(
            images=images,
            text=texts,
            videos=[film for talk in talks for film in _media(talk, "video")] or None,
            **{"return_tensors": return_tensors} | options,
        )
        opens = bool(add_generation_prompt or continue_final_message)
        if asked := [a for talk in talks for a in self.asked(talk, prompt=opens)]:
            batch["questions"] = asked
        if return_assistant_tokens_mask:
            batch["assistant_masks"] = _written_by_assistants(batch, spans)
        return batch if return_dict else batch["input_ids"]

    def _require_known(self, options: Mapping[str, Any], variables: frozenset[str]) -> None:
        """Refuse what is neither an option of the call nor a variable of the template."""
        groups = known_options(self.pictures.processor if self.pictures else None)
        known = frozenset().union(*groups.values(), groups, {"common_kwargs"}) - {""}
        for name in options:
            if name not in known:
                raise unknown("variable of the chat template or option of the call", name, known | variables)

    def _rendered(
        self, talks: Sequence[Sequence[Mapping[str, Any]]], template: str, **options: Any
    ) -> tuple[list[str], list[list[tuple[int, int]]]]:
        """Render conversations: their texts, and the spans of assistants' text in each if requested."""
        from transformers.utils.chat_template_utils import render_jinja_template

        typed = self._takes_parts(template)
        given = {**self.tokenizer.special_tokens_map, **options}
        try:
            with bounded(len(talks)):
                texts, spans = render_jinja_template(  # type: ignore[str-unpack]  # annotated as str, returns two lists
                    conversations=[self._messages(talk, typed) for talk in talks], chat_template=template, **given
                )
        except ZooError:
            raise
        except Exception as error:  # a template is a program of others and may fail in any way
            raise ZooError(f"The chat template refuses the messages: {one_line(error)}") from error
        return list(texts), list(spans)  # type: ignore[arg-type]

    def _takes_parts(self, template: str) -> bool:
        """Whether a template takes typed parts and writes the tokens of images."""
        own = template == self.tokenizer.chat_template
        return self._chat.typed if own else takes_parts(self.tokenizer, template)

    def _messages(self, talk: Sequence[Mapping[str, Any]], typed: bool) -> list[dict[str, Any]]:
        """Convert messages to the form that a template takes; keys beside the content stay."""
        result = []
        for message in talk:
            content = message.get("content")
            if content is None:
                result.append(dict(message))
                continue
            text = self._content(content)  # also checks the parts
            if not typed:
                shown: Any = text
            elif isinstance(content, str) or self._videos_in_words(content):
                shown = self._chat.template.parts(text)
            else:
                shown = list(content)
            result.append({**message, "content": shown})
        return result

    def _videos_in_words(self, content: Sequence[Mapping[str, Any]]) -> bool:
        """Whether there are videos that the template does not write, so that their token must be in the text."""
        return any(p["type"] == "video" for p in content) and not self._chat.template.shows_videos

    def shown(self, messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Convert messages to plain content or typed parts, as the chat template takes them."""
        return self._chat.template.shown(self.flatten(messages))


def _refuse(*cases: tuple[str, Any, str]) -> None:
    """Refuse the first option that is on and not done, with the reason."""
    for name, on, why in cases:
        if on:
            raise ZooError(f"The option {name!r} is not taken: {why}.")


def _plain(talk: Any) -> list[dict[str, Any]]:
    """Drop keys that are None, and convert OpenAI's `image_url` parts to image parts."""
    result = []
    for message in getattr(talk, "messages", talk):
        if not isinstance(message, Mapping):
            raise ZooError(f"A message must be a mapping with role and content, got {type(message).__name__}.")
        kept = {key: value for key, value in message.items() if value is not None}
        if "content" in kept:
            require_content(kept["content"])
            if not isinstance(kept["content"], str):
                kept["content"] = [_part(part) for part in kept["content"]]
        result.append(kept)
    return result


def require_messages(messages: Sequence[Any], sample_id: str) -> None:
    """Refuse messages of a sample that are of another form.

    Raises:
        ZooError: with the sample, and what a message has and should have.
    """
    for number, message in enumerate(messages):
        try:
            if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
                raise ZooError(f"A message must be a mapping with role and content, got {message!r:.80}.")
            require_content(message["content"])
        except ZooError as error:
            raise ZooError(f"Sample {sample_id!r}, message {number}: {error}") from None


def require_content(content: Any) -> None:
    """Refuse the content of a message that is neither text nor typed parts.

    Raises:
        ZooError: with what it is.
    """
    if isinstance(content, str):
        return
    if not isinstance(content, (list, tuple)):
        raise ZooError(f"The content of a message must be a text or a list of parts, got {content!r:.80}.")
    for part in content:
        if not isinstance(part, Mapping) or "type" not in part:
            raise ZooError(f"A message part must be a mapping with a type, got {part!r:.80}.")
        if part["type"] == "text" and not isinstance(part.get("text"), str):
            raise ZooError(f"A message part of type 'text' must hold a string as 'text', got {dict(part)!r:.80}.")


def _part(part: Mapping[str, Any]) -> dict[str, Any]:
    if part["type"] != "image_url":
        return dict(part)
    where = part.get("image_url")
    return {"type": "image", "url": where.get("url", "") if isinstance(where, Mapping) else where}


def _media(talk: Sequence[Mapping[str, Any]], kind: str) -> list[Any]:
    """Collect the images or videos of messages."""
    contents = [m["content"] for m in talk if isinstance(m.get("content"), list)]
    parts = [part for content in contents for part in content if part["type"] == kind]
    return [_decoded(key, part[key]) for part in parts for key in _SOURCES[kind] if part.get(key) is not None]


def _decoded(key: str, value: Any) -> Any:
    if key != "base64" or not isinstance(value, str):
        return value
    try:
        return base64_bytes(value.partition("base64,")[2] or value)
    except ValueError as error:
        raise ZooError(f"An image part holds base64 that cannot be decoded: {error}.") from error


def _nested(images: Any) -> bool:
    return isinstance(images, (list, tuple)) and any(isinstance(i, (list, tuple)) for i in images)


def _written_by_assistants(batch: Any, spans: Sequence[Sequence[tuple[int, int]]]) -> Any:
    """Mark the tokens of assistants' text, (B, T), and remove the offsets used for it from the batch.

    Args:
        batch: with the characters of each token, and the replacements of image tokens in the texts.
        spans: (start, end) in the texts before image tokens were expanded.
    """
    offsets, replaced = batch.pop("offset_mapping"), batch.pop("text_replacement_offsets")
    masks = []
    for row, instead, own in zip(offsets, replaced, spans, strict=True):
        ends = [r["span"][1] for r in instead]
        gained = [0, *[r["new_span"][1] - r["span"][1] for r in instead]]
        moved = [tuple(at + gained[bisect_right(ends, at)] for at in span) for span in own]
        inside = [any(start < end and stop > begin for begin, end in moved) for start, stop in np.asarray(row).tolist()]
        masks.append([int(i) for i in inside])
    ids = batch["input_ids"]
    if isinstance(ids, torch.Tensor):
        return torch.tensor(masks)
    return np.array(masks) if isinstance(ids, np.ndarray) else masks
