"""Features of images that keep their shapes: rows of unlike grids, each grid by itself. Nothing here imports torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from zoo.registry.values import Cut, ImageFeatures

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class UnlikeRows:
    """Features of rows whose grids differ: a rectangular `ImageFeatures` for each distinct grid of a batch."""

    groups: tuple[ImageFeatures, ...]  # each of the rows of one grid, in the order of the batch
    members: tuple[tuple[int, ...], ...]  # of each group, which rows of the batch it holds; ascending
    cuts: tuple[Cut, ...] = ()  # of each image of the batch

    @property
    def num_rows(self) -> int:
        """Rows of the batch."""
        return sum(len(some) for some in self.members)

    def mapped(self, change: Callable[[ImageFeatures], ImageFeatures]) -> UnlikeRows:
        """Change each group by itself."""
        return replace(self, groups=tuple(change(group) for group in self.groups))

    def in_order(self, of: Callable[[ImageFeatures], Tensor]) -> list[Tensor]:
        """Return what a function makes of the rows of each group, (M, ...) -> (M, ...), row by row of the batch."""
        found: dict[int, Tensor] = {}
        for group, rows in zip(self.groups, self.members, strict=True):
            found |= dict(zip(rows, of(group), strict=True))
        return [found[row] for row in range(len(found))]


def groups_of(grids: Sequence[tuple[int, int]]) -> dict[tuple[int, int], list[int]]:
    """Group rows by their grid, in the order in which grids first appear."""
    found: dict[tuple[int, int], list[int]] = {}
    for row, grid in enumerate(grids):
        found.setdefault((int(grid[0]), int(grid[1])), []).append(row)
    return found
