"""Shared by pruners that rank image tokens: rounding of the kept count, and top-k with a fixed order of ties."""

import math

from torch import Tensor

from zoo.registry import ZooError


def check_ratio(keep_ratio: float) -> None:
    """Refuse a ratio outside of (0, 1]."""
    if not 0 < keep_ratio <= 1:
        raise ZooError(f"keep_ratio must be in (0, 1], got {keep_ratio}.")


def count_kept(n: int, keep_ratio: float) -> int:
    """Round the share of `n` to the nearest count, halves up, and to at least one: 10 % of 576 is 58."""
    return min(n, max(1, math.floor(n * keep_ratio + 0.5)))


def best(scores: Tensor, k: int) -> Tensor:
    """Indices (M, K) of the largest of `scores` (M, N), the largest first; of equal scores the first ones.

    A stable sort, since `topk` leaves the order of ties open and CUDA and CPU differ in it.
    """
    return scores.argsort(dim=1, descending=True, stable=True)[:, :k]


def top(scores: Tensor, k: int) -> Tensor:
    """Indices of `best` in ascending order."""
    return best(scores, k).sort(dim=1).values  # (M, K)
