"""The call of the processor: text and images to model inputs.

Arguments and results are those of transformers' processors. Two defaults differ: rows are padded, and are tensors.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from transformers import BatchFeature

from zoo.registry import ZooError
from zoo.text.processor_options import Options, sort_options
from zoo.text.tokenizer import pad_id_of
from zoo.vision.images.processors import Picture, cut_of, flat, stack
from zoo.vision.images.video import as_video


class CallMixin:
    """`ZooProcessor.__call__`; samples are encoded by `encode`, which caches tokens."""

    tokenizer: Any
    transform: Any
    pictures: Any  # Pictures or None
    layout: Any
    num_image_tokens: int
    image_token: str
    image_token_id: int
    video_token: str | None
    video_token_id: int
    spells: bool
    _all_pixels: Callable[..., list[Any]]
    _pixels: Callable[..., Any]
    pixels_of: Callable[..., Any]
    _instead: Callable[[Any, str], str]

    def __call__(
        self,
        images: Any = None,
        text: str | Sequence[str] | None = None,
        videos: Any = None,
        audio: Any = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """Tokenize text that holds the image token where an image goes, and transform the images.

        Args:
            images: one image, a list in the order of their tokens over the whole batch, or a list of the images of
                each text.
            text: one text or several; without any, the images alone are transformed.
            videos: paths or `zoo.vision.images.video.Video`s, in the order of their tokens.
            audio: refused.
            kwargs: options of transformers' processors, directly or in `text_kwargs`, `images_kwargs`:
                `padding` (True), `max_length`, `truncation`, `pad_to_multiple_of`, `padding_side`, `return_tensors`
                (`pt`; lists with `padding=False`), `add_special_tokens`, `return_offsets_mapping`, ...

        Returns:
            input_ids, attention_mask (B, T) and further requested results; pixel_values (M, 3, h, w) if there are
            images, with `cuts` if an image has several rows; images_per_row if images have no placeholders.

        Raises:
            ZooError: images and image tokens do not match, in all or of a text, truncation cuts an image, or an option
                is unknown or unsupported.
        """
        if audio is not None:
            raise ZooError("The model takes no sound: leave out audio.")
        if text is None and images is None and videos is None:
            raise ZooError("The processor needs text, images or videos.")
        own = self.pictures.processor if self.pictures else None
        options = sort_options(kwargs, self, tokenizer=self.tokenizer, image_processor=own, pixels=str(self.transform))
        shown = self._all_pixels(images, options.images)
        films = [self.pixels_of(as_video(v)) for v in flat(videos)]
        if options.images:
            self._require_size(shown, options.images)
        data: dict[str, Any] = {}
        if text is None:
            shown = [*shown, *films]
        else:
            data, shown = self._written(text, shown, films, options, _counts(images))
        pixels = stack(shown)
        if pixels and options.tensors != "pt":
            values = pixels["pixel_values"]
            pixels["pixel_values"] = values.numpy() if options.tensors == "np" else list(values)
        return BatchFeature(data | pixels)

    def _require_size(self, pictures: Sequence[Any], options: dict[str, Any]) -> None:
        """Refuse options that make pixels of a size that the encoder does not take."""
        if self.layout is not None and self.layout.native:
            return
        wanted = tuple(self.transform.shape)
        for picture in pictures:
            pixels = picture.pixels if isinstance(picture, Picture) else picture
            if (shape := tuple(pixels.shape[-len(wanted) :])) != wanted:
                size, takes = (" x ".join(map(str, s[-2:])) for s in (shape, wanted))
                raise ZooError(
                    f"The options {', '.join(sorted(options))} make pixels of {size}, and the encoder takes {takes}."
                )

    # ---- text ------------------------------------------------------------------------------------------------------

    def _written(
        self, text: str | Sequence[str], shown: list[Any], films: list[Any], options: Options, counts: list[int]
    ) -> tuple[dict[str, Any], list[Any]]:
        """Tokenize texts with the placeholders of their images; also return the images in the order of the texts."""
        texts = [text] if isinstance(text, str) else list(text)
        if not texts:
            raise ZooError("text is an empty list: give one text or more, or leave it out.")
        if any(not isinstance(t, str) for t in texts):
            kinds = ", ".join(sorted({type(t).__name__ for t in texts}))
            raise ZooError(
                f"text must be a string or a list of strings, got {kinds}; images come first: (images, text)."
            )
        if self.tokenizer.pad_token_id is None and options.text["padding"] not in (False, None, "do_not_pad"):
            pad_id_of(self.tokenizer, len(texts) if options.text["padding"] in (True, "longest") else 2)
            options.text["padding"] = False  # a single row needs no padding
        given = self._matched(texts, shown, films)
        for number, (one, count) in enumerate(zip(texts, counts, strict=False) if len(counts) == len(texts) else ()):
            if (wanted := one.count(self.image_token)) != count:
                raise ZooError(
                    f"Text {number} holds {wanted} times {self.image_token!r}, but {count} images were given for it."
                )
        marks = re.compile("|".join(map(re.escape, given)))
        written, replaced, order = [], [], []
        for one in texts:
            pieces, spans, at, length = [], [], 0, 0
            for found in marks.finditer(one):
                picture = given[found.group()].pop(0)
                order.append(picture)
                instead = self._instead(picture, found.group())
                pieces += [one[at : found.start()], instead]
                length += len(pieces[-2])
                kind = "video" if cut_of(picture).kind == "frame" else "image"
                spans.append(
                    {
                        "type": kind,
                        "span": found.span(),
                        "new_span": (length, length + len(instead)),
                        "text": found.group(),
                        "replacement": instead,
                    }
                )
                at, length = found.end(), length + len(instead)
            written.append("".join([*pieces, one[at:]]))
            replaced.append(spans)
        data = self._tokenized(written, options)
        self._require_whole(written, data["input_ids"], options)
        if options.kinds:
            data["mm_token_type_ids"] = self._kinds(data["input_ids"])
        if options.replacements:
            data["text_replacement_offsets"] = replaced
        if order and not self.num_image_tokens:
            data["images_per_row"] = [len(spans) for spans in replaced]
        return data, order

    def _matched(self, texts: Sequence[str], shown: list[Any], films: list[Any]) -> dict[str, list[Any]]:
        """Group images and videos by their placeholder token.

        Raises:
            ZooError: their number is not that of their tokens in the texts.
        """
        given = {self.image_token: ("images", shown)}
        if self.video_token not in (None, self.image_token):
            given[self.video_token] = "videos", films
        elif films and shown:
            raise ZooError(f"Images and videos have one token here, {self.image_token!r}: give one kind in a call.")
        elif films:
            given = {self.image_token: ("videos", films)}
        for token, (what, some) in given.items():
            if (wanted := sum(text.count(token) for text in texts)) != len(some):
                raise ZooError(f"The text holds {wanted} times {token!r}, but {len(some)} {what} were given.")
        return {token: list(some) for token, (_, some) in given.items()}

    def _tokenized(self, texts: list[str], options: Options) -> dict[str, Any]:
        if self.num_image_tokens or self.layout is not None:
            return dict(self.tokenizer(texts, **options.text, return_tensors=options.tensors))
        # Images have no tokens here: their marks are removed after tokenization, or the text around them would merge.
        if options.text.get("return_offsets_mapping") or options.text.get("text_pair") is not None:
            raise ZooError(
                "return_offsets_mapping and text_pair are not supported if images have no tokens in the text."
            )
        padding = {n: options.text[n] for n in ("padding", "max_length", "pad_to_multiple_of") if n in options.text}
        side = options.text.get("padding_side")
        rows = self.tokenizer(texts, **{**options.text, "padding": False, "return_tensors": None})
        left = [[i for i, token in enumerate(ids) if token != self.image_token_id] for ids in rows["input_ids"]]
        kept = {
            name: [[row[i] for i in at] for row, at in zip(values, left, strict=True)]
            if isinstance(values[0], list)
            else values
            for name, values in rows.items()
        }
        return dict(self.tokenizer.pad(kept, **padding, padding_side=side, return_tensors=options.tensors))

    def _require_whole(self, texts: Sequence[str], ids: Any, options: Options) -> None:
        """Refuse rows that lost tokens of an image."""
        if not options.text.get("truncation") or not (self.num_image_tokens or self.layout is not None):
            return
        tokens = {self.image_token: self.image_token_id}
        if self.video_token and self.video_token_id != self.image_token_id:
            tokens[self.video_token] = self.video_token_id
        for number, (text, row) in enumerate(zip(texts, ids, strict=True)):
            found = np.asarray(row)
            for token, wanted in tokens.items():
                if (have := int((found == wanted).sum())) != (need := text.count(token)):
                    longest = options.text.get("max_length") or self.tokenizer.model_max_length
                    raise ZooError(
                        f"Truncation to {longest} tokens cuts the images of text {number}: {have} of {need} {token!r} "
                        "would be left. Raise max_length, or leave out truncation."
                    )

    def _kinds(self, ids: Any) -> Any:
        """Return the kind of each token: 0 text, 1 image, 2 video."""
        own = self.video_token_id if self.video_token_id != self.image_token_id else -1

        def kinds(row: Any) -> Any:
            row = np.asarray(row)
            return (row == self.image_token_id) + 2 * (row == own)

        if isinstance(ids, torch.Tensor):
            return torch.from_numpy(kinds(ids.numpy()))
        return kinds(ids) if isinstance(ids, np.ndarray) else [kinds(row).tolist() for row in ids]


def _counts(images: Any) -> list[int]:
    """Count the images of each text, where they are given as a list for each; else empty."""
    nested = isinstance(images, (list, tuple)) and all(isinstance(group, (list, tuple)) for group in images)
    return [len(flat(group)) for group in images] if nested else []
