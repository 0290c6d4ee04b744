"""Where the tokens of crops and frames would be without a pruner: for `anyres`, when positions are kept.

In an unpruned run the overview's patches come first, then the lines of the stitched grid, each with its newline. A kept
patch has its own line and column there; where the grid is scaled down, those that its line and column are scaled to,
and on padding the nearest. Where a pruner left a smaller grid, a token has the place of the corner of its window.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from zoo.registry import Cut, ImageFeatures


def crop_places(layout: Any, rows: Tensor, image: ImageFeatures, cuts: Sequence[Cut], whole: Any) -> Tensor:
    """Place the tokens that `layout` makes of rows of crops and frames: (S,), each in the run of its image.

    Args:
        layout: an `AnyRes` behind a pruner.
        rows: (M, K) the place of each token in its row.
        image: what the pruner left.
        cuts: of each image.
        whole: the same layout without a pruner.
    """
    of_rows = [c.rows for c in cuts]
    names = ("keep", "groups", "rank", "places")
    known = {n: None if (x := getattr(image, n)) is None else x.split(of_rows) for n in names}
    newline, found = layout.config.newline, []
    for i, (cut, some) in enumerate(zip(cuts, rows.split(of_rows), strict=True)):
        about = {n: None if x is None else x[i] for n, x in known.items()}
        if cut.kind == "frame":
            places, ended = _of_frames(layout, some, about["rank"], whole), layout.config.frames == "bilinear"
        elif cut.rows == 1:
            places, ended = some[0], True
        elif layout.pruned:
            places, ended = _of_chosen(layout, cut, some, about), not layout.config.kept_lines
        else:
            places, ended = _of_grid(layout, cut, some, whole), False
        found += [places, *([places.new_tensor([whole.count(cut) - 1])] if newline and ended else [])]
    return torch.cat(found)


def _of_frames(layout: Any, rows: Tensor, rank: Tensor | None, whole: Any) -> Tensor:
    """Of frames, by the places (F, K) of what was kept of each: (F * k,)."""
    grid = whole._frame_grid()
    if layout.pruned:
        rows = scaled(layout._fewer_of_frames(rows.unsqueeze(-1), rank).squeeze(-1), whole.whole, grid)  # (F, k)
    else:
        small = torch.arange(layout._per_frame(), device=rows.device)
        rows = scaled(small, layout._frame_grid(), grid).expand(len(rows), -1)
    first = whole._per_frame() * torch.arange(len(rows), device=rows.device)
    return (first.unsqueeze(1) + rows).flatten()


def _of_chosen(layout: Any, cut: Cut, rows: Tensor, about: dict[str, Any]) -> Tensor:
    """Of an overview and tiles, by the places (R, K) of what was kept of each: (L,)."""
    order = layout._order(cut, rows, **about)  # -1 a newline
    _, lines, columns = layout._shape(cut)
    count = max(1, lines)  # of a picture thinner than a patch no line may be left
    ends = math.prod(layout.whole) + torch.arange(1, count + 1, device=rows.device) * (columns + 1) - 1  # of lines
    numbers = (order < 0).cumsum(0) - 1
    return torch.where(order < 0, ends[numbers], stitched_places(layout, cut, rows)[order])


def stitched_places(layout: Any, cut: Cut, rows: Tensor) -> Tensor:
    """Where patches of an overview and of tiles (R, K) are in an unpruned run: (R * K,)."""
    (top, left), lines, columns = layout._shape(cut)
    (down, across), (h, w) = layout._tiles(cut, len(rows) - 1), layout.whole
    high, wide = max(1, down * h - 2 * top), max(1, across * w - 2 * left)
    tile = torch.arange(len(rows) - 1, device=rows.device).unsqueeze(1)
    line = (tile // across * h + rows[1:] // w - top).clamp(0, high - 1)  # (tiles, K)
    column = (tile % across * w + rows[1:] % w - left).clamp(0, wide - 1)
    long = columns + int(layout.config.newline)
    return torch.cat([rows[0], (h * w + line * lines // high * long + column * columns // wide).flatten()])


def _of_grid(layout: Any, cut: Cut, rows: Tensor, whole: Any) -> Tensor:
    """Of an overview and a stitched grid that is smaller than without a pruner: (L,)."""
    (_, lines, columns), (_, lines_0, columns_0) = layout._shape(cut), whole._shape(cut)
    line = torch.arange(lines, device=rows.device).unsqueeze(1)
    column = torch.arange(columns, device=rows.device)
    long = columns_0 + int(whole.config.newline)
    places = line * lines_0 // lines * long + column * columns_0 // columns  # (lines, columns)
    if whole.config.newline:  # behind the last line that this one is made of
        places = torch.cat([places, ((line + 1) * lines_0 // lines - 1) * long + columns_0], 1)
    return torch.cat([rows[0], whole.tokens + places.flatten()])


def scaled(places: Tensor, grid: tuple[int, int], other: tuple[int, int]) -> Tensor:
    """Where places of a grid lie in another one: at the first that each covers."""
    return places // grid[1] * other[0] // grid[0] * other[1] + places % grid[1] * other[1] // grid[1]
