"""Crops of an image of any shape, joined again on the image's own grid: LLaVA-NeXT's "anyres" and LLaVA-OneVision's.

An image is encoded as an overview and the crops of the best matching pinpoint resolution. After the projector the
crops' tokens are stitched to one grid, rows and columns that show only padding are cut off, each line ends with a
learned newline token, and the overview's tokens come first. A grid of more than `max_crops` times the tokens of a crop
is scaled down (bilinear). An image of one row ends with one newline, and so do tokens of a projector without a grid.

After a pruner that keeps a share of each crop's tokens, an image takes that share of the count without a pruner: of the
overview, of the stitched grid without padding and scaled down, of each frame of a video. The count does not depend on
scores, since the prompt is written before them: where crops kept more, tokens on padding are dropped first and then,
evenly over crops, those that the pruner ranked last (`zoo.fusion.layouts.crop_order`). The rest keeps the raster order
of the stitched grid and ends with one newline; with `kept_lines` each line ends with one, as without a pruner. This is
ours: FasterVLM's release keeps padding and has no newlines, pruned or not; its branch for unpadded grids, which its
scripts never run, cuts padding off first, keeps every newline, and gives counts that depend on the scores.

Paper: Liu et al., LLaVA-NeXT (2024, blog); Li et al., arXiv:2408.03326 (LLaVA-OneVision), section 3.2 and figure 3.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.fusion.layouts.crop_order import fewer, shows, spread, stitched_order
from zoo.fusion.layouts.crop_places import crop_places, stitched_places
from zoo.registry import Cut, ImageFeatures, Layout, ZooError, register, require_at_least, unknown

FRAMES = ("keep", "bilinear", "average", "max")


@dataclass
class AnyResConfig:
    pinpoints: list[list[int]] = field(default_factory=list)  # resolutions [height, width] in pixels to fit images to
    max_crops: int = 0  # bound on the stitched grid, in tokens of one crop; 0: none
    newline: bool = True  # end each line of patches with a learned token
    kept_lines: bool = False  # also after a pruner; else one newline ends the whole image
    # Tokens of a video frame: keep | bilinear: half the grid after the projector, one newline at the end of the video |
    # average, max: pooled two by two before the projector.
    frames: str = "keep"

    def __post_init__(self) -> None:
        if any(len(p) != 2 or min(p) < 1 for p in self.pinpoints):
            raise ZooError(f"pinpoints must be pairs of height and width in pixels, got {self.pinpoints}.")
        require_at_least(0, max_crops=self.max_crops)
        if self.frames not in FRAMES:
            raise unknown("frames", self.frames, FRAMES)


@register("layout", "anyres")
class AnyRes(Layout, nn.Module):
    """Built without `text_dim`, as the processor does, it only counts tokens."""

    def __init__(
        self,
        config: AnyResConfig,
        *,
        text_dim: int | None,
        grid: tuple[int, int] | None,
        num_tokens: int,
        image_size: tuple[int, int],
        encoder_grid: tuple[int, int] | None = None,
        pruned: bool = True,
    ) -> None:
        """Build the newline and what counting needs.

        Args:
            config: how crops are joined.
            text_dim: width of the newline.
            grid: of a crop's tokens; None if they do not fill one.
            num_tokens: of a crop, after the projector.
            image_size: of a crop in pixels.
            encoder_grid: grid of the encoder's own tokens.
            pruned: the reason for a missing grid: a pruner dropped tokens (True), or the projector resampled them.
        """
        super().__init__()
        self.config, self.grid, self.tokens, self.image_size = config, grid, num_tokens, image_size
        self.pruned = pruned and grid is None and encoder_grid is not None and num_tokens <= math.prod(encoder_grid)
        self.whole = encoder_grid if self.pruned else grid  # grid of a crop without a pruner
        self.given: dict[str, Any] = {
            "grid": list(grid) if grid else None,
            "num_tokens": num_tokens,
            "image_size": list(image_size),
            "encoder_grid": list(encoder_grid) if encoder_grid else None,
            "pruned": pruned,
        }
        # LLaVA-NeXT's initialisation: std 1 / sqrt(C), so about unit norm.
        self.newline = None
        if config.newline and text_dim is not None:
            self.newline = nn.Parameter(torch.randn(text_dim) * text_dim**-0.5)

    def num_tokens(self, n: int) -> int:
        """Return the largest count over all images."""
        shapes = [(h, w) for h, w in self.config.pinpoints] or [self.image_size]
        cuts = [Cut(1 + math.prod(self._crops((h, w))), "crop", (h, w)) for h, w in shapes]
        most = max(self.count(cut) for cut in cuts)
        if not self.config.max_crops or self.whole is None:
            return most
        # Of images that fill a resolution in one direction only, a grid just below the threshold is not scaled down.
        for rows, across in {self._crops(cut.size) for cut in cuts}:
            lines, columns = rows * self.whole[0], across * self.whole[1]
            grids = [(n, columns) for n in range(lines, 0, -2)] + [(lines, n) for n in range(columns, 0, -2)]
            most = max(most, *(self._joined(*self._bounded(*grid)) for grid in grids))
        return most

    def count(self, cut: Cut) -> int:
        """Count the tokens of an image or a video with this cut."""
        end = int(self.config.newline)
        if cut.kind == "frame":
            return cut.rows * self._per_frame() + (end if self.config.frames == "bilinear" else 0)
        if cut.rows == 1 or self.whole is None:
            return cut.rows * self.tokens + end
        return self._joined(*self._shape(cut)[1:])

    def _joined(self, lines: int, columns: int) -> int:
        """Count the tokens of an image with a grid of crops, its overview and its newlines."""
        # Kept tokens have no lines of their own, so that one newline ends the image.
        ends = lines if self.config.kept_lines or not self.pruned else 1
        return self.tokens + self._share(lines * columns) + ends * int(self.config.newline)

    def forward(self, tokens: Tensor | Sequence[Tensor], cuts: Sequence[Cut]) -> Tensor:
        """Join rows (M, K, C), or those of each image (R, K, C), to one sequence (S, C)."""
        if isinstance(tokens, Tensor):
            tokens = self._fewer(tokens, cuts) if self.pruned else tokens.split([c.rows for c in cuts])
        return torch.cat(list(self._images(tokens, cuts)))

    def project(self, image: ImageFeatures, projector: Any, cuts: Sequence[Cut]) -> Any:
        """Run the projector and pool frames, as configured before or behind it; put kept tokens of crops in order."""
        if self.pruned:
            return self._fewer(projector(image), cuts, image)
        if self.config.kept_lines and self.grid is None and any(c.kind == "crop" and c.rows > 1 for c in cuts):
            raise ZooError("layout.kept_lines ends lines of patches, and the projector's tokens are not patches.")
        if self.config.frames == "keep" or all(c.kind != "frame" for c in cuts):
            return projector(image)
        if self.config.frames == "bilinear":
            projected = projector(image).split([c.rows for c in cuts])
            return [self._scaled(x) if cut.kind == "frame" else x for cut, x in zip(cuts, projected, strict=True)]
        if image.grid is None:
            return projector(image)
        pool = F.avg_pool2d if self.config.frames == "average" else F.max_pool2d
        rows = []
        for cut, tokens in zip(cuts, image.tokens.split([c.rows for c in cuts]), strict=True):  # (R, N, D)
            grid = image.grid
            if cut.kind == "frame":  # before the projector, as LLaVA-NeXT-Video: the two do not commute
                pooled = pool(tokens.transpose(1, 2).unflatten(2, grid), 2)  # (R, D, h / 2, w / 2)
                grid, tokens = (pooled.shape[2], pooled.shape[3]), pooled.flatten(2).transpose(1, 2)
            rows.append(projector(ImageFeatures(tokens, grid)))
        return rows

    def places(self, rows: Tensor, image: ImageFeatures, cuts: Sequence[Cut], whole: Layout) -> Tensor:
        """Give the places of the tokens in the runs without a pruner, newlines among them: (S,)."""
        return crop_places(self, rows, image, cuts, whole)

    def _fewer(self, tokens: Tensor, cuts: Sequence[Cut], image: ImageFeatures | None = None) -> list[Tensor]:
        """Reduce the kept tokens of crops and frames (M, K, C) to the counted number: (R, k, C) or (1, L, C) per image.

        Args:
            tokens: after the projector.
            cuts: of each image.
            image: the features before it, for positions and ranks of kept tokens; None: they are unknown.
        """
        known = {name: getattr(image, name, None) for name in ("keep", "groups", "rank", "places")}
        # A projector may have changed the number of rows; what is known per row no longer applies then.
        rows = [c.rows for c in cuts]
        parts = {n: t.split(rows) if t is not None and len(t) == len(tokens) else None for n, t in known.items()}
        left = []
        for i, (cut, some) in enumerate(zip(cuts, tokens.split(rows), strict=True)):
            about = {name: part[i] if (part := parts[name]) is not None else None for name in known}
            if cut.kind == "frame":
                left.append(self._fewer_of_frames(some, about["rank"]))
            elif cut.rows > 1:
                order = self._order(cut, some, **about)
                left.append(torch.cat([some.flatten(0, 1), *self._end(some)])[order][None])  # a newline is the last row
            else:
                left.append(some)
        return left

    def _order(
        self,
        cut: Cut,
        tokens: Tensor,
        keep: Tensor | None,
        groups: Tensor | None,
        rank: Tensor | None,
        places: Tensor | None = None,
    ) -> Tensor:
        """Choose and order the tokens (R, K, C) of an image's crops: (L,) indices over all rows, -1 for a newline."""
        assert self.whole is not None, "called for pruned crops"
        (window, lines, columns), tiles, k = self._shape(cut), self._tiles(cut, len(tokens) - 1), tokens.shape[1]
        shown = shows(tiles, self.whole, window, tokens.device)  # (tiles, h * w)
        if groups is not None:  # merged tokens lie in several places
            shown = _any_of(shown, groups[1:], k)
        else:
            shown = shown.new_ones(len(shown), k) if keep is None else shown.gather(1, keep[1:])  # (tiles, K)
        rank = None if rank is None or rank.shape[1] != k else rank[1:]
        stays = fewer(shown, rank, self._share(lines * columns))
        # The overview has no padding to save on: its share is what the pruner kept of it.
        stays = torch.cat([stays.new_ones(1, k), stays]).flatten()
        order = torch.arange(len(stays), device=tokens.device)
        if places is not None:  # positions are kept: merged tokens too have a line and a column
            keep, order = places, stitched_places(self, cut, places).argsort(stable=True)
        elif keep is not None:
            order = stitched_order(keep, self.whole, tiles)
        order = order[stays[order]]
        if not self.config.kept_lines or self.newline is None:
            return order
        if keep is None:
            raise ZooError("layout.kept_lines ends lines of patches, and this pruner's tokens are not patches.")
        return torch.cat([order[:k], self._ended(order[k:], keep, cut)])

    def _ended(self, joined: Tensor, keep: Tensor, cut: Cut) -> Tensor:
        """Insert a newline, -1, after each line of the stitched grid: (L,) indices of tokens in raster order."""
        assert self.whole is not None, "called for pruned crops"
        ((top, _), lines, _), (rows, across), (h, w) = self._shape(cut), self._crops(cut.size), self.whole
        crop, place = joined // keep.shape[1] - 1, keep.flatten()[joined]
        high = max(1, rows * h - 2 * top)  # of a picture thinner than a patch nothing may be left
        # Tokens on padding, kept where nothing else was left, count to the nearest line.
        line = (crop // across * h + place // w - top).clamp(0, high - 1)
        ends = torch.arange(lines, device=joined.device)
        # Even sort keys for tokens, odd ones for the newline of their line; a scaled grid has fewer lines than `high`.
        turn = torch.cat([2 * (line * lines // high), 2 * ends + 1]).argsort(stable=True)
        return torch.cat([joined, ends.new_full((lines,), -1)])[turn]

    def _fewer_of_frames(self, frames: Tensor, rank: Tensor | None) -> Tensor:
        """Reduce each of the frames (F, K, C) to the counted number of tokens: (F, k, C)."""
        count, (many, kept) = self._per_frame(), frames.shape[:2]
        if count == kept:
            return frames
        rank = spread(kept, frames.device).expand(many, -1) if rank is None or rank.shape[1] != kept else rank
        stays = rank.argsort(dim=1)[:, :count].sort(dim=1).values  # (F, k)
        return frames.gather(1, stays.unsqueeze(-1).expand(-1, -1, frames.shape[-1]))

    def _share(self, n: int) -> int:
        """Apply a pruner's share of a crop to `n` tokens of the unpruned grid; without a pruner return `n`."""
        if not self.pruned or self.whole is None:
            return n
        whole = math.prod(self.whole)
        # In integers, halves up: the processor and the model must count alike, and floats round on their own.
        return (2 * n * self.tokens + whole) // (2 * whole)

    def _per_frame(self) -> int:
        """Count the tokens of one frame of a video."""
        if self.whole is None:
            return self.tokens
        return max(1, self._share(math.prod(self._frame_grid() or self.whole)))

    def _images(self, images: Sequence[Tensor], cuts: Sequence[Cut]) -> Iterator[Tensor]:
        for cut, rows in zip(cuts, images, strict=True):  # (R, K, C)
            if cut.kind == "frame":
                yield self._scaled(rows).flatten(0, 1)
                yield from self._end(rows) if self.config.frames == "bilinear" else ()
            elif cut.rows == 1 or self.grid is None:
                ended = self.pruned and self.config.kept_lines and cut.rows > 1
                yield from (rows.flatten(0, 1), *([] if ended else self._end(rows)))
            else:
                yield from (rows[0], self._join(rows[1:], cut))

    def _end(self, like: Tensor) -> list[Tensor]:
        if self.newline is None:
            return []
        return [like.new_ones(1, 1) if like.shape[-1] == 1 else self.newline[None].to(like)]  # of marks, a mark

    def _join(self, crops: Tensor, cut: Cut) -> Tensor:
        """Stitch the crops (R - 1, K, C) to lines of the image, each with its newline: (L, C)."""
        assert self.grid is not None, "joined on a grid"
        (window, lines, columns), (rows, across) = self._shape(cut), self._tiles(cut, len(crops))
        whole = crops.unflatten(0, (rows, across)).unflatten(2, self.grid)  # (R, A, h, w, C)
        # Rows of crops and rows of patches become lines, and likewise columns: the stitched image, channels first.
        whole = whole.permute(4, 0, 2, 1, 3).flatten(1, 2).flatten(2, 3)  # (C, R * h, A * w)
        top, left = window
        whole = whole[:, top : whole.shape[1] - top, left : whole.shape[2] - left]
        if (lines, columns) != tuple(whole.shape[1:]):
            whole = F.interpolate(whole[None].contiguous(), [lines, columns], mode="bilinear")[0]
        if self.newline is not None:
            ends = self._end(crops)[0].transpose(0, 1).unsqueeze(-1).expand(-1, lines, 1)  # (C, L, 1)
            whole = torch.cat([whole, ends], dim=2)
        return whole.flatten(1, 2).transpose(0, 1)

    def _scaled(self, frames: Tensor) -> Tensor:
        """Scale frames (F, K, C) on the grid of a crop down to (F, k, C); others are returned as they are."""
        small = self._frame_grid()
        if not small or not self.grid or self.config.frames != "bilinear" or frames.shape[1] != math.prod(self.grid):
            return frames
        maps = frames.transpose(1, 2).unflatten(2, self.grid).contiguous()  # (F, C, h, w)
        return F.interpolate(maps, small, mode="bilinear").flatten(2).transpose(1, 2)

    def row_grid(self, cut: Cut) -> tuple[int, int] | None:
        """Return the grid of a frame or a crop behind `project`."""
        return self._frame_grid() if cut.kind == "frame" else self.grid

    def frame_tokens(self, cut: Cut) -> int:
        """Count the tokens of a frame behind `project`."""
        return self._per_frame()

    def _frame_grid(self) -> tuple[int, int] | None:
        """Grid of a frame in the sequence, without a pruner."""
        if self.whole is None or self.config.frames == "keep":
            return self.whole
        if self.config.frames != "bilinear":
            return self.whole[0] // 2, self.whole[1] // 2
        return math.ceil(self.whole[0] / 2), math.ceil(self.whole[1] / 2)

    def _crops(self, size: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of crops for an image of `size`."""
        if not self.config.pinpoints:
            raise ZooError("layout 'anyres' cuts images by pinpoints, and none are given.")
        height, width = best_pinpoint(size, self.config.pinpoints)
        return height // self.image_size[0], width // self.image_size[1]

    def _tiles(self, cut: Cut, count: int) -> tuple[int, int]:
        """Rows and columns of an image's `count` crops.

        Raises:
            ZooError: the pinpoint of the image has another number of crops.
        """
        rows, across = self._crops(cut.size)
        if rows * across != count:
            raise ZooError(f"{count} crops do not fill {rows} x {across} for an image of {list(cut.size)} pixels.")
        return rows, across

    def _shape(self, cut: Cut) -> tuple[tuple[int, int], int, int]:
        """Padding lines and columns at each side, and the lines and columns of the stitched grid after scaling."""
        assert self.whole is not None, "joined on a grid"
        (h, w), (rows, across) = self.whole, self._crops(cut.size)
        lines, columns = rows * h, across * w
        height, width = cut.size
        top = left = 0
        broad = self.image_size[1] * h / (self.image_size[0] * w)  # width of a patch over its height, in pixels
        # Rounded to seven places, as in transformers' `unpad_image`: counts must agree where the ratio is nearly exact.
        if width / height > columns / lines * broad:
            top = (lines - int(round(height * (columns / width) * broad, 7))) // 2
        else:
            left = (columns - int(round(width * (lines / height) / broad, 7))) // 2
        lines, columns = lines - 2 * top, columns - 2 * left
        return (top, left), *self._bounded(lines, columns)

    def _bounded(self, lines: int, columns: int) -> tuple[int, int]:
        """Scale a grid of crops down to the tokens of `max_crops`."""
        assert self.whole is not None, "joined on a grid"
        if self.config.max_crops:
            ratio = math.sqrt(lines * columns / (self.config.max_crops * math.prod(self.whole)))
            if ratio > 1.1:  # the released threshold: small excesses are not worth resampling
                return max(1, int(lines // ratio)), max(1, int(columns // ratio))
        return lines, columns


def _any_of(shown: Tensor, groups: Tensor, k: int) -> Tensor:
    """Mask of merged tokens that show the picture, (tiles, K): those with a patch that does, and those without patches.

    Args:
        shown: (tiles, N0) of patches.
        groups: (tiles, N0) token that each patch was merged into, -1 for a dropped one.
        k: tokens of a tile.
    """
    into = groups % (k + 1)  # -1 becomes column k, which is cut off below
    seen, all_of = (
        torch.zeros(len(groups), k + 1, device=groups.device).scatter_add(1, into, part)[:, :k]
        for part in (shown.float(), torch.ones_like(shown, dtype=torch.float))
    )
    return (seen > 0) | (all_of == 0)


def best_pinpoint(size: tuple[int, int], pinpoints: Sequence[Sequence[int]]) -> tuple[int, int]:
    """Return the resolution with the most pixels of an image of `size`; of equal ones, that with the least padding."""
    height, width = size

    def merit(pinpoint: Sequence[int]) -> tuple[int, int]:
        # Pixels shown, bounded by those that the image has: enlarging it shows no more.
        scale = min(pinpoint[1] / width, pinpoint[0] / height)
        shown = min(int(width * scale) * int(height * scale), width * height)
        return shown, shown - pinpoint[0] * pinpoint[1]

    best = max(pinpoints, key=merit)
    return best[0], best[1]
