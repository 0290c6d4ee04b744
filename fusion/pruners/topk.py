"""What pruners that rank image tokens share: how many are kept, and which, when scores are equal too."""

import math

from torch import Tensor

from zoo.registry import ZooError


def check_ratio(keep_ratio: float) -> None:
    if not 0 < keep_ratio <= 1:
        raise ZooError(f"keep_ratio must be in (0, 1], got {keep_ratio}.")


def count_kept(n: int, keep_ratio: float) -> int:
    """Round the share of `n` to the nearest count, halves up, and to at least one: 10 % of 576 is 58."""
    return min(n, max(1, math.floor(n * keep_ratio + 0.5)))


def best(scores: Tensor, k: int) -> Tensor:
    """Indices (M, K) of the largest of `scores` (M, N), the largest first; of equal scores the first ones."""
    return scores.argsort(dim=1, descending=True, stable=True)[:, :k]


def top(scores: Tensor, k: int) -> Tensor:
    """The same, ascending."""
    return best(scores, k).sort(dim=1).values  # (M, K)
