"""Images as a published model wants them: decoded by us, cut and normalised by the image processor that it names.

The processor is one of transformers' own, built from plain values; what it gives is what the model was trained on, to
the bit. An image may become several rows (crops), which a layout joins again behind the projector.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from zoo.registry import Cut, ImageTransform, ZooError
from zoo.registry.versions import BY_PILLOW
from zoo.vision.images.decode import open_image
from zoo.vision.images.video import read_video

_OURS = ("call", "whole_if_several", "processor_class")  # beside the values of a processor

RESAMPLES = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}  # numbers of PIL.Image.Resampling


@dataclass
class Picture:
    """An image, or a video, as the model will see it."""

    pixels: Tensor  # (R, 3, h, w)
    cut: Cut


class Pictures:
    """An image processor of transformers.

    Args:
        config: its values as it saves them, `image_processor_type` among them; beside them `call`, options of the call,
            and `whole_if_several`: one of several images of a sample is not cut.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config = dict(config)

    @cached_property
    def processor(self) -> Any:
        """The processor itself, built on first use (loader workers build their own)."""
        return processor_of(self.config)

    def __getstate__(self) -> dict[str, Any]:
        return {"config": self.config}

    def __call__(
        self, source: Any, where: str = "", several: bool = False, options: Mapping[str, Any] | None = None
    ) -> Picture:
        """Decode, cut and normalise one image.

        Args:
            source: what `open_image` takes.
            where: what to call it in an error.
            several: it is one of several of its sample.
            options: of the processor's call, which win over those that the model states.
        """
        image = open_image(source, where)
        whole = several and self.config.get("whole_if_several")
        given = [[image, image]] if whole else [image]  # such a processor counts the images of a sample
        out = self.processor(images=given, return_tensors="pt", **{**self.config.get("call", {}), **(options or {})})
        pixels = out["pixel_values"]
        pixels = pixels[0] if pixels.ndim == 5 else pixels  # (R, 3, h, w)
        grid = tuple(int(out[key][0][0]) for key in ("rows", "cols")) if "rows" in out else (1, 1)
        kind = "image" if len(pixels) == 1 else "crop"
        return Picture(pixels, Cut(len(pixels), kind, (image.height, image.width), (grid[0], grid[1])))


class Videos(Pictures):
    """A video processor of transformers: the frames that were asked for, each prepared as an image."""

    def __call__(
        self, source: Any, where: str = "", several: bool = False, options: Mapping[str, Any] | None = None
    ) -> Picture:
        """Read and normalise the frames of a `Video`."""
        clip = read_video(source)
        out = self.processor(videos=[clip.frames], do_sample_frames=False, return_tensors="pt")
        pixels = out["pixel_values_videos" if "pixel_values_videos" in out else "pixel_values"][0]  # (F, 3, h, w)
        height, width = clip.frames.shape[1:3]
        times = tuple(i / clip.fps for i in clip.indices)  # as transformers counts them: frames are evenly spaced
        return Picture(pixels, Cut(len(pixels), "frame", (height, width), times=times, duration=clip.duration))


def processor_of(config: Mapping[str, Any]) -> Any:
    """Build the image or video processor that plain values describe.

    Raises:
        ZooError: transformers has no such class, or it does not take these values.
    """
    import transformers
    from transformers.image_processing_utils import BaseImageProcessor

    values = {key: value for key, value in config.items() if key not in _OURS}
    name = str(values.pop("video_processor_type", None) or values.pop("image_processor_type", "")).removesuffix("Fast")
    values.pop("image_processor_type", None)
    cls = getattr(transformers, name, None) if name.endswith(("ImageProcessor", "VideoProcessor")) else None
    if not (isinstance(cls, type) and issubclass(cls, BaseImageProcessor)):
        raise ZooError(f"transformers has no image processor {name!r}, which the model names for its pixels.")
    if name in BY_PILLOW:  # as AutoImageProcessor does
        cls = getattr(transformers, f"{name}Pil")
    try:
        return cls(**values)
    except (TypeError, ValueError) as error:
        raise ZooError(f"{name} does not take the values that the model states: {error}") from error


def stack(pictures: Sequence[Tensor | Picture]) -> dict[str, Any]:
    """Join images for the encoder: `pixel_values` (M, 3, h, w), and `cuts` where images have rows of their own."""
    if not pictures:
        return {}
    if all(isinstance(p, Tensor) for p in pictures):
        return {"pixel_values": torch.stack(list(pictures))}  # type: ignore[arg-type]
    rows = [p.pixels if isinstance(p, Picture) else p[None] for p in pictures]
    shapes = {tuple(r.shape[1:]) for r in rows}
    if len(shapes) > 1:
        raise ZooError(f"Images of one batch have rows of unlike shapes: {sorted(shapes)}.")
    return {
        "pixel_values": torch.cat(rows),
        "cuts": [p.cut if isinstance(p, Picture) else Cut() for p in pictures],
    }


def blank(picture: Tensor | Picture) -> Tensor | Picture:
    """The same picture with zero pixels: what a blind model is shown."""
    if isinstance(picture, Tensor):
        return torch.zeros_like(picture)
    return Picture(torch.zeros_like(picture.pixels), picture.cut)


def as_clip(transform: ImageTransform) -> dict[str, Any]:
    """Say a transform as values of `CLIPImageProcessor`, which resizes and cuts as ours does.

    Raises:
        ZooError: it pads images to squares.
    """
    if transform.fit == "pad":
        raise ZooError(
            "images are resized and then padded to squares (fit=pad), which no image processor of transformers does; "
            "compose the model with vision.fit=crop or squash"
        )
    height, width = transform.size
    crop = transform.fit == "crop"
    return {
        "image_processor_type": "CLIPImageProcessor",
        **statistics(transform),
        "size": {"shortest_edge": min(height, width)} if crop else {"height": height, "width": width},
        "crop_size": {"height": height, "width": width},
        "do_center_crop": crop,
    }


def statistics(transform: ImageTransform) -> dict[str, Any]:
    """Mean, standard deviation and filter of a transform, as an image processor of transformers names them."""
    return {
        "image_mean": list(transform.mean),
        "image_std": list(transform.std),
        "resample": next(number for number, name in RESAMPLES.items() if name == transform.resample),
    }
