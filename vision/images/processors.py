"""Pixels for published models: decoded here, cut and normalised by the model's own image processor of transformers.

The processor is built from plain values; its pixels are bit for bit those of the released model. An image may become
several rows (crops), which a layout joins again after the projector.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from zoo.registry import Cut, ImageTransform, ZooError, one_line
from zoo.registry.versions import BY_PILLOW
from zoo.vision.images.decode import open_image, size_of
from zoo.vision.images.transform import one_row
from zoo.vision.images.video import ByModel, Video, as_video, read_video

# Our keys among the values of a processor.
OWN_VALUES = frozenset({"call", "whole_if_several", "sizes", "frame_share", "also"})

# Image processors whose bounds count the pixels of both frames that a still image is shown as.
BOTH_FRAMES = ("Glm4vImageProcessor", "Glm46VImageProcessor")

_SIZES = ("size", "crop_size", "max_image_size", "image_grid_pinpoints")  # values in pixels
FEATURES = "features"  # key of a batch: what is kept of its images, see `zoo.runs.kept_features`
RESAMPLES = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}  # numbers of PIL.Image.Resampling


@dataclass
class Picture:
    """Pixels of an image or a video, and how it was cut."""

    pixels: Tensor  # (R, 3, h, w); of an image that keeps its shape the patches of all rows (S, P)
    cut: Cut


@dataclass
class Shown(Picture):
    """An image of a run that keeps features: found by `key`, and without pixels where they are there."""

    key: bytes  # of its content; empty: it has none
    features: Mapping[str, Tensor] | None  # packed, name -> (R, ...); None: they are not kept yet
    plain: bool  # an image that is a row by itself, without a cut


class Pictures:
    """An image processor of transformers.

    Args:
        config: values of the processor as it saves them, with `image_processor_type`; also `call`, options of its call,
            `whole_if_several`: do not cut an image that is one of several of a sample, and `sizes`: the encoder's own
            size and the smaller one of its images, each (height, width); images are cut as for the former; and `also`,
            for each further encoder the values that differ, its `sizes` among them: its pixels follow in each row.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config = dict(config)

    @cached_property
    def processor(self) -> Any:
        """The processor of transformers, built on first use (each data worker builds its own)."""
        return processor_of(resized(self.config))

    @cached_property
    def others(self) -> list[Any]:
        """Of further encoders, with values of their own."""
        own = {key: value for key, value in self.config.items() if key != "also"}
        return [type(self)({**own, **values}) for values in self.config.get("also", ())]

    def __getstate__(self) -> dict[str, Any]:
        return {"config": self.config}

    def share_of(self, source: Any) -> float:
        """Return which share of the tokens of the largest image an image that keeps its shape has.

        By its size, which is read without decoding it; 1 where that is not possible.

        Args:
            source: as in `open_image`.
        """
        size = size_of(source)
        most = int(self.processor.size["longest_edge"]) / self.processor.patch_size**2
        most /= frames_counted(str(self.config["image_processor_type"]))
        if size is None:
            return 1.0
        try:
            return float(self.processor.get_number_of_image_patches(*size) / most)
        except ValueError:  # of a shape which no number of pixels allows: refused when it is prepared
            return 1.0

    def __call__(
        self, source: Any, where: str = "", several: bool = False, options: Mapping[str, Any] | None = None
    ) -> Picture:
        """Decode, cut and normalise one image.

        Args:
            source: as in `open_image`.
            where: name of the image in messages.
            several: whether the sample has other images.
            options: of the processor's call, with precedence over those in the config.
        """
        image = open_image(source, where)
        whole = several and self.config.get("whole_if_several")
        given = [[image, image]] if whole else [image]  # such a processor does not cut if a sample has several images
        call = {**self.config.get("call", {}), **as_cut(self.config, (image.height, image.width)), **(options or {})}
        try:
            out = self.processor(images=given, return_tensors="pt", **call)
        except ValueError as error:  # that of a shape which no number of pixels allows
            name = f"Image {where}" if where else "An image"
            raise ZooError(f"{name} of {image.height} x {image.width} pixels: {one_line(error)}.") from error
        pixels = out["pixel_values"]
        if "image_grid_thw" in out:  # patches, in rows of unlike length
            return Picture(
                pixels.flatten(1), native_cut(out["image_grid_thw"][0], self.processor, (image.height, image.width))
            )
        pixels = pixels[0] if pixels.ndim == 5 else pixels  # (R, 3, h, w)
        grid = tuple(int(out[key][0][0]) for key in ("rows", "cols")) if "rows" in out else (1, 1)
        kind = "image" if len(pixels) == 1 else "crop"
        picture = Picture(pixels, Cut(len(pixels), kind, (image.height, image.width), (grid[0], grid[1])))
        return _one_picture([picture, *(other(image, where, several, options) for other in self.others)])


def _one_picture(pictures: Sequence[Picture]) -> Picture:
    """Write the rows of one image for several encoders one behind the other."""
    if len(pictures) == 1:
        return pictures[0]
    if len(rows := {picture.cut.rows for picture in pictures}) > 1:
        raise ZooError(f"The encoders' image processors cut one image into unlike numbers of rows, {sorted(rows)}.")
    return Picture(one_row([picture.pixels for picture in pictures]), pictures[0].cut)


def native_cut(grid: Sequence[Any], processor: Any, size: tuple[int, int]) -> Cut:
    """Describe an image that keeps its shape.

    Args:
        grid: (t, h, w) of its patches.
        processor: that made them.
        size: (height, width) of the image in pixels.
    """
    rows, height, width = (int(x) for x in grid)
    merge = int(processor.merge_size)
    return Cut(rows, "image", size, patches=(height // merge, width // merge))


def frames_counted(kind: str) -> int:
    """Count how often the bounds of an image processor, by its class's name, count a pixel of a still image."""
    return 2 if kind.removesuffix("Fast") in BOTH_FRAMES else 1


class Videos(Pictures):
    """A video processor of transformers: selected frames, each prepared as an image.

    Its values may have `sizes`, as those of `Pictures`, and `frame_share`: the share of the selected frames to read.
    """

    def __call__(
        self, source: Any, where: str = "", several: bool = False, options: Mapping[str, Any] | None = None
    ) -> Picture:
        """Read and normalise the frames of a `Video`."""
        if getattr(self.processor, "temporal_patch_size", 0) > 1:
            return self._native(as_video(source))
        clip = read_video(source, self.config.get("frame_share", 1.0))
        return _one_picture([self._frames(clip), *(other._frames(clip) for other in self.others)])

    def _frames(self, clip: Any) -> Picture:
        out = self.processor(videos=[clip.frames], do_sample_frames=False, return_tensors="pt")
        pixels = out["pixel_values_videos" if "pixel_values_videos" in out else "pixel_values"][0]  # (F, 3, h, w)
        height, width = clip.frames.shape[1:3]
        times = tuple(i / clip.fps for i in clip.indices)  # as in transformers, which assumes a constant rate
        return Picture(pixels, Cut(len(pixels), "frame", (height, width), times=times, duration=clip.duration))

    def _native(self, video: Video) -> Picture:
        """Read a video that keeps its shape: a row for each few frames, patches one behind the other."""
        from transformers.video_utils import VideoMetadata

        own = self.processor
        if video.sampling == "model":
            video = ByModel(**vars(video), by=self._chosen)
        clip = read_video(video, self.config.get("frame_share", 1.0))
        known = VideoMetadata(total_num_frames=clip.total, fps=clip.fps, frames_indices=list(clip.indices))
        if getattr(own, "cap_pixels_per_frame", True) is None:  # transformers warns until it is stated
            own.cap_pixels_per_frame = False
        each, frames = int(own.temporal_patch_size), clip.frames
        if len(frames) < each:  # Qwen3-VL's refuses a single frame; others repeat it, as all do with an odd last one
            frames = np.concatenate([frames, np.repeat(frames[-1:], each - len(frames), 0)])
        try:
            out = own(videos=[frames], video_metadata=[known], do_sample_frames=False, return_tensors="pt")
        except ValueError as error:
            raise ZooError(f"Video {video.path!r}: {one_line(error)}.") from error
        height, width = clip.frames.shape[1:3]
        cut = native_cut(out["video_grid_thw"][0], own, (height, width))
        shown = [i / clip.fps for i in clip.indices]
        shown += shown[-1:] * (-len(shown) % each)  # the last frame fills its row
        times = tuple((shown[i] + shown[i + each - 1]) / 2 for i in range(0, len(shown), each))
        seconds = each * clip.duration / len(clip.indices)
        about: dict[str, Any] = {"times": times, "duration": clip.duration, "interval": seconds}
        about["starts"] = tuple(shown[::each])
        return Picture(out["pixel_values_videos"], replace(cut, kind="frame", **about))

    def _chosen(self, total: int, fps: float) -> Sequence[int]:
        """Choose frames as the processor does; of clips too short for its rule, those of one row."""
        from transformers.video_utils import VideoMetadata

        own, more = self.processor, {}
        length = total / fps if fps else 0.0
        if own.fps is None and own.num_frames is None:
            more = {"fps": 2.0}  # that of the authors' own code, where a checkpoint states none
        about = VideoMetadata(total_num_frames=total, fps=fps, duration=length)
        try:
            chosen, why = [int(i) for i in own.sample_frames(about, **more)], "none"
        except (ValueError, ZeroDivisionError) as error:
            chosen, why = [], one_line(error)
        if chosen:
            return chosen
        if length >= 1:
            raise ZooError(f"The model's video processor chooses no frames of {total}: {why}.")
        count = min(total, int(own.temporal_patch_size))  # rules by the second or in whole rows leave nothing of these
        return [i * total // count for i in range(count)]


def processor_of(config: Mapping[str, Any]) -> Any:
    """Build an image or video processor of transformers from plain values.

    Raises:
        ZooError: transformers has no such class, or it refuses the values.
    """
    import transformers

    values = {key: value for key, value in config.items() if key not in OWN_VALUES | {"processor_class"}}
    name = str(values.pop("video_processor_type", None) or values.pop("image_processor_type", "")).removesuffix("Fast")
    values.pop("image_processor_type", None)
    cls = class_named(name)
    if cls is None:
        raise ZooError(f"transformers has no image processor {name!r}, which the model names for its pixels.")
    if name in BY_PILLOW:  # as AutoImageProcessor does
        cls = getattr(transformers, f"{name}Pil")
    try:
        return cls(**values)
    except (TypeError, ValueError) as error:
        raise ZooError(f"{name} does not take the values that the model states: {error}") from error


def class_named(name: str) -> Any:
    """Return the class of an image or video processor of transformers; None: it has none of this name."""
    import transformers
    from transformers.image_processing_utils import BaseImageProcessor

    name = name.removesuffix("Fast")
    cls = getattr(transformers, name, None) if name.endswith(("ImageProcessor", "VideoProcessor")) else None
    return cls if isinstance(cls, type) and issubclass(cls, BaseImageProcessor) else None


def resized(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of a processor with all sizes in pixels scaled as `sizes` asks."""
    if "sizes" not in config:
        return dict(config)
    return {key: _scaled(value, config["sizes"]) if key in _SIZES else value for key, value in config.items()}


def _scaled(value: Any, sizes: Sequence[Sequence[int]]) -> Any:
    """Scale all numbers of a value by the ratio of two sizes, each (height, width); whole crops stay whole."""
    if isinstance(value, Mapping):
        return {key: _scaled(v, sizes) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_scaled(v, sizes) for v in value]
    return None if value is None else max(1, round(value * sizes[1][0] / sizes[0][0]))


def as_cut(config: Mapping[str, Any], image: tuple[int, int]) -> dict[str, Any]:
    """Return options that cut an image, (height, width), into the crops that it has at the encoder's own size.

    Smaller crops would otherwise be more crops: processors choose those that show most of an image's pixels.
    """
    from transformers.image_processing_utils import select_best_resolution

    if "sizes" not in config:
        return {}
    if pinpoints := config.get("image_grid_pinpoints"):
        best = select_best_resolution(image, pinpoints)
        return {"image_grid_pinpoints": [_scaled(best, config["sizes"])]}
    if config.get("call", {}).get("crop_to_patches"):
        from transformers.models.got_ocr2.image_processing_got_ocr2 import get_optimal_tiled_canvas

        most = [config.get(key, few) for key, few in (("min_patches", 1), ("max_patches", 12))]
        columns, rows = get_optimal_tiled_canvas(image, tuple(config["sizes"][0]), *most)
        return {"min_patches": columns * rows, "max_patches": columns * rows}
    return {}


def has_several(sources: Sequence[Any]) -> bool:
    """Whether a sample shows several images; videos beside an image do not count."""
    return sum(not isinstance(source, Video) for source in sources) > 1


def stack(pictures: Sequence[Tensor | Picture]) -> dict[str, Any]:
    """Stack images for the encoder: `pixel_values` (M, 3, h, w), or patches (S, P); `cuts` if images have rows."""
    if not pictures:
        return {}
    if all(isinstance(p, Tensor) for p in pictures):
        return {"pixel_values": torch.stack(list(pictures))}  # type: ignore[arg-type]
    if all(isinstance(p, Shown) for p in pictures):
        return _shown(pictures)  # type: ignore[arg-type]
    rows = [p.pixels if isinstance(p, Picture) else p[None] for p in pictures]
    shapes = {tuple(r.shape[1:]) for r in rows}  # of patches: one
    if len(shapes) > 1:
        raise ZooError(f"Images of one batch have rows of unlike shapes: {sorted(shapes)}.")
    return {
        "pixel_values": torch.cat(rows),
        "cuts": [p.cut if isinstance(p, Picture) else Cut() for p in pictures],
    }


def _shown(pictures: Sequence[Shown]) -> dict[str, Any]:
    """Stack images whose features are kept, or may be: `pixel_values` of those that have pixels, and `FEATURES`."""
    made: dict[str, Any] = {}
    if there := [p.pixels for p in pictures if len(p.pixels)]:
        made["pixel_values"] = torch.cat(there)
    if not all(p.plain for p in pictures):
        made["cuts"] = [Cut() if p.plain else p.cut for p in pictures]
    kept = [p.features for p in pictures if p.features is not None]
    made[FEATURES] = {
        "keys": [p.key for p in pictures],
        "cuts": [p.cut for p in pictures],
        "rows": [p.cut.rows for p in pictures],
        "pixels": [len(p.pixels) for p in pictures],
        "there": [p.features is not None for p in pictures],
        "kept": {name: torch.cat([f[name] for f in kept]) for name in kept[0]} if kept else {},
    }
    return made


def blank(picture: Tensor | Picture) -> Tensor | Picture:
    """Return the picture with zero pixels, for evaluation without images."""
    if isinstance(picture, Tensor):
        return torch.zeros_like(picture)
    return Picture(torch.zeros_like(picture.pixels), picture.cut)


def as_clip(transform: ImageTransform) -> dict[str, Any]:
    """Translate a transform to values of `CLIPImageProcessor`, which resizes and crops alike.

    Raises:
        ZooError: the transform pads images to squares.
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


def flat(images: Any) -> list[Any]:
    """All images of a nested list, or of an array of several."""
    if images is None:
        return []
    if isinstance(images, (list, tuple)) or getattr(images, "ndim", 0) == 4:
        return [i for item in images for i in flat(item)]
    return [images]


def cut_of(picture: Any) -> Cut:
    """How an image was cut; one that was not is as large as its pixels."""
    if isinstance(picture, Picture):
        return picture.cut
    if picture.ndim == 1:  # a row for several encoders, of an image that was not cut
        return Cut()
    return Cut(size=(int(picture.shape[-2]), int(picture.shape[-1])))
