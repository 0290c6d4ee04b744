"""Image processor and tokens of a published layout, for a model that is composed from parts.

A layout writes tokens around tiles and needs cut images: the image processor of the layout's family cuts them. Without
a layout the encoder's own transform is translated to an image processor.
"""

import math
from collections.abc import Mapping
from typing import Any

from zoo.registry import ImageTransform
from zoo.vision.images.processors import statistics

VIDEO = "<video>"  # as the processors of all families have it


def cut_by(layout: Mapping[str, Any] | None, transform: ImageTransform | None) -> dict[str, Any] | None:
    """Return the values of an image processor that cuts images for a layout, of the layout's family.

    Args:
        layout: node of the slot.
        transform: of the encoder.

    Returns:
        What `Pictures` takes; None where images are whole.
    """
    if not layout or transform is None:
        return None
    height, width = transform.size
    sides, square = {"height": height, "width": width}, {"longest_edge": height}
    name, values = layout["name"], statistics(transform)
    most = int(layout.get("most", 12))
    if name == "anyres" and layout.get("pinpoints"):
        values |= {"image_grid_pinpoints": [list(p) for p in layout["pinpoints"]], "size": sides}
        if layout.get("max_crops"):
            return {"image_processor_type": "LlavaOnevisionImageProcessor", **values, "whole_if_several": True}
        kind = {"image_processor_type": "LlavaNextImageProcessor", "crop_size": sides, "do_center_crop": False}
        return {**kind, **values}
    if name != "tiles":
        return None
    if layout.get("style") == "grid":
        longest = {"longest_edge": height * _lines(most)}
        kind = {"image_processor_type": "Idefics3ImageProcessor", "max_image_size": square, "size": longest}
        return {**kind, **values, "call": {"return_row_col_info": True}}
    kind = {"image_processor_type": "GotOcr2ImageProcessor", "size": sides, "max_patches": max(1, most - 1)}
    return {**kind, **values, "call": {"crop_to_patches": True}}


def frames_as(kind: str, processor: Any) -> dict[str, Any]:
    """Return the video arguments that a family's processor requires, for a model that takes images only.

    Args:
        kind: class of a video processor, which prepares frames as images that are not cut.
        processor: of the model; nothing is to be added where it prepares videos itself.
    """
    from zoo.vision.images.processors import processor_of

    if processor.videos is not None or processor.pictures is None:
        return {}
    alike = {key: processor.pictures.config[key] for key in ("size", "image_mean", "image_std", "resample")}
    return {"video_processor": processor_of({"video_processor_type": kind, **alike})}


def tokens_for(layout: Mapping[str, Any] | None) -> list[str]:
    """List the tokens that a layout writes into prompts, and those that its family's processor needs."""
    if not layout:
        return []
    if layout["name"] == "anyres":
        return [VIDEO] if layout.get("frames") == "bilinear" else []
    if layout["name"] != "tiles":
        return []
    marks = [token for token in (layout.get("begin"), layout.get("end")) if token]
    if layout.get("style") != "grid":
        return [*marks, VIDEO]
    lines = range(1, _lines(int(layout.get("most", 12))) + 1)
    places = [f"<row_{row}_col_{column}>" for row in lines for column in lines]
    return [*marks, str(layout.get("overview", "<global-img>")), *places, "<end_of_utterance>"]


def _lines(most: int) -> int:
    """Side of the largest square grid with at most this number of tiles, the overview included."""
    return max(1, math.isqrt(most - 1))
