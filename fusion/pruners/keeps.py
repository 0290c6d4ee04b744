"""Shared by pruners that keep a counted number of image tokens as they are, and drop the others."""

from abc import abstractmethod
from typing import Any

from torch import Tensor, nn

from zoo.fusion.pruners.topk import count_kept
from zoo.registry import ImageFeatures, Pruner


class KeepsSome(Pruner, nn.Module):
    """Keeps `config.num_keep` tokens of each row, or the share `config.keep_ratio` where that is 0, in grid order.

    A pruner implements `choose`. Where all are kept, the image is returned as it is, and nothing is destroyed.
    """

    destroys: frozenset[str] = frozenset({"grid"})

    def __init__(self, config: Any, num_tokens: int | None) -> None:
        super().__init__()
        self.config = config
        if num_tokens is not None and self.num_tokens(num_tokens) == num_tokens:
            self.destroys = frozenset()

    def num_tokens(self, n: int) -> int:
        """Count the tokens kept of `n`."""
        return min(n, self.config.num_keep) or count_kept(n, self.config.keep_ratio)

    def forward(self, image: ImageFeatures) -> ImageFeatures:
        """Keep num_tokens(N) of the tokens (M, N, D) of each row; the grid is dropped, unless all are kept.

        Raises:
            ZooError: the image lacks what tokens are chosen by.
        """
        n = image.tokens.shape[1]
        k = self.num_tokens(n)
        return image if k == n else image.take_best(self.choose(image, k))  # (M, K, D)

    @abstractmethod
    def choose(self, image: ImageFeatures, k: int) -> Tensor:
        """Choose `k` < N tokens of each row: their indices (M, K), those to be given up last first."""
