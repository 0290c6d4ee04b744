"""Resize, crop and normalise images by an encoder's `ImageTransform`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from zoo.registry import ImageTransform, ZooError, unknown
from zoo.registry.versions import TORCHVISION_HAS_LANCZOS
from zoo.vision.images.decode import open_image

if TYPE_CHECKING:
    from PIL import Image

FITS = ("crop", "squash", "pad")
RESAMPLES = ("nearest", "bilinear", "bicubic", "lanczos")
LIBRARIES = ("pillow", "torchvision")


def to_pixels(image: Any, transform: ImageTransform, where: str = "") -> Tensor:
    """Fit an image to `transform.size` and normalise it: (3, h, w) float32.

    A uint8 array (h, w) or (h, w, 3) of the target size is only normalised (15 us at 64 x 64). Other sources are
    decoded by `open_image` and resampled. For several encoders (`transform.also`) the image is decoded once, and each
    has its own pixels in the row (P,), see `one_row`.
    """
    if callable(image):
        image = image()
    if transform.also:
        decoded = open_image(image, where)
        return one_row([_fitted(decoded, each) for each in transform.each])
    if not (isinstance(image, np.ndarray) and image.dtype == np.uint8 and _fits(image.shape, transform.size)):
        return _fitted(open_image(image, where), transform)
    return normalise(torch.from_numpy(np.require(image, requirements=["C", "W"])), transform)  # a copy only if need be


def _fitted(image: Image.Image, transform: ImageTransform) -> Tensor:
    pixels = np.asarray(fit(image, transform))
    return normalise(torch.from_numpy(np.require(pixels, requirements=["C", "W"])), transform)


def one_row(pixels: Sequence[Tensor]) -> Tensor:
    """Write the pixels of several encoders, each (..., 3, h, w), one behind the other: (..., P)."""
    return torch.cat([p.flatten(-3) for p in pixels], dim=-1)


def split_row(pixels: Tensor, transform: ImageTransform) -> list[Tensor]:
    """Give each encoder its pixels: (..., P) to (..., 3, h, w) for each of `transform.each`, as views."""
    shapes = [each.shape for each in transform.each]
    if not transform.also:
        return [pixels]
    parts = pixels.split([math.prod(shape) for shape in shapes], dim=-1)
    return [part.unflatten(-1, shape) for part, shape in zip(parts, shapes, strict=True)]


def normalise(image: Tensor, transform: ImageTransform) -> Tensor:
    """Turn uint8 pixels (..., h, w, 3) or grey ones (h, w) into normalised float32 ones (..., 3, h, w)."""
    factor, offset = _affine(transform)
    image = image[None] if image.ndim == 2 else image.movedim(-1, -3)
    return torch.addcmul(offset, image.float(), factor)


def require_transform(transform: ImageTransform) -> None:
    """Refuse an unknown fit, filter or library, and a std that is not positive.

    Raises:
        ZooError: with the field and its value.
    """
    if transform.fit not in FITS or transform.resample not in RESAMPLES:
        raise ZooError(
            f"An image transform has fit {transform.fit!r} and resample {transform.resample!r};"
            f" allowed are {', '.join(FITS)} and {', '.join(RESAMPLES)}."
        )
    if transform.resample_by not in LIBRARIES:
        raise unknown("library to resample by", transform.resample_by, LIBRARIES)
    for name in ("mean", "std"):
        if len(getattr(transform, name)) != 3:
            raise ZooError(f"The {name} of an image transform has three numbers, got {list(getattr(transform, name))}.")
    if not min(transform.std) > 0:
        raise ZooError(f"The std of an image transform must be more than 0 for each colour, got {list(transform.std)}.")


def fit(image: Image.Image, transform: ImageTransform) -> Image.Image:
    """Resize an RGB image to `transform.size`.

    crop: resize the shorter side (the longer one rounded down, as in transformers and torchvision), then centre crop.
    squash: resize both sides without the aspect ratio. pad: resize the longer side, fill with the mean colour.
    """
    require_transform(transform)
    if image.size == transform.size[::-1]:
        return image
    by_torchvision = transform.resample_by == "torchvision" and transform.fit != "pad"
    if by_torchvision and (transform.resample != "lanczos" or TORCHVISION_HAS_LANCZOS):
        return _by_torchvision(image, transform)
    return _by_pillow(image, transform)


def _inner(image: Image.Image, transform: ImageTransform) -> tuple[int, int, int, int]:
    """Size (width, height) that an image is resized to, and the target's corner in it (left, top)."""
    height, width = transform.size
    wide = image.width * height >= image.height * width  # at least as wide as the target, in proportion
    if transform.fit == "squash":
        inner = (width, height)
    elif wide == (transform.fit == "crop"):
        inner = (max(1, image.width * height // image.height), height)
    else:
        inner = (width, max(1, image.height * width // image.width))
    # The corner is negative if the target is larger, to be filled.
    return *inner, int((inner[0] - width) / 2), int((inner[1] - height) / 2)


def _by_torchvision(image: Image.Image, transform: ImageTransform) -> Image.Image:
    from PIL import Image
    from torchvision.transforms.v2 import functional as F

    (height, width), (across, down, left, top) = transform.size, _inner(image, transform)
    pixels = torch.from_numpy(np.array(image)).movedim(-1, 0)  # (3, h, w), channels last: resizes in half the time
    kind = F.InterpolationMode("nearest-exact" if transform.resample == "nearest" else transform.resample)
    pixels = F.resize(pixels, [down, across], kind, antialias=True)
    pixels = pixels[:, top : top + height, left : left + width].movedim(0, -1)
    return Image.fromarray(np.ascontiguousarray(pixels.numpy()))


def _by_pillow(image: Image.Image, transform: ImageTransform) -> Image.Image:
    from PIL import Image

    (height, width), (across, down, left, top) = transform.size, _inner(image, transform)
    resample, inner = Image.Resampling[transform.resample.upper()], (across, down)
    resized = image if image.size == inner else image.resize(inner, resample)
    if transform.fit != "pad":
        return resized.crop((left, top, left + width, top + height))
    ground = Image.new("RGB", (width, height), tuple(round(255 * m) for m in transform.mean))  # type: ignore[arg-type]
    ground.paste(resized, (-left, -top))
    return ground


def _fits(shape: tuple[int, ...], size: tuple[int, int]) -> bool:
    return shape[:2] == size and (len(shape) == 2 or (len(shape) == 3 and shape[2] == 3))


@lru_cache(maxsize=64)
def _affine(transform: ImageTransform) -> tuple[Tensor, Tensor]:
    """Factor and offset (3, 1, 1) that normalise a uint8 pixel in one multiply-add."""
    with torch.device("cpu"):
        mean = torch.tensor(transform.mean, dtype=torch.float64).view(3, 1, 1)
        std = torch.tensor(transform.std, dtype=torch.float64).view(3, 1, 1)
        return (1 / (255 * std)).float(), (-mean / std).float()
