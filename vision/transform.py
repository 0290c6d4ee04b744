"""Pixels as an encoder wants them, from its own `ImageTransform`."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from zoo.registry import ImageTransform, ZooError
from zoo.vision.images import open_image

if TYPE_CHECKING:
    from PIL import Image

FITS = ("crop", "squash", "pad")
RESAMPLES = ("nearest", "bilinear", "bicubic", "lanczos")


def to_pixels(image: Any, transform: ImageTransform, where: str = "") -> Tensor:
    """Fit an image to `transform.size` and normalise it: (3, h, w) float32.

    An array (h, w) or (h, w, 3) of uint8 that has the right size already is only normalised: 15 us at 64 x 64.
    Everything else goes through `open_image` and Pillow's resampling, which timm and open_clip use too.
    """
    if callable(image):
        image = image()
    if not (isinstance(image, np.ndarray) and image.dtype == np.uint8 and _fits(image.shape, transform.size)):
        image = np.asarray(fit(open_image(image, where), transform))
    return normalise(torch.from_numpy(np.require(image, requirements=["C", "W"])), transform)  # a copy only if need be


def normalise(image: Tensor, transform: ImageTransform) -> Tensor:
    """Turn uint8 pixels (..., h, w, 3) or grey ones (h, w) into normalised float32 ones (..., 3, h, w)."""
    factor, offset = _affine(transform)
    image = image[None] if image.ndim == 2 else image.movedim(-1, -3)
    return torch.addcmul(offset, image.float(), factor)


def fit(image: Image.Image, transform: ImageTransform) -> Image.Image:
    """Resize an RGB image to `transform.size` by its way of fitting.

    crop: the shorter side to size (the longer one rounded down, as in transformers and torchvision), then the centre.
    squash: both sides, the aspect ratio is lost. pad: the longer side, the rest filled with the mean colour.
    """
    from PIL import Image

    if transform.fit not in FITS or transform.resample not in RESAMPLES:
        raise ZooError(
            f"An image transform has fit {transform.fit!r} and resample {transform.resample!r};"
            f" allowed are {', '.join(FITS)} and {', '.join(RESAMPLES)}."
        )
    height, width = transform.size
    resample = Image.Resampling[transform.resample.upper()]
    if image.size == (width, height):
        return image
    if transform.fit == "squash":
        return image.resize((width, height), resample)
    wide = image.width * height >= image.height * width  # at least as wide as the target, in proportion
    if wide == (transform.fit == "crop"):
        inner = (max(1, image.width * height // image.height), height)
    else:
        inner = (width, max(1, image.height * width // image.width))
    left, top = int((inner[0] - width) / 2), int((inner[1] - height) / 2)  # negative where there is room to fill
    resized = image if image.size == inner else image.resize(inner, resample)
    if transform.fit == "crop":
        return resized.crop((left, top, left + width, top + height))
    ground = Image.new("RGB", (width, height), tuple(round(255 * m) for m in transform.mean))  # type: ignore[arg-type]
    ground.paste(resized, (-left, -top))
    return ground


def _fits(shape: tuple[int, ...], size: tuple[int, int]) -> bool:
    return shape[:2] == size and (len(shape) == 2 or (len(shape) == 3 and shape[2] == 3))


@lru_cache(maxsize=64)
def _affine(transform: ImageTransform) -> tuple[Tensor, Tensor]:
    """`pixel * factor + offset` normalises a uint8 pixel; both are (3, 1, 1)."""
    with torch.device("cpu"):
        mean = torch.tensor(transform.mean, dtype=torch.float64).view(3, 1, 1)
        std = torch.tensor(transform.std, dtype=torch.float64).view(3, 1, 1)
        return (1 / (255 * std)).float(), (-mean / std).float()
