"""Make the image smaller before the encoder: the control that every pruner has to beat, at as many tokens.

The encoder runs on a smaller square of patches, with its positions interpolated: that saves its own time too, is blind
to the question, and keeps the layout. An image that a model cuts into crops is cut as without it, and each crop is
smaller; so are the frames of a video. Nothing is dropped, so positions are those of a smaller image. A model was never
trained on such images, unless its encoder takes images of any size.

Paper: Liao et al., arXiv:2510.07143 (VTC-Bench), whose code divides the sides of images by a whole number for an
encoder of native resolution, and re-encodes them as JPEG, which this does not.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from zoo.fusion.pruners.topk import check_ratio, count_kept
from zoo.registry import ImageFeatures, Pruner, register, unknown

ROUNDINGS = ("below", "nearest")


@dataclass
class DownsampleConfig:
    keep_ratio: float = 0.25  # share of image tokens, in (0, 1]: of a pruner that this is the control of
    # below: the largest square with no more tokens than a pruner of that ratio leaves, newlines of a layout included |
    # nearest: each side is rounded to sqrt(keep_ratio) of its patches, so that there may be a few more
    rounding: str = "below"

    def __post_init__(self) -> None:
        check_ratio(self.keep_ratio)
        if self.rounding not in ROUNDINGS:
            raise unknown("rounding", self.rounding, ROUNDINGS)


@register("pruner", "downsample")
class Downsample(Pruner, nn.Module):
    """Training-free. Sides are rounded down to what a projector divides; with keep_ratio 1 nothing changes."""

    front = True

    def __init__(self, config: DownsampleConfig) -> None:
        super().__init__()
        self.config = config

    def encoder_grid(self, grid: tuple[int, int], tokens: Callable[..., int | None]) -> tuple[int, int]:
        """Return a smaller grid of the same proportions."""
        ratio = self.config.keep_ratio
        if ratio == 1:
            return grid
        if self.config.rounding == "nearest":
            rows, kept, most = max(1, math.floor(grid[0] * math.sqrt(ratio) + 0.5)), math.prod(grid), None
        else:
            rows, kept = grid[0], count_kept(math.prod(grid), ratio)
            most = tokens(grid, kept=kept)
            if most is None and (whole := tokens(grid)):  # parts that need a grid: the share of what an image takes
                most = count_kept(whole, ratio)
        smaller = [(h, max(1, round(grid[1] * h / grid[0]))) for h in range(rows, 0, -1)]
        smaller = [g for g in smaller if math.prod(g) <= kept] or smaller[-1:]
        for found in smaller:
            taken = tokens(found)
            if taken is not None and (most is None or taken <= most):
                return found
        return smaller[0]  # the parts behind take none of them, and refuse this one with their reason

    def num_tokens(self, n: int) -> int:
        """Count the tokens of the smaller image: all that the encoder makes of it."""
        return n

    def forward(self, image: ImageFeatures) -> ImageFeatures:
        """Return the features (M, N, D) of the smaller image as they are."""
        return image
