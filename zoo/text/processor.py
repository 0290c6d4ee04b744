"""The processor of a composed model: chat template, image tokens, labels, pixels.

It counts the image tokens of each image, writes exactly as many placeholders, and sets labels. A sample whose labels
would be empty or misaligned is an error that shows the text.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from transformers import ProcessorMixin

from zoo.autoclasses import register_processor
from zoo.model_config import ZooConfig
from zoo.registry import IGNORE_INDEX, Cut, Dialog, ImageTransform, Sample, ZooError, build, naming
from zoo.text.answer_spans import TurnChangedError
from zoo.text.batch import EncodedSample, TokenizedDialog, collate, number_pairs, one_question, pack, share_prefix
from zoo.text.chat_template import ChatTemplate
from zoo.text.placeholders import PlaceholdersMixin, films_of
from zoo.text.processor_call import CallMixin
from zoo.text.processor_chat import ChatMixin, require_messages
from zoo.text.processor_keywords import LoadedMixin
from zoo.text.questions import QuestionsMixin
from zoo.text.token_cache import TokenCache
from zoo.text.tokenized_chat import Chat
from zoo.text.tokenizer import pad_id_of, require_token
from zoo.vision.images.processors import Picture, Pictures, Videos, as_clip, cut_of, flat, has_several, processor_of
from zoo.vision.images.transform import to_pixels
from zoo.vision.images.video import Video

_CACHED = 1 << 23  # tokens of dialogs, 24 bytes each at most
_CACHED_IMAGES = 1 << 20  # tokens of images by their cuts, of which those that keep their shapes have any number


class ZooProcessor(LoadedMixin, CallMixin, ChatMixin, PlaceholdersMixin, QuestionsMixin, ProcessorMixin):  # type: ignore[misc]  # from_pretrained's keywords
    """Turns text, chat messages and images into inputs of `ZooModel`.

    Args:
        tokenizer: with an image token, padding, an end-of-sequence token and a chat template.
        transform: of the encoder's pixels, as `ImageTransform` or its dict; None without an encoder.
        num_image_tokens: placeholders per image; 0 if images have no tokens in the sequence.
        image_separator: text between an image and the text after it, if images have tokens.
        pictures: the image processor of a published model, as plain values; None: images go by `transform`.
        videos: the same for videos; None: videos are refused.
        image_token: placeholder of an image; None: that of the tokenizer.
        video_token: placeholder of a video; None: the image token.
        layout: node of the model's layout, with its derived arguments under `given`; None: each image has
            `num_image_tokens`.
        end_tokens: further end tokens, stated by the model's checkpoint.
        unpruned: `num_image_tokens` and `layout` as they would be without pruners, where image tokens keep their
            positions; of images that keep their shapes `axes` and `dense` of the positions; None: positions are those
            of the tokens.
        left_out: a pruner behind the projector that knows how many placeholders it leaves out: its node as `pruner`,
            its arguments as `given`, and as `dense` whether positions are counted without them; None: there is none.
        asks: whether batches hold what is asked about images, for parts of the model that choose by it.
    """

    def __init__(
        self,
        tokenizer: Any = None,
        transform: ImageTransform | Mapping[str, Any] | None = None,
        num_image_tokens: int = 0,
        image_separator: str = "\n",
        chat_template: str | None = None,
        pictures: Mapping[str, Any] | None = None,
        videos: Mapping[str, Any] | None = None,
        image_token: str | None = None,
        video_token: str | None = None,
        layout: Mapping[str, Any] | None = None,
        end_tokens: Sequence[str] | None = None,
        unpruned: Mapping[str, Any] | None = None,
        left_out: Mapping[str, Any] | None = None,
        asks: bool = False,
        **kwargs: Any,
    ) -> None:
        if isinstance(transform, Mapping):
            transform = ImageTransform.stated(transform)
        self.transform: Any = transform  # ImageTransform or None
        self.num_image_tokens = num_image_tokens
        self.pictures = Pictures(pictures) if pictures else None
        self.videos = Videos(videos) if videos else None
        self.layout_node = dict(layout) if layout else None
        self.layout: Any = build_layout(layout) if layout else None
        if image_token is not None:
            tokenizer.image_token = image_token
        if chat_template is not None:
            tokenizer.chat_template = chat_template
        super().__init__(tokenizer)
        self.image_token = tokenizer.image_token
        self.image_token_id = tokenizer.convert_tokens_to_ids(tokenizer.image_token)
        self.video_token = video_token
        # Whether a video is written as words and images before the text is tokenized.
        self.spells = bool(video_token) and self.layout is not None and self.layout.spells
        known = video_token is not None and video_token in tokenizer.get_vocab()
        self.video_token_id = tokenizer.convert_tokens_to_ids(video_token) if known else self.image_token_id
        self._images = TokenCache(_CACHED_IMAGES)
        self._separator = image_separator
        self.end_tokens = list(end_tokens or ())
        self.unpruned = dict(unpruned) if unpruned else None
        self.left_out = dict(left_out) if left_out else None
        self._leaves = build_pruner(self.left_out) if self.left_out else None
        self.asks = bool(asks)
        whole = (unpruned or {}).get("layout")
        self._whole: Any = build_layout(whole) if whole else None
        self._made: tuple[Any, Any, Chat, TokenCache] | None = None
        self._chat_now()

    def _chat_now(self) -> tuple[Any, Any, Chat, TokenCache]:
        """Return the tokenizer, its chat template, the `Chat` of both and the cache of dialogs, renewed after a change.

        Users may set tokenizer or template at any time, which invalidates the cache.

        Raises:
            ZooError: the tokenizer lacks the model's image token.
        """
        made, tokenizer = self._made, self.tokenizer
        if made is None or made[0] is not tokenizer or made[1] != tokenizer.chat_template:
            require_token(tokenizer, self.image_token, self.image_token_id)
            chat = Chat(tokenizer, self.video_token, self.end_tokens)
            made = self._made = tokenizer, tokenizer.chat_template, chat, TokenCache(_CACHED)
        return made

    def require_own_tokenizer(self) -> None:
        """Refuse the tokenizer of another model.

        Raises:
            ZooError: it lacks the model's image token.
        """
        self._chat_now()

    @property
    def _chat(self) -> Chat:
        return self._chat_now()[2]

    @property
    def image_separator(self) -> str:  # type: ignore[override]  # an attribute of the mixin
        """Text after an image; empty for templates that write images themselves."""
        return "" if self._chat.typed else self._separator

    @property
    def chat_template(self) -> Any:
        """The tokenizer's chat template; setting it here sets it there."""
        return getattr(self.__dict__.get("tokenizer"), "chat_template", None)

    @chat_template.setter
    def chat_template(self, value: Any) -> None:
        tokenizer = self.__dict__.get("tokenizer")
        if value is not None and tokenizer is not None:
            tokenizer.chat_template = value

    @property
    def template(self) -> ChatTemplate:
        """The chat template, with the texts that it writes around an answer."""
        return self._chat.template

    @property
    def model_input_names(self) -> list[str]:
        """Names of a call's results that are inputs of the model."""
        return [*self.tokenizer.model_input_names, *(["pixel_values"] if self.transform else [])]

    @property
    def image_processor(self) -> Any:
        """An image processor of transformers that prepares images as this processor does, up to a step of a byte.

        transformers' pipelines need it. None without an encoder, with several, and if images are padded to squares.
        """
        if self.pictures is not None and not self.transform.also:
            return self.pictures.processor
        if self.transform is None or self.transform.fit == "pad" or self.transform.also:
            return None
        return processor_of(as_clip(self.transform))

    @property
    def whole_if_several(self) -> bool:
        """Whether an image that is cut by itself stays whole beside others, so that later ones change its pixels."""
        return self.pictures is not None and bool(self.pictures.config.get("whole_if_several"))

    def to_dict(self) -> dict[str, Any]:
        return {
            "processor_class": type(self).__name__,
            "transform": asdict(self.transform) if self.transform else None,
            "num_image_tokens": self.num_image_tokens,
            "image_separator": self.image_separator,
            **({"pictures": self.pictures.config} if self.pictures else {}),
            **({"videos": self.videos.config} if self.videos else {}),
            **({"video_token": self.video_token} if self.video_token else {}),
            "image_token": self.image_token,
            **({"layout": self.layout_node} if self.layout_node else {}),
            **({"end_tokens": self.end_tokens} if self.end_tokens else {}),
            **({"unpruned": self.unpruned} if self.unpruned else {}),
            **({"left_out": self.left_out} if self.left_out else {}),
            **({"asks": True} if self.asks else {}),
        }

    # ---- for training and evaluation: samples ------------------------------------------------------------------

    def encode(self, sample: Sample, pixel_values: list[Any] | None = None) -> EncodedSample:
        """Encode a sample for training. Several dialogs share the images: one prefix, then a block for each dialog.

        The two answers of a preference share them alike.

        Args:
            sample: images and dialogs.
            pixel_values: of its images, if they are prepared already.

        Raises:
            ZooError: images and image parts do not match, an answer is empty, or the chat template and the tokenizer
                leave no clear border between question and answer; the message shows the text at that place.
        """
        pixels = self._images_of(sample) if pixel_values is None else pixel_values
        if not sample.dialogs:
            raise ZooError(f"Sample {sample.id!r} has no dialog: there is nothing to learn.")
        try:
            rows = [(d, row) for d in sample.dialogs for row in self._tokenize_cached(d, sample, pixels)]
        except (KeyError, TypeError):
            for dialog in sample.dialogs:
                require_messages(dialog.messages, sample.id)
            raise
        dialogs = number_pairs(sample.id, [d.preference for d, _ in rows], [row for _, row in rows])
        common: dict[str, Any] = {
            "pixel_values": pixels,
            "targets": sample.targets,
            "ids": [sample.id],
        }
        common["gap"] = self.gap_of(dialogs[0].input_ids, pixels)
        common["fewer"] = self.fewer_of(dialogs[0].input_ids, pixels)
        common["asked"] = one_question(dialogs, sample.id)
        if len(dialogs) == 1:
            return EncodedSample(dialogs[0].input_ids, dialogs[0].labels, pairs=dialogs[0].pairs, **common)
        row: dict[str, Any] = dict(share_prefix(dialogs, sample.id))
        return EncodedSample(**row, **common)

    def encode_images(self, sample: Sample, pixel_values: list[Any] | None = None) -> EncodedSample:
        """Encode the images and dense targets of a sample, without its text."""
        nothing = np.zeros(0, dtype=np.int64)
        pixels = self._images_of(sample) if pixel_values is None else pixel_values
        return EncodedSample(nothing, nothing, pixels, targets=sample.targets)

    def _tokenize_cached(self, dialog: Dialog, sample: Sample, pixels: Sequence[Any]) -> list[TokenizedDialog]:
        """Tokenize a dialog of a sample, with a cache; see `_rows`."""
        shown = _count_images(dialog.messages)
        if shown != len(sample.images):
            raise ZooError(f"Sample {sample.id!r} has {len(sample.images)} images, but a dialog shows {shown}.")
        key: Any = bool(dialog.preference), tuple([(m["role"], _key(m["content"])) for m in dialog.messages])
        if self.layout is not None:  # the number of placeholders depends on the cut of the images
            key = key, tuple([cut_of(p) for p in pixels])
        dialogs = self._chat_now()[3]
        known: list[TokenizedDialog] | None = dialogs.get(key)
        if known is None:
            rows = self._rows(dialog, sample.id, pixels)
            asked = next(iter(self.asked(dialog.messages, only_last=bool(dialog.preference))), None)
            known = [TokenizedDialog(ids, labels, self._shared(ids), shown, asked=asked) for ids, labels in rows]
            dialogs.put(key, known, sum(len(ids) for ids, _ in rows))
        return known

    def _rows(self, dialog: Dialog, sample_id: str, pixels: Sequence[Any]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Tokenize a dialog to one row, or to one per answer if the template writes earlier answers differently.

        Templates of reasoning models do so: they open a thought in the prompt, and drop it from earlier turns.
        """
        messages = dialog.messages
        if dialog.preference:  # only the last answer is compared
            return [self.tokenize_dialog(messages, sample_id, pixels, only_last=True)]
        try:
            return [self.tokenize_dialog(messages, sample_id, pixels)]
        except TurnChangedError:
            answers = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
            parts = [messages[: i + 1] for i in answers]
            if any(_count_images(p) != _count_images(messages) for p in parts):  # rows must share all images
                raise
            return [self.tokenize_dialog(p, sample_id, pixels, only_last=True) for p in parts]

    def encode_prompt(self, sample: Sample, dialog: Dialog, pixel_values: list[Any] | None = None) -> EncodedSample:
        """Encode one dialog without its last assistant turn, as a prompt.

        Args:
            pixel_values: prepared images; an empty list encodes the text alone, if all images have equally many tokens.
        """
        messages = dialog.messages
        require_messages(messages, sample.id)
        if (shown := _count_images(messages)) != len(sample.images):
            raise ZooError(f"Sample {sample.id!r} has {len(sample.images)} images, but a dialog shows {shown}.")
        if messages and messages[-1]["role"] == "assistant":
            messages = messages[:-1]
        pixels = self._images_of(sample) if pixel_values is None else pixel_values
        tokens = self._chat.prompt(self._plain_messages(messages, pixels), sample.id)
        ids = self._expand(np.array(tokens, dtype=np.int64), pictures=pixels)
        labels = np.full(len(ids), IGNORE_INDEX, dtype=np.int64)
        asked = self.asked(messages, prompt=True)
        gap, fewer = self.gap_of(ids, pixels), self.fewer_of(ids, pixels)
        return EncodedSample(ids, labels, pixels, ids=[sample.id], asked=asked, gap=gap, fewer=fewer)

    def collate(
        self, samples: Sequence[EncodedSample], *, padding_side: str = "right", multiple_of: int = 1
    ) -> dict[str, Any]:
        """Stack encoded samples into a batch; see `zoo.text.batch.collate`."""
        pad_id = pad_id_of(self.tokenizer, len(samples))
        return collate(samples, pad_id=pad_id, padding_side=padding_side, multiple_of=multiple_of)

    @staticmethod
    def pack(samples: Sequence[EncodedSample], length: int) -> list[EncodedSample]:
        """Join samples into rows of at most `length` tokens; see `zoo.text.batch.pack`."""
        return pack(samples, length)

    def tokenize_dialog(
        self,
        messages: Sequence[Mapping[str, Any]],
        sample_id: str = "",
        pictures: Sequence[Any] = (),
        only_last: bool = False,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Tokenize a conversation; labels are the assistant turns, each with the token or the text that ends it.

        Args:
            messages: typed or plain.
            sample_id: for messages.
            pictures: the images, if their number of tokens depends on a layout.
            only_last: only the last assistant turn is learned.

        Returns:
            input_ids and labels, both (T,), with all placeholders.
        """
        tokens, labels = self._chat.labelled(self._plain_messages(messages, pictures), sample_id, only_last)
        labels[(tokens == self.image_token_id) | (tokens == self.video_token_id)] = IGNORE_INDEX
        return self._expand(tokens, pictures=pictures), self._expand(labels, tokens, pictures)

    def _plain_messages(self, messages: Sequence[Mapping[str, Any]], pictures: Sequence[Any]) -> list[dict[str, str]]:
        """Convert messages to string content, with videos written in words if the layout does so."""
        films = films_of(pictures)
        plain = [{**m, "content": self._as_text(m["content"])} for m in messages]
        return [{**m, "content": self._expand_videos(m["content"], films)} for m in self.flatten(plain)]

    def _as_text(self, content: Any) -> Any:
        """Veil control tokens in a content; image tokens in a plain string stay placeholders."""
        plain = self._chat.plain
        if isinstance(content, str):
            return plain.veil(content, leave=plain.placeholders)
        return [{**part, "text": plain.veil(part["text"])} if part["type"] == "text" else part for part in content]

    def flatten(self, messages: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
        """Messages with string content, the image token in place of each image part."""
        return [{"role": m["role"], "content": self._content(m["content"])} for m in messages]

    def _content(self, content: Any) -> str:
        if isinstance(content, str):
            return content
        text = ""
        for part in content:
            if part["type"] in ("image", "video"):
                token = self.image_token if part["type"] == "image" else self.video_token or self.image_token
                text += token + (self.image_separator if self.num_image_tokens else "")
            elif part["type"] == "text":
                held = [t for t in (self.image_token, self.video_token) if t and t in part["text"]]
                if held:
                    raise ZooError(f"A text part holds the image token {held[0]!r}: {part['text'][:80]!r}.")
                text += part["text"]
            else:
                raise ZooError(f"A message part has type {part['type']!r}; allowed: image, video, text.")
        return text

    def _shared(self, ids: np.ndarray) -> int:
        """Length of the prefix that dialogs share: up to the last image placeholder; 0 for text alone."""
        where = np.flatnonzero((ids == self.image_token_id) | (ids == self.video_token_id))
        return int(where[-1]) + 1 if len(where) else 0

    def prepare(self, sources: Sequence[Any]) -> list[Any]:
        """Prepare images and videos, as `encode_prompt` takes them."""
        return self._all_pixels([list(sources)])

    def _images_of(self, sample: Sample) -> list[Any]:
        """Prepare the images of a sample.

        Raises:
            RecordError: one cannot be decoded.
        """
        with naming(sample.data, sample.where, sample.id, "image"):
            return self._all_pixels([sample.images])

    def _all_pixels(self, images: Any, options: Mapping[str, Any] | None = None) -> list[Any]:
        """Prepare the images of a batch; nested lists group those of one sample.

        Args:
            options: of the image processor's call.
        """
        nested = isinstance(images, (list, tuple)) and any(isinstance(i, (list, tuple)) for i in images)
        groups = [flat(group) for group in images] if nested else [[image] for image in flat(images)]
        return [self.pixels_of(image, has_several(group), options) for group in groups for image in group]

    def pixels_of(
        self, source: Any, several: bool = False, options: Mapping[str, Any] | None = None, where: str = ""
    ) -> Any:
        """Prepare one image or video: (3, h, w), or a `Picture` where it may be several rows.

        Args:
            source: as in `open_image`, or a `Video`.
            several: whether the sample has other images.
            options: of the image processor's call.
            where: name of the image in messages.
        """
        if self.transform is None:
            raise ZooError("An image was given to a model that has no vision encoder.")
        if isinstance(source, Video):
            if self.videos is None or self.layout is None:
                raise ZooError(f"Video {source.path!r} was given to a model that takes images only.")
            return self.videos(source)
        if self.pictures is None:
            pixels = to_pixels(source, self.transform, where)
            if self.layout is None or not self.transform.also:
                return pixels
            return Picture(pixels[None], Cut(size=self.transform.size))  # a row (P,) does not show its size
        picture = self.pictures(source, where, several, options)
        if self.layout is not None:
            return picture
        if picture.cut.rows != 1:
            raise ZooError(f"The image processor cuts an image into {picture.cut.rows}, and the model has no layout.")
        return picture.pixels[0]


def _key(content: Any) -> Any:
    return content if isinstance(content, str) else tuple([part.get("text") for part in content])


def build_layout(given: Mapping[str, Any]) -> Any:
    """Build a layout without parameters, for counting."""
    node = {key: value for key, value in given.items() if key != "given"}
    derived = {k: tuple(v) if isinstance(v, list) else v for k, v in given.get("given", {}).items()}
    return build("layout", node, text_dim=None, **derived)


def build_pruner(given: Mapping[str, Any]) -> Any:
    """Build a pruner without weights, for counting."""
    derived = {k: tuple(v) if isinstance(v, list) else v for k, v in given.get("given", {}).items()}
    with torch.device("meta"):
        return build("pruner", given["pruner"], **derived)


def _count_images(messages: Sequence[Mapping[str, Any]]) -> int:
    return sum(
        p["type"] in ("image", "video") for m in messages if not isinstance(m["content"], str) for p in m["content"]
    )


register_processor(ZooConfig, ZooProcessor)
