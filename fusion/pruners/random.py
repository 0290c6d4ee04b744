"""Keep a random subset of the image tokens: the baseline for pruners that choose.

The subset follows from the seed and the number of tokens alone, so it is the same for every image, every batch and
every run, and smaller ratios keep a subset of what larger ones keep. To learn how random pruning does on average, run
several seeds. With `resample` each image in training draws anew from torch's generator, as a regulariser.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from zoo.fusion.pruners.topk import check_ratio, count_kept
from zoo.registry import ImageFeatures, Pruner, register, require_at_least


@dataclass
class RandomPrunerConfig:
    keep_ratio: float = 0.25  # share of image tokens kept, in (0, 1]
    seed: int = 0  # of the choice
    resample: bool = False  # while training, draw anew for each image

    def __post_init__(self) -> None:
        check_ratio(self.keep_ratio)
        require_at_least(0, seed=self.seed)


@register("pruner", "random")
class RandomPruner(Pruner, nn.Module):
    """Training-free; kept tokens stay in grid order."""

    destroys: frozenset[str] = frozenset({"grid"})

    def __init__(self, config: RandomPrunerConfig) -> None:
        super().__init__()
        self.config = config
        if config.keep_ratio == 1:
            self.destroys = frozenset()

    def num_tokens(self, n: int) -> int:
        """Count the tokens kept of `n`."""
        return count_kept(n, self.config.keep_ratio)

    def forward(self, image: ImageFeatures) -> ImageFeatures:
        """Keep num_tokens(N) of the tokens (M, N, D); the grid is dropped, unless all are kept."""
        if self.config.keep_ratio == 1:
            return image
        m, n = image.tokens.shape[:2]
        return image.take_best(self._choose(m, n).to(image.tokens.device))  # (M, K, D)

    def _choose(self, m: int, n: int) -> Tensor:
        k = self.num_tokens(n)
        if self.config.resample and self.training:
            return torch.rand(m, n, device="cpu").topk(k, dim=1).indices  # (M, K)
        generator = torch.Generator("cpu").manual_seed(self.config.seed)
        return torch.randperm(n, generator=generator, device="cpu")[:k].expand(m, k)
