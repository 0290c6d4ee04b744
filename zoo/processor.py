"""The one processor of a composed model: chat template, image tokens, labels, pixels.

It knows how many image tokens an image becomes, writes exactly that many placeholders, and marks what is learnt. A sample
whose labels would come out empty or misaligned is an error that shows the text: nothing is masked in silence.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import cached_property
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from transformers import BatchFeature, ProcessorMixin

from zoo.auto import register_processor
from zoo.collate import EncodedSample, TokenizedDialog, collate, pack, share_prefix
from zoo.model_types import ZooConfig
from zoo.registry import IGNORE_INDEX, Dialog, ImageTransform, Sample, ZooError
from zoo.vision.images import open_image
from zoo.vision.transform import to_pixels

_CACHE = 200_000  # texts whose tokens are remembered; questions repeat, and a tokenizer call costs more than a step can spare


class ZooProcessor(ProcessorMixin):
    """Turns text, chat messages and images into what `ZooModel` takes.

    Args:
        tokenizer: with an image token, padding, an end-of-sequence token and a chat template.
        transform: what the encoder wants of its pixels, as `ImageTransform` or its dict; None for a model without images.
        num_image_tokens: placeholders per image; 0 where images do not stand in the sequence.
        image_separator: text between an image and what follows it.
    """

    def __init__(
        self,
        tokenizer: Any = None,
        transform: ImageTransform | Mapping[str, Any] | None = None,
        num_image_tokens: int = 0,
        image_separator: str = "\n",
        chat_template: str | None = None,
        **kwargs: Any,
    ) -> None:
        if isinstance(transform, Mapping):
            transform = ImageTransform(**{k: tuple(v) if isinstance(v, list) else v for k, v in transform.items()})
        self.transform = transform
        self.num_image_tokens = num_image_tokens
        self.image_separator = image_separator
        super().__init__(tokenizer, chat_template=chat_template or getattr(tokenizer, "chat_template", None))
        self.image_token = tokenizer.image_token
        self.image_token_id = tokenizer.convert_tokens_to_ids(tokenizer.image_token)
        self._dialogs: dict[Any, TokenizedDialog] = {}
        self._segments: dict[str, tuple[list[int], list[int]]] = {}
        self._skeletons: dict[tuple[str, ...], list[tuple[int, str]] | None] = {}

    def to_dict(self) -> dict[str, Any]:
        return {
            "processor_class": type(self).__name__,
            "transform": asdict(self.transform) if self.transform else None,
            "num_image_tokens": self.num_image_tokens,
            "image_separator": self.image_separator,
        }

    # ---- for people: text and images as they come --------------------------------------------------------------

    def __call__(
        self,
        images: Any = None,
        text: str | Sequence[str] | None = None,
        return_tensors: str | None = "pt",
        padding: bool = True,
        add_special_tokens: bool = True,
        **kwargs: Any,
    ) -> BatchFeature:
        """Tokenize text that holds the image token where an image goes, and transform the images.

        Args:
            images: one image, or a list in the order of their tokens over the whole batch (lists of lists are joined).
            text: one text or several.

        Returns:
            input_ids, attention_mask (B, T) and pixel_values (M, 3, h, w) if there are images.
        """
        texts = [text] if isinstance(text, str) else list(text or [])
        pixels = [self._pixels(source) for source in _flat(images)]
        rows = [
            self._expand(np.array(self.tokenizer(t, add_special_tokens=add_special_tokens)["input_ids"])) for t in texts
        ]
        wanted = sum(t.count(self.image_token) for t in texts)
        if wanted != len(pixels):
            raise ZooError(f"The text holds {wanted} times {self.image_token!r}, but {len(pixels)} images were given.")
        encoded = [EncodedSample(ids, np.full(len(ids), IGNORE_INDEX), []) for ids in rows]
        batch = collate(encoded, pad_id=self.tokenizer.pad_token_id, padding_side=self.tokenizer.padding_side)
        keep = {k: batch[k] for k in ("input_ids", "attention_mask")}
        if pixels:
            keep["pixel_values"] = torch.stack(pixels)
        return BatchFeature(keep)

    def apply_chat_template(
        self,
        conversation: Any,
        chat_template: str | None = None,
        add_generation_prompt: bool = False,
        tokenize: bool = False,
        return_dict: bool = False,
        return_tensors: str | None = "pt",
        images: Any = None,
        **kwargs: Any,
    ) -> Any:
        """Render chat messages; with `tokenize=True` also tokenize them and transform their images.

        Messages have plain string content, or typed parts: `{"type": "text", "text": ...}` and `{"type": "image", "image": ...}`
        (the image itself may stand in the part, or all in `images`).
        """
        several = bool(conversation) and isinstance(conversation[0], (list, tuple))
        talks = conversation if several else [conversation]
        texts = [
            self.tokenizer.apply_chat_template(
                self.flatten(talk),
                chat_template=chat_template,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                **kwargs,
            )
            for talk in talks
        ]
        if not tokenize:
            return texts if several else texts[0]
        found = [p.get("image", p.get("url")) for t in talks for m in t if not isinstance(m["content"], str) for p in m["content"]
                 if p["type"] == "image"]  # fmt: skip
        given = [f for f in found if f is not None] or images
        batch = self(images=given, text=texts, add_special_tokens=False)
        return batch if return_dict else batch["input_ids"]

    def flatten(self, messages: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
        """Messages with string content, the image token in place of each image part."""
        return [{"role": m["role"], "content": self._content(m["content"])} for m in messages]

    def _content(self, content: Any) -> str:
        if isinstance(content, str):
            return content
        text = ""
        for part in content:
            if part["type"] == "image":
                text += self.image_token + self.image_separator
            elif part["type"] == "text":
                if self.image_token in part["text"]:
                    raise ZooError(f"A text part holds the image token {self.image_token!r}: {part['text'][:80]!r}.")
                text += part["text"]
            else:
                raise ZooError(f"A message part has type {part['type']!r}; allowed: image, text.")
        return text

    # ---- for training and evaluation: samples ------------------------------------------------------------------

    def encode(self, sample: Sample) -> EncodedSample:
        """Encode a sample for training. Several dialogs share the images: one prefix, then a block for each dialog.

        Raises:
            ZooError: images and image parts do not match, an answer is empty, or the chat template and the tokenizer
                leave no clear border between question and answer; the message shows the text and where it broke.
        """
        dialogs = [self._learnt(d.messages, sample) for d in sample.dialogs]
        common = {
            "pixel_values": [self._pixels(i) for i in sample.images],
            "targets": sample.targets,
            "ids": [sample.id],
        }
        if len(dialogs) == 1:
            return EncodedSample(dialogs[0].input_ids, dialogs[0].labels, **common)
        return EncodedSample(**share_prefix(dialogs, sample.id), **common)

    def _learnt(self, messages: Sequence[Mapping[str, Any]], sample: Sample) -> TokenizedDialog:
        """Tokenize a dialog of a sample, or remember it: a step may see hundreds, and most have been seen before."""
        key = tuple(
            [
                (m["role"], c if isinstance(c := m["content"], str) else tuple([p.get("text") for p in c]))
                for m in messages
            ]
        )
        known = self._dialogs.get(key)
        if known is None:
            if len(self._dialogs) >= _CACHE:
                self._dialogs.clear()
            ids, labels = self.tokenize_dialog(messages, sample.id)
            known = self._dialogs[key] = TokenizedDialog(ids, labels, self._shared(ids), _count_images(messages))
        if known.images != len(sample.images):
            raise ZooError(f"Sample {sample.id!r} has {len(sample.images)} images, but a dialog shows {known.images}.")
        return known

    def encode_prompt(
        self, sample: Sample, dialog: Dialog, pixel_values: list[torch.Tensor] | None = None
    ) -> EncodedSample:
        """Encode one dialog up to its last assistant turn, which is left for the model to write."""
        messages = dialog.messages
        if (shown := _count_images(messages)) != len(sample.images):
            raise ZooError(f"Sample {sample.id!r} has {len(sample.images)} images, but a dialog shows {shown}.")
        if messages and messages[-1]["role"] == "assistant":
            messages = messages[:-1]
        text = self._render(self.flatten(messages), add_generation_prompt=True)
        ids = self._expand(np.array(self._tokenize(text)[0], dtype=np.int64))
        pixels = [self._pixels(i) for i in sample.images] if pixel_values is None else pixel_values
        return EncodedSample(ids, np.full(len(ids), IGNORE_INDEX, dtype=np.int64), pixels, ids=[sample.id])

    def collate(
        self, samples: Sequence[EncodedSample], *, padding_side: str = "right", multiple_of: int = 1
    ) -> dict[str, Any]:
        """Stack encoded samples into a batch; see `zoo.collate.collate`."""
        return collate(samples, pad_id=self.tokenizer.pad_token_id, padding_side=padding_side, multiple_of=multiple_of)

    @staticmethod
    def pack(samples: Sequence[EncodedSample], length: int) -> list[EncodedSample]:
        """Join samples into rows of at most `length` tokens; see `zoo.collate.pack`."""
        return pack(samples, length)

    def tokenize_dialog(
        self, messages: Sequence[Mapping[str, Any]], sample_id: str = ""
    ) -> tuple[np.ndarray, np.ndarray]:
        """Tokenize a conversation; labels are the assistant turns, each with the token that ends it.

        Returns:
            input_ids and labels, both (T,), image tokens expanded.
        """
        text, spans = self._spans(self.flatten(messages), sample_id)
        ids, ends = self._tokenize(text)
        labels = np.full(len(ids), IGNORE_INDEX, dtype=np.int64)
        starts = np.array([0, *ends[:-1]])
        tokens, stops = np.array(ids, dtype=np.int64), np.array(ends)
        for start, end in spans:
            inside = (stops > start) & (starts < end)
            first = int(inside.argmax())
            if not inside.any() or starts[first] < start:
                where = text[max(0, start - 40) : start] + " >>> " + text[start : start + 40]
                raise ZooError(
                    f"Sample {sample_id!r}: a token runs across the border between question and answer, so the answer "
                    f"cannot be learnt cleanly. The border is at >>>: {where!r}."
                )
            labels[inside] = tokens[inside]
        labels[tokens == self.image_token_id] = IGNORE_INDEX
        if (labels == IGNORE_INDEX).all():
            raise ZooError(f"Sample {sample_id!r} leaves nothing to learn: no assistant turn in {text[:200]!r}.")
        return self._expand(tokens), self._expand(labels, tokens)

    def _spans(self, messages: list[dict[str, str]], sample_id: str) -> tuple[str, list[tuple[int, int]]]:
        """The rendered text, and the [start, end) of each assistant turn up to and with the token that ends it."""
        skeleton = self._skeleton(tuple(m["role"] for m in messages))
        if skeleton is None or any(m["content"] != m["content"].strip() for m in messages):
            return self._search_spans(messages, sample_id)
        text, spans, start = "", [], 0
        for number, piece in skeleton:
            content = messages[number]["content"]
            assistant = messages[number]["role"] == "assistant"
            if assistant and not content:
                raise ZooError(f"Sample {sample_id!r} has an empty answer.")
            before, after = piece.split("\0")
            start = len(text) + len(before)
            text += before + content
            if assistant:
                spans.append((start, len(text) + len(after.partition("\1")[0])))
            text += after.replace("\1", "")
        return text, spans

    def _skeleton(self, roles: tuple[str, ...]) -> list[tuple[int, str]] | None:
        """For each message, the text the template puts around its content: `before \\0 end-of-turn \\1 rest`.

        Only for templates that take content as it is; None for those that do not, which are rendered each time.
        """
        if roles not in self._skeletons:
            marks = [f"\x02{i}\x03" for i in range(len(roles))]
            messages = [{"role": r, "content": m} for r, m in zip(roles, marks, strict=True)]
            try:
                text, spans = self._search_spans(messages, "")
            except ZooError:
                self._skeletons[roles] = None
                return None
            ends = iter(spans)
            pieces, at = [], 0
            for i, mark in enumerate(marks):
                where = text.find(mark, at)
                if where < 0 or text.count(mark) != 1:
                    self._skeletons[roles] = None
                    return None
                after = where + len(mark)
                following = text.find(marks[i + 1], after) if i + 1 < len(marks) else len(text)
                stop = next(ends)[1] if roles[i] == "assistant" else after
                border = following if i + 1 == len(marks) else stop
                pieces.append(
                    (i, text[at:where] + "\0" + text[after:stop] + "\1" + (text[stop:border] if border > stop else ""))
                )
                at = border
            # The skeleton must start a supervised span where the answer starts; templates that do otherwise are searched.
            starts = [s for s, _ in spans]
            if any(text[s : s + 1] != "\x02" for s in starts):
                self._skeletons[roles] = None
                return None
            self._skeletons[roles] = pieces
        return self._skeletons[roles]

    def _search_spans(self, messages: list[dict[str, str]], sample_id: str) -> tuple[str, list[tuple[int, int]]]:
        text = self._render(messages)
        eos, spans = self.tokenizer.eos_token, []
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            if not message["content"].strip():
                raise ZooError(f"Sample {sample_id!r} has an empty answer.")
            opening = self._render(messages[:i], add_generation_prompt=True)
            if not text.startswith(opening):
                same = next(
                    (k for k, (a, b) in enumerate(zip(text, opening, strict=False)) if a != b),
                    min(len(text), len(opening)),
                )
                raise ZooError(
                    f"Sample {sample_id!r}: the chat template renders turn {i} differently with and without what follows, "
                    f"so its answer cannot be found. They part at {text[max(0, same - 40) : same + 40]!r}."
                )
            content = text.find(message["content"].strip(), len(opening))
            if content < 0:
                raise ZooError(
                    f"Sample {sample_id!r}: the chat template does not show the answer {message['content'][:80]!r}."
                )
            end = content + len(message["content"].strip())
            stop = text.find(eos, end)
            following = messages[i + 1]["content"].strip() if i + 1 < len(messages) else ""
            limit = text.find(following, end) if following else len(text)
            spans.append((len(opening), stop + len(eos) if 0 <= stop <= limit else end))
        return text, spans

    def _render(self, messages: list[dict[str, str]], add_generation_prompt: bool = False) -> str:
        if not messages and not add_generation_prompt:
            return ""
        return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)

    @cached_property
    def _special(self) -> re.Pattern[str] | None:
        """Splits a text at special tokens; None where a tokenizer looks across them and needs the text whole."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        kind = type(getattr(backend, "pre_tokenizer", None)).__name__
        if kind != "ByteLevel" or getattr(backend, "normalizer", None) is not None:
            return None
        added = self.tokenizer.added_tokens_decoder.values()
        if any(t.lstrip or t.rstrip or t.single_word for t in added):
            return None
        return re.compile("(" + "|".join(re.escape(t.content) for t in added) + ")")

    def _tokenize(self, text: str) -> tuple[list[int], list[int]]:
        """Token ids of a rendered text, and the character at which each ends."""
        if self._special is None:
            return self._tokenize_whole(text)
        ids, ends, at = [], [], 0
        for segment in self._special.split(text):
            if not segment:
                continue
            if segment not in self._segments:
                if len(self._segments) >= _CACHE:
                    self._segments.clear()
                encoding = self.tokenizer.backend_tokenizer.encode(segment, add_special_tokens=False)
                self._segments[segment] = encoding.ids, _rising([end for _, end in encoding.offsets])
            some, stops = self._segments[segment]
            ids += some
            ends += [at + s for s in stops]
            at += len(segment)
        return ids, ends

    def _tokenize_whole(self, text: str) -> tuple[list[int], list[int]]:
        out = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        return list(out["input_ids"]), _rising([end for _, end in out["offset_mapping"]])

    def _expand(self, values: np.ndarray, ids: np.ndarray | None = None) -> np.ndarray:
        """Repeat each image token `num_image_tokens` times, in `values` or wherever `ids` holds one."""
        ids = values if ids is None else ids
        return np.repeat(values, np.where(ids == self.image_token_id, self.num_image_tokens, 1))

    def _shared(self, ids: np.ndarray) -> int:
        """Length of the prefix that dialogs share: up to the last image placeholder; nothing for text alone."""
        where = np.flatnonzero(ids == self.image_token_id)
        return int(where[-1]) + 1 if len(where) else 0

    def _pixels(self, source: Any) -> torch.Tensor:
        if self.transform is None:
            raise ZooError("An image was given to a model that has no vision encoder.")
        return to_pixels(open_image(source), self.transform)


def _rising(ends: list[int]) -> list[int]:
    """The largest end so far: bytes of one character give their tokens the same, or an empty, stretch of text."""
    return list(accumulate(ends, max))


def _count_images(messages: Sequence[Mapping[str, Any]]) -> int:
    return sum(p["type"] == "image" for m in messages if not isinstance(m["content"], str) for p in m["content"])


def _flat(images: Any) -> list[Any]:
    if images is None:
        return []
    if isinstance(images, (list, tuple)):
        return [i for item in images for i in _flat(item)]
    return [images]


register_processor(ZooConfig, ZooProcessor)
