"""The order of image tokens where an image is an overview and a grid of tiles, pruned or whole.

LLaVA-NeXT reads the overview row by row, then the tiles as the one large image that they are cut from: row y of the
left tile, row y of the right tile, row y + 1 of the left tile. Each row of the large image may end in a learned newline
token. Pruned tokens keep that order: dropping some of them moves none of the others.

The count of `stitched_order` is known beforehand: crops x kept, and a newline for each row. FasterVLM's code
(arXiv:2412.01818) has a branch for `spatial_unpad`, which its scripts never run: it leaves out kept tokens on padding,
so that counts depend on scores. `fewer` has both: a count that is fixed beforehand, and tokens that show the picture
ahead of those that fall on padding.
"""

import torch
from torch import Tensor

NEWLINE = -1  # in an order: a newline token
DROPPED = -2  # in a grid of indices: a token that was not kept


def stitched_order(
    keep: Tensor,
    grid: tuple[int, int],
    tiles: tuple[int, int],
    *,
    newline: bool = False,
) -> Tensor:
    """Order the kept tokens of one image: overview first, then the tiles in raster order of the stitched image.

    Args:
        keep: (1 + rows * columns, K) kept positions in each crop's grid, ascending; the overview is the first crop,
            tiles follow row by row.
        grid: rows and columns of patches of a crop.
        tiles: rows and columns of tiles.
        newline: end each row of the stitched image with a newline, also where none of its tokens is left.

    Returns:
        (L,) indices into the kept tokens of all crops, one after the other, and NEWLINE.
    """
    (h, w), (rows, columns) = grid, tiles
    flat = torch.arange(keep.numel(), device=keep.device).view_as(keep)  # (crops, K)
    index = keep.new_full((keep.shape[0], h * w), DROPPED).scatter_(1, keep, flat)  # (crops, h * w)
    large = index[1:].view(rows, columns, h, w).transpose(1, 2).reshape(rows * h, columns * w)
    if newline:
        large = torch.cat([large, large.new_full((large.shape[0], 1), NEWLINE)], dim=1)
    return torch.cat([flat[0], large[large != DROPPED]])  # (L,)


def shows(tiles: tuple[int, int], grid: tuple[int, int], window: tuple[int, int], device: torch.device) -> Tensor:
    """Mask of the patches of each tile that show the picture, not padding: (rows * columns, h * w) bool.

    Args:
        tiles: rows and columns of tiles.
        grid: rows and columns of patches of a tile.
        window: lines above and below, and columns left and right, of the stitched grid that are padding.
    """
    (rows, columns), (h, w), (top, left) = tiles, grid, window
    line = torch.arange(rows * h, device=device).view(rows, 1, h, 1)
    column = torch.arange(columns * w, device=device).view(1, columns, 1, w)
    inside = (line >= top) & (line < rows * h - top) & (column >= left) & (column < columns * w - left)
    return inside.flatten(2).flatten(0, 1)


def fewer(shown: Tensor, rank: Tensor | None, count: int) -> Tensor:
    """Choose `count` of the tokens that a pruner kept of tiles, those that show the picture first.

    Tiles contribute evenly: every tile's second best token comes before any tile's third best. Without ranks, the
    chosen tokens are spread evenly over each tile.

    Args:
        shown: (tiles, K) bool.
        rank: (tiles, K), 0 for the best token of a tile; None: unknown.
        count: at most tiles * K.

    Returns:
        (tiles, K) bool.
    """
    tiles, kept = shown.shape
    rank = spread(kept, shown.device).expand(tiles, -1) if rank is None else rank
    turn = rank * tiles + torch.arange(tiles, device=shown.device).unsqueeze(1)  # (tiles, K), all different
    order = (turn + (~shown).long() * kept * tiles).flatten().argsort()
    return torch.zeros_like(shown.flatten()).index_fill(0, order[:count], True).view_as(shown)


def spread(n: int, device: torch.device) -> Tensor:
    """Rank `n` places so that the first k are spread evenly for every k: (n,).

    Multiples of the golden ratio modulo 1, the low-discrepancy sequence.
    """
    golden = torch.arange(1, n + 1, device=device, dtype=torch.float64) * (5**0.5 - 1) / 2
    return (golden % 1).argsort().argsort()
