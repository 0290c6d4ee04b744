"""Average neighbouring image tokens on the grid: the baseline for pruners that merge.

By a stride (2: a quarter of the tokens), or to a grid of given size. Windows are those of adaptive average pooling, so
a grid that the stride does not divide gets windows of unlike size and no padding.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.registry import ImageFeatures, Pruner, ZooError, register, require_at_least


@dataclass
class PoolPrunerConfig:
    stride: int = 2  # side of a window, in patches; 1: keep all
    target: list[int] = field(default_factory=list)  # rows and columns of the grid to pool to; empty: by the stride

    def __post_init__(self) -> None:
        require_at_least(1, stride=self.stride)
        if self.target and (len(self.target) != 2 or min(self.target) < 1):
            raise ZooError(f"target must be two positive numbers, rows and columns, got {self.target}.")


@register("pruner", "pool")
class PoolPruner(Pruner, nn.Module):
    """Training-free; the result is a smaller grid, so parts that need a grid may follow."""

    needs: frozenset[str] = frozenset({"grid"})
    provides: frozenset[str] = frozenset({"grid"})

    def __init__(self, config: PoolPrunerConfig, *, grid: tuple[int, int] | None) -> None:
        super().__init__()
        self.config = config
        self.grid_in = grid
        self.grid = None if grid is None else self.grid_of(grid)  # of the output
        if grid and any(a > b for a, b in zip(config.target, grid, strict=False)):
            raise ZooError(f"target {list(config.target)} is larger than the grid {list(grid)}.")

    def grid_of(self, grid: tuple[int, int]) -> tuple[int, int]:
        """Return the (h, w) that a grid is pooled to; a side that is shorter than that of `target` stays."""
        if self.config.target:
            return min(self.config.target[0], grid[0]), min(self.config.target[1], grid[1])
        return -(-grid[0] // self.config.stride), -(-grid[1] // self.config.stride)

    def num_tokens(self, n: int) -> int:
        """Count the tokens left of a grid with `n`."""
        if self.grid_in is None or self.grid is None:
            return n  # no grid, which the check refuses, or that of each row: `grid_of`
        if n != self.grid_in[0] * self.grid_in[1]:
            raise ZooError(f"pruner 'pool' was made for a grid {list(self.grid_in)}, which does not hold {n} tokens.")
        return self.grid[0] * self.grid[1]

    def forward(self, image: ImageFeatures) -> ImageFeatures:
        """Average tokens (M, h * w, D) to (M, K, D) on the pooled grid, scores and keys likewise."""
        if image.grid is None:
            raise ZooError("pruner 'pool' needs a grid, and the image tokens have none.")
        grid = self.grid_of(image.grid)
        if grid == tuple(image.grid):
            return image

        def pool(x: Tensor) -> Tensor:  # (M, N, D)
            x = x.transpose(1, 2).unflatten(2, image.grid)  # (M, D, h, w)
            return F.adaptive_avg_pool2d(x, grid).flatten(2).transpose(1, 2)  # (M, K, D)

        def pool_scores(x: Tensor | None) -> Tensor | None:  # (M, N)
            return None if x is None else pool(x.unsqueeze(-1)).squeeze(-1)  # (M, K)

        def pool_keys(x: Tensor | None) -> Tensor | None:  # (M, N, H, d)
            return None if x is None else pool(x.flatten(2)).unflatten(2, x.shape[2:])

        return image.made(
            pool,
            grid=grid,
            keep=None,  # means have no index in the old grid
            num_patches=image.num_patches or image.tokens.shape[1],
            patch_grid=image.patch_grid or image.grid,
            groups=self._windows(image, grid),
            cls_attention=pool_scores(image.cls_attention),
            key_attention=pool_scores(image.key_attention),
            pooling_attention=pool_scores(image.pooling_attention),
            next_attention=pool_scores(image.next_attention),
            keys=pool_keys(image.keys),
            next_keys=None if image.next_keys is None else pool(image.next_keys),
            patch_embeds=None if image.patch_embeds is None else pool(image.patch_embeds),
            block_attention={word: pool(s.unsqueeze(-1)).squeeze(-1) for word, s in image.block_attention.items()},
        )

    def _windows(self, image: ImageFeatures, grid: tuple[int, int]) -> Tensor:
        """Map each token to the window that averages it (M, N0); overlapping windows: to one of them."""
        assert image.grid is not None, "asked above"
        rows, columns = (
            torch.arange(n, device=image.tokens.device) * k // n for n, k in zip(image.grid, grid, strict=True)
        )
        window = (rows.unsqueeze(1) * grid[1] + columns).flatten().expand(image.tokens.shape[0], -1)  # (M, N)
        return image.regrouped(window)  # (M, N0)
