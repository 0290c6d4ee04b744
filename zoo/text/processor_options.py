"""Options of a processor's call: passed to the tokenizer or the image processor, or refused by name.

The known options are those of the installed transformers (`ProcessingKwargs`, and the image processor's own): a new one
is passed on if the tokenizer or the image processor takes it, and refused otherwise.
"""

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from zoo.registry import ZooError, require_at_least, unknown

_TEXT, _IMAGES = "text_kwargs", "images_kwargs"
_GROUPS = (_TEXT, _IMAGES, "videos_kwargs", "audio_kwargs")
_ROWS = "a text is one row, with its images"
_FRAMES = "a zoo.vision.images.video.Video selects its frames"
_SOUND = "the model takes no sound"
_REFUSED = {
    "is_split_into_words": "texts are given as strings",
    "sanitize_control_tokens": "a text part that holds an image's token is refused, and other tokens are read as such",
    "return_overflowing_tokens": _ROWS,
    "stride": _ROWS,
    "data_format": "pixels are (M, 3, h, w)",
    "input_data_format": "arrays are (h, w, 3) or (3, h, w), recognised by their shape",
    "image_seq_length": "the model defines the number of tokens of an image",
    **dict.fromkeys(("do_sample_frames", "fps", "num_frames", "video_metadata", "return_metadata"), _FRAMES),
    **dict.fromkeys(("sampling_rate", "raw_speech", "load_audio_backend"), _SOUND),
}
_NO_DEFAULTS = frozenset(_REFUSED) | {"verbose"}  # of a tokenizer's own settings
_FLAGS = {"return_mm_token_type_ids": "kinds", "return_text_replacement_offsets": "replacements"}


@dataclass
class Options:
    """Options of one call.

    Attributes:
        text: of the tokenizer.
        images: of the image processor.
        tensors: `pt`, `np`, or None: lists; `auto`: `pt`, but lists if rows are not padded.
        kinds: return the kind of each token: text, image or video.
        replacements: return the text that replaced each image token, and its place.
    """

    text: dict[str, Any] = field(default_factory=lambda: {"padding": True})
    images: dict[str, Any] = field(default_factory=dict)
    tensors: str | None = "auto"
    kinds: bool = False
    replacements: bool = False

    def settle(self) -> "Options":
        """Resolve `auto`, and check values.

        Raises:
            ZooError: a value is not allowed.
        """
        if self.tensors == "auto":
            self.tensors = None if self.text["padding"] in (False, None, "do_not_pad") else "pt"
        if self.tensors not in (None, "pt", "np"):
            raise ZooError(f"return_tensors must be 'pt', 'np' or None, got {self.tensors!r}.")
        require_at_least(1, **{name: self.text.get(name) for name in ("max_length", "pad_to_multiple_of")})
        return self


def known_options(image_processor: Any = None) -> dict[str, frozenset[str]]:
    """Return the options of each group (`text_kwargs` and the like), and under `""` those without a group."""
    from transformers.processing_utils import ProcessingKwargs

    stated = ProcessingKwargs.__annotations__
    groups = {g: frozenset(stated[g].__annotations__) if g in stated else frozenset() for g in _GROUPS}
    own = getattr(image_processor, "valid_kwargs", None)
    groups[_IMAGES] |= frozenset(getattr(own, "__annotations__", ()))
    return groups | {"": frozenset(stated) - frozenset(_GROUPS)}


def sort_options(
    given: Mapping[str, Any], processor: Any, *, tokenizer: Any, image_processor: Any, pixels: str
) -> Options:
    """Sort the options of a call.

    Args:
        given: options of the call, directly or in `text_kwargs` and the like.
        processor: may have defaults, in attributes of these names.
        tokenizer: takes options of text; its own init arguments are defaults.
        image_processor: takes options of images; None: pixels are prepared by an `ImageTransform`.
        pixels: description of that transform, for messages.

    Raises:
        ZooError: an option that does not exist, is given twice, or is unsupported; with the reason.
    """
    groups = known_options(image_processor)
    options = Options()
    stated = {
        n: getattr(tokenizer, n, v) for n, v in tokenizer.init_kwargs.items() if n in groups[_TEXT] - _NO_DEFAULTS
    }
    held = {n: getattr(processor, n) for n in (*_GROUPS, *_FLAGS) if getattr(processor, n, None)}
    for name, value in [*_each(held, groups), *stated.items(), *_each(given, groups)]:
        if name == "return_tensors":
            options.tensors = value
        elif name in _FLAGS:
            setattr(options, _FLAGS[name], bool(value))
        elif name in _REFUSED:
            if value not in (None, False):
                raise ZooError(f"The option {name!r} is not taken: {_REFUSED[name]}.")
        elif name in groups[_TEXT]:
            if name not in inspect.signature(type(tokenizer).__call__).parameters:
                raise ZooError(f"The option {name!r} is not taken: the tokenizer has no such option.")
            options.text[name] = value
        elif name not in groups[_IMAGES]:
            raise ZooError(f"The option {name!r} is not taken: it is neither of the text nor of images.")
        elif image_processor is None:
            raise ZooError(f"The option {name!r} is not taken: pixels are prepared for the encoder, {pixels}.")
        else:
            options.images[name] = value
    return options.settle()


def _each(given: Mapping[str, Any], groups: Mapping[str, frozenset[str]]) -> Iterator[tuple[str, Any]]:
    """Iterate over options of all groups; those of `common_kwargs` first, which others override."""
    flat = {name: value for name, value in given.items() if name not in (*_GROUPS, "common_kwargs")}
    every = frozenset().union(*groups.values())
    for name, value in [*(given.get("common_kwargs") or {}).items(), *flat.items()]:
        if name not in every:
            raise unknown("option of the processor's call", name, [*every, *_GROUPS])
        yield name, value
    for group in _GROUPS:
        for name, value in (given.get(group) or {}).items():
            if name not in groups[group]:
                raise unknown(f"option of {group}", name, groups[group])
            if name in flat:
                raise ZooError(f"The option {name!r} is given twice, directly and in {group}.")
            yield name, value
