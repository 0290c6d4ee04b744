"""Pixels that a checkpoint of transformers was trained on, as the file of its image processor states them.

What the file leaves out is as the class that it names has it: the files of 2022 often leave out all but a few values.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from zoo.registry import ZooError
from zoo.vision.encoders.checkpoints import UnreachedError, read_json
from zoo.vision.images.processors import RESAMPLES, class_named

_WARPED = 384  # `shortest_edge` from which ConvNextImageProcessor squashes images, as their authors evaluated them


Colours = tuple[float, float, float]


@dataclass(frozen=True)
class StatedPixels:
    """Values of an image processor; None, empty or 0 where it has none.

    Attributes:
        mean, std: of RGB in [0, 1].
        resample, fit: as in `ImageTransform`.
        height: of images in pixels.
        shortest: side in pixels, where no height is stated.
    """

    mean: Colours | None = None
    std: Colours | None = None
    resample: str = ""
    fit: str = ""
    height: int = 0
    shortest: int = 0


def stated_pixels(source: str) -> StatedPixels:
    """Read a checkpoint's processor_config.json, or preprocessor_config.json, in transformers' order.

    Raises:
        ZooError: a file cannot be read, or has values that no image processor of transformers takes.
    """
    try:
        newer = read_json(source, "processor_config.json", optional=True).get("image_processor")
    except UnreachedError:  # the older file may be in the cache
        newer = None
    stated = newer or read_json(source, "preprocessor_config.json", optional=True)
    if not isinstance(stated, Mapping):
        raise ZooError(f"The image processor of {source!r} is stated as {stated!r:.80}, where an object is needed.")
    named = str(stated.get("image_processor_type") or stated.get("feature_extractor_type") or "")
    cls = class_named(named.replace("FeatureExtractor", "ImageProcessor"))

    def known(key: str) -> Any:
        return getattr(cls, key, None) if stated.get(key) is None else stated[key]

    size = _sides(source, "size", stated.get("size"), square=bool(getattr(cls, "default_to_square", False)))
    crop = _sides(source, "crop_size", known("crop_size")) if known("do_center_crop") else {}
    fit = "crop" if crop or "shortest_edge" in size else "squash" if "height" in size else ""
    if getattr(cls, "__name__", "") == "ConvNextImageProcessor" and size.get("shortest_edge", 0) >= _WARPED:
        fit = "squash"
    plain = known("do_normalize") is False
    return StatedPixels(
        (0.0, 0.0, 0.0) if plain else _colours(source, "image_mean", known("image_mean")),
        (1.0, 1.0, 1.0) if plain else _colours(source, "image_std", known("image_std")),
        next((name for number, name in RESAMPLES.items() if known("resample") == number), ""),
        fit,
        (crop or size).get("height", 0),
        (crop or size).get("shortest_edge", 0),
    )


def _sides(source: str, key: str, value: Any, square: bool = True) -> dict[str, int]:
    """Return a size by the names of its sides; a number is a side, as in processors saved before 2022."""
    from transformers.image_processing_utils import get_size_dict

    if not value:
        return {}
    try:
        sides = value if isinstance(value, Mapping) else get_size_dict(value, default_to_square=square)
        return {name: int(side) for name, side in sides.items() if side}
    except (ValueError, TypeError, AttributeError) as error:
        raise ZooError(f"The image processor of {source!r} states {key}={value!r:.80}, which is not a size.") from error


def _colours(source: str, key: str, value: Any) -> Colours | None:
    """Return a number for each colour; one number is that of all three."""
    each = value if isinstance(value, Sequence) and not isinstance(value, str) else [value] * 3
    if value is None or not each:
        return None
    if len(each) != 3 or not all(isinstance(number, (int, float)) for number in each):
        raise ZooError(f"The image processor of {source!r} states {key}={value!r:.80}: three numbers are needed.")
    red, green, blue = (float(number) for number in each)
    return red, green, blue
