"""Crops of an image of any shape, joined again on the image's own grid: LLaVA-NeXT's "anyres" and LLaVA-OneVision's.

An image becomes an overview and the crops of the pinpoint resolution that suits it. Behind the projector the crops'
tokens are put together to one grid, the rows and columns that show padding only are cut off, each line ends with a
learnt newline token, and the overview's tokens stand in front. Above `max_crops` times the tokens of one crop the grid
is scaled down (bilinear). An image of one row, or tokens that fill no grid any more, are ended by one newline.

What a pruner kept of each crop stands in the raster order of the joined grid, padding included (`zoo.fusion.stitch`):
how much of it lies on padding is known only when it was chosen, and the prompt is written before. With `kept_lines`
each line of that grid ends with the newline too, as in FasterVLM's code for `spatial_unpad`; else one ends them all.

Paper: Liu et al., LLaVA-NeXT (2024, blog); Li et al., arXiv:2408.03326 (LLaVA-OneVision), section 3.2 and figure 3.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.fusion.stitch import stitched_order
from zoo.registry import Cut, ImageFeatures, ZooError, register, unknown

FRAMES = ("keep", "bilinear", "average", "max")


@dataclass
class AnyResConfig:
    pinpoints: list[list[int]] = field(default_factory=list)  # [height, width] in pixels that an image may be fitted to
    max_crops: int = 0  # the joined grid holds at most about this many crops' tokens; 0: no bound
    newline: bool = True  # a learnt token ends each line
    kept_lines: bool = False  # also of what a pruner kept of crops; else one ends them all
    # Tokens of each frame of a video: keep | bilinear, to half of its grid behind the projector, and one newline at the
    # end | average, max: pooled two by two ahead of the projector.
    frames: str = "keep"

    def __post_init__(self) -> None:
        if any(len(p) != 2 or min(p) < 1 for p in self.pinpoints):
            raise ZooError(f"pinpoints must be pairs of height and width in pixels, got {self.pinpoints}.")
        if self.max_crops < 0:
            raise ZooError(f"max_crops must not be negative, got {self.max_crops}.")
        if self.frames not in FRAMES:
            raise unknown("frames", self.frames, FRAMES)


@register("layout", "anyres")
class AnyRes(nn.Module):
    """Without `text_dim` it counts only."""

    needs: frozenset[str] = frozenset()
    provides: frozenset[str] = frozenset({"image_tokens"})
    destroys: frozenset[str] = frozenset()

    def __init__(
        self,
        config: AnyResConfig,
        *,
        text_dim: int | None,
        grid: tuple[int, int] | None,
        num_tokens: int,
        image_size: tuple[int, int],
        encoder_grid: tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        self.config, self.grid, self.tokens, self.image_size = config, grid, num_tokens, image_size
        self.encoder_grid = encoder_grid
        self.given: dict[str, Any] = {
            "grid": list(grid) if grid else None,
            "num_tokens": num_tokens,
            "image_size": list(image_size),
            "encoder_grid": list(encoder_grid) if encoder_grid else None,
        }
        self.newline = None
        if config.newline and text_dim is not None:
            self.newline = nn.Parameter(torch.randn(text_dim) * text_dim**-0.5)

    def num_tokens(self, n: int) -> int:
        """The most that an image may take."""
        shapes = [(h, w) for h, w in self.config.pinpoints] or [self.image_size]
        cuts = [Cut(1 + math.prod(self._crops((h, w))), "crop", (h, w)) for h, w in shapes]
        return max(self.count(cut) for cut in cuts)

    def count(self, cut: Cut) -> int:
        """Count the tokens of an image, or a video, that was cut so."""
        end = int(self.config.newline)
        if cut.kind == "frame":
            ending = end if self.config.frames == "bilinear" else 0
            return cut.rows * math.prod(self._frame_grid() or (self.tokens,)) + ending
        if cut.rows == 1 or self.grid is None:
            return cut.rows * self.tokens + (self._kept_lines(cut) or end)
        _, lines, columns = self._shape(cut)
        return self.tokens + lines * (columns + end)

    def forward(self, tokens: Tensor | Sequence[Tensor], cuts: Sequence[Cut]) -> Tensor:
        """Lay out rows (M, K, C), or those of each image (R, K, C), as (S, C)."""
        images = tokens.split([c.rows for c in cuts]) if isinstance(tokens, Tensor) else tokens
        return torch.cat(list(self._images(images, cuts)))

    def project(self, image: ImageFeatures, projector: Any, cuts: Sequence[Cut]) -> Any:
        """Run the projector; frames are pooled ahead of it if the config says so, kept tokens of crops put in order."""
        if self.config.frames not in ("average", "max") or image.grid is None or all(c.kind != "frame" for c in cuts):
            return self._ordered(projector(image), image, cuts)
        pool = F.avg_pool2d if self.config.frames == "average" else F.max_pool2d
        rows = []
        for cut, tokens in zip(cuts, image.tokens.split([c.rows for c in cuts]), strict=True):  # (R, N, D)
            grid = image.grid
            if cut.kind == "frame":
                pooled = pool(tokens.transpose(1, 2).unflatten(2, grid), 2)  # (R, D, h / 2, w / 2)
                grid, tokens = (pooled.shape[2], pooled.shape[3]), pooled.flatten(2).transpose(1, 2)
            rows.append(projector(ImageFeatures(tokens, grid)))
        return rows

    def _ordered(self, tokens: Tensor, image: ImageFeatures, cuts: Sequence[Cut]) -> Tensor | list[Tensor]:
        """Put what was kept of crops (M, K, C) in the order of the joined grid, over all rows of an image."""
        grid = image.patch_grid
        if image.keep is None or grid is None or image.keep.shape != tokens.shape[:2]:
            if any(map(self._kept_lines, cuts)):
                raise ZooError("layout.kept_lines ends lines of patches, and this pruner leaves tokens that are none.")
            return tokens
        rows = [c.rows for c in cuts]
        ordered = []
        for cut, some, keep in zip(cuts, tokens.split(rows), image.keep.split(rows), strict=True):
            if cut.kind == "crop" and cut.rows > 1:
                lines = bool(self._kept_lines(cut))
                order = stitched_order(keep, grid, self._crops(cut.size), newline=lines)  # (R * K [+ lines],)
                some = torch.cat([some.flatten(0, 1), *self._end(some)])[order][None]  # a newline is -1, the last one
            ordered.append(some)
        return ordered

    def _kept_lines(self, cut: Cut) -> int:
        """Count the newlines of what a pruner kept of an image's crops, where each line ends with one; else 0."""
        crops = cut.kind == "crop" and cut.rows > 1 and self.grid is None
        if not (crops and self.config.kept_lines and self.config.newline and self.encoder_grid):
            return 0
        return self._crops(cut.size)[0] * self.encoder_grid[0]

    def _images(self, images: Sequence[Tensor], cuts: Sequence[Cut]) -> Iterator[Tensor]:
        for cut, rows in zip(cuts, images, strict=True):  # (R, K, C)
            if cut.kind == "frame":
                yield from (self._frames(rows), *(self._end(rows) if self.config.frames == "bilinear" else ()))
            elif cut.rows == 1 or self.grid is None:
                yield from (rows.flatten(0, 1), *([] if self._kept_lines(cut) else self._end(rows)))
            else:
                yield from (rows[0], self._join(rows[1:], cut))

    def _end(self, like: Tensor) -> list[Tensor]:
        return [] if self.newline is None else [self.newline[None].to(like)]

    def _join(self, crops: Tensor, cut: Cut) -> Tensor:
        """Put the crops (R - 1, K, C) together: lines of the image, each with its newline, (L, C)."""
        assert self.grid is not None, "joined on a grid"
        (window, lines, columns), (rows, across) = self._shape(cut), self._crops(cut.size)
        if rows * across != len(crops):
            raise ZooError(f"{len(crops)} crops do not fill {rows} x {across} for an image of {list(cut.size)} pixels.")
        whole = crops.unflatten(0, (rows, across)).unflatten(2, self.grid)  # (R, A, h, w, C)
        whole = whole.permute(4, 0, 2, 1, 3).flatten(1, 2).flatten(2, 3)  # (C, R * h, A * w)
        top, left = window
        whole = whole[:, top : whole.shape[1] - top, left : whole.shape[2] - left]
        if (lines, columns) != tuple(whole.shape[1:]):
            whole = F.interpolate(whole[None].contiguous(), [lines, columns], mode="bilinear")[0]
        if self.newline is not None:
            ends = self.newline[:, None, None].expand(-1, lines, 1).to(whole)
            whole = torch.cat([whole, ends], dim=2)
        return whole.flatten(1, 2).transpose(0, 1)

    def _frames(self, frames: Tensor) -> Tensor:
        """Tokens of frames (F, K, C), scaled down where the config says so, as (F * k, C)."""
        small = self._frame_grid()
        if small and self.grid and self.config.frames == "bilinear":
            maps = frames.transpose(1, 2).unflatten(2, self.grid).contiguous()  # (F, C, h, w)
            frames = F.interpolate(maps, small, mode="bilinear").flatten(2).transpose(1, 2)
        return frames.flatten(0, 1)

    def _frame_grid(self) -> tuple[int, int] | None:
        if self.grid is None or self.config.frames == "keep":
            return self.grid
        if self.config.frames != "bilinear":
            return self.grid[0] // 2, self.grid[1] // 2
        return math.ceil(self.grid[0] / 2), math.ceil(self.grid[1] / 2)

    def _crops(self, size: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of crops for an image of `size`."""
        if not self.config.pinpoints:
            raise ZooError("layout 'anyres' cuts images by pinpoints, and none are given.")
        height, width = best_pinpoint(size, self.config.pinpoints)
        return height // self.image_size[0], width // self.image_size[1]

    def _shape(self, cut: Cut) -> tuple[tuple[int, int], int, int]:
        """Lines and columns to cut off at each side, and how many are left behind the bound on crops."""
        assert self.grid is not None, "joined on a grid"
        (h, w), (rows, across) = self.grid, self._crops(cut.size)
        lines, columns = rows * h, across * w
        height, width = cut.size
        top = left = 0
        if width / height > columns / lines:  # rounded to seven places, as everywhere in this family
            top = (lines - int(round(height * (columns / width), 7))) // 2
        else:
            left = (columns - int(round(width * (lines / height), 7))) // 2
        lines, columns = lines - 2 * top, columns - 2 * left
        if self.config.max_crops:
            ratio = math.sqrt(lines * columns / (self.config.max_crops * h**2))
            if ratio > 1.1:
                lines, columns = int(lines // ratio), int(columns // ratio)
        return (top, left), lines, columns


def best_pinpoint(size: tuple[int, int], pinpoints: Sequence[Sequence[int]]) -> tuple[int, int]:
    """The resolution that shows the most of an image of `size`; among equals, the one that wastes the least."""
    height, width = size

    def merit(pinpoint: Sequence[int]) -> tuple[int, int]:
        scale = min(pinpoint[1] / width, pinpoint[0] / height)
        shown = min(int(width * scale) * int(height * scale), width * height)
        return shown, shown - pinpoint[0] * pinpoint[1]

    best = max(pinpoints, key=merit)
    return best[0], best[1]
