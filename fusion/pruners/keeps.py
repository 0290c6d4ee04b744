"""Shared by pruners that keep a counted number of image tokens as they are, and drop the others."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from zoo.fusion.pruners.topk import count_kept
from zoo.fusion.pruners.unrounded import unrounded
from zoo.registry import Cut, ImageFeatures, Pruner, unknown

BUDGETS = ("row", "image")


def check_budget(budget: str) -> None:
    """Refuse a budget that does not exist."""
    if budget not in BUDGETS:
        raise unknown("budget", budget, BUDGETS)


class KeepsSome(Pruner, nn.Module):
    """Keeps `config.num_keep` tokens of each row, or the share `config.keep_ratio` where that is 0, in grid order.

    With `config.budget` image they are those of all rows of an image, crops or frames: rows are then ragged. A pruner
    implements `choose`. Where all are kept, the image is returned as it is, and nothing is destroyed.
    """

    destroys: frozenset[str] = frozenset({"grid"})

    def __init__(self, config: Any, num_tokens: int | None) -> None:
        super().__init__()
        self.config = config
        whole = getattr(config, "budget", "row") == "image" and bool(config.num_keep or config.keep_ratio < 1)
        self.ragged = self.per_image = whole
        if num_tokens is not None and not whole and self.num_tokens(num_tokens) == num_tokens:
            self.destroys = frozenset()

    def num_tokens(self, n: int) -> int:
        """Count the tokens kept of `n`; where the budget is that of an image, the most that one row keeps."""
        if self.per_image:
            return min(n, self.config.num_keep or n)
        return min(n, self.config.num_keep) or count_kept(n, self.config.keep_ratio)

    def tokens_of_image(self, n: int, cut: Cut) -> int:
        """Count the tokens that all rows of an image keep, of `n` each: exactly."""
        if not self.per_image:
            return cut.rows * self.num_tokens(n)
        return min(cut.rows * n, self.config.num_keep) or count_kept(cut.rows * n, self.config.keep_ratio)

    def forward(self, image: ImageFeatures) -> ImageFeatures:
        """Keep num_tokens(N) of the tokens (M, N, D) of each row; the grid is dropped, unless all are kept.

        Raises:
            ZooError: the image lacks what tokens are chosen by.
        """
        with unrounded(image.tokens):
            return self._kept(image)

    def _kept(self, image: ImageFeatures) -> ImageFeatures:
        rows, n = image.tokens.shape[:2]
        k = self.num_tokens(n)
        if self.per_image:
            chosen = self.choose_of_image(image, self.tokens_of_image(n, Cut(rows)))
            order = torch.stack([_and_others(some, n)[:k] for some in chosen])  # (R, K)
            counts = torch.tensor([len(some) for some in chosen], device=order.device)
            left = image.take_best(order)
            assert left.rank is not None, "set by take_best"
            return left.stay(left.rank < counts.unsqueeze(1))
        return image if k == n else image.take_best(self.choose(image, k))  # (M, K, D)

    def choose_of_image(self, image: ImageFeatures, total: int) -> Sequence[Tensor]:
        """Choose `total` tokens of all rows of an image: of each row indices (k,), those to be given up last first.

        Here all rows get as many, and the first ones one more where that does not divide.
        """
        rows = len(image.tokens)
        counts = [total // rows + (row < total % rows) for row in range(rows)]
        chosen: list[Tensor] = []
        for first, last in ((0, total % rows), (total % rows, rows)):
            if first < last and (k := counts[first]) < image.tokens.shape[1]:
                some = image.picked(slice(first, last))
                chosen += self.choose(some, k) if k else torch.empty(last - first, 0, dtype=torch.long)
            else:
                chosen += torch.arange(image.tokens.shape[1]).expand(last - first, -1)
        return [some.to(image.tokens.device) for some in chosen]

    @abstractmethod
    def choose(self, image: ImageFeatures, k: int) -> Tensor:
        """Choose `k` < N tokens of each row: their indices (M, K), those to be given up last first."""


def _and_others(chosen: Tensor, n: int) -> Tensor:
    """Append to indices (k,) those of the other tokens of `n`: (n,)."""
    rest = torch.ones(n, dtype=torch.bool, device=chosen.device).index_fill(0, chosen, False)
    return torch.cat([chosen, rest.nonzero()[:, 0]])
