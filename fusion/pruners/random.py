"""Keep a random subset of the image tokens: the baseline for pruners that choose.

Each image draws its own subset, by the seed and a checksum of its pixels: the same image keeps the same tokens in every
batch, run and process. Crops and frames draw by their number too, so that frames that show the same do not agree.
Smaller ratios keep a subset of what larger ones keep. `draw=fixed` is one subset for all images, by the seed alone, and
so are features that come without pixels; scores with one pattern differ by many points from pattern to pattern. With
`resample` each image in training draws anew from torch's generator, as a regulariser.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from zoo.fusion.pruners.topk import check_ratio, count_kept
from zoo.registry import ImageFeatures, Pruner, register, require_at_least, unknown

DRAWS = ("image", "fixed")


@dataclass
class RandomPrunerConfig:
    keep_ratio: float = 0.25  # share of image tokens kept, in (0, 1]
    seed: int = 0  # of the choice
    draw: str = "image"  # image: each image by its pixels | fixed: one subset for all images
    resample: bool = False  # while training, draw anew for each image

    def __post_init__(self) -> None:
        check_ratio(self.keep_ratio)
        require_at_least(0, seed=self.seed)
        if self.draw not in DRAWS:
            raise unknown("draw", self.draw, DRAWS)


@register("pruner", "random")
class RandomPruner(Pruner, nn.Module):
    """Training-free; kept tokens stay in grid order."""

    destroys: frozenset[str] = frozenset({"grid"})

    def __init__(self, config: RandomPrunerConfig) -> None:
        super().__init__()
        self.config = config
        self.draws = config.draw == "image"
        if config.keep_ratio == 1:
            self.destroys = frozenset()

    def num_tokens(self, n: int) -> int:
        """Count the tokens kept of `n`."""
        return count_kept(n, self.config.keep_ratio)

    def forward(self, image: ImageFeatures) -> ImageFeatures:
        """Keep num_tokens(N) of the tokens (M, N, D); the grid is dropped, unless all are kept."""
        if self.config.keep_ratio == 1:
            return image
        return image.take_best(self._choose(image).to(image.tokens.device))  # (M, K, D)

    def _choose(self, image: ImageFeatures) -> Tensor:
        m, n = image.tokens.shape[:2]
        k = self.num_tokens(n)
        if self.config.resample and self.training:
            return torch.rand(m, n, device="cpu").topk(k, dim=1).indices  # (M, K)
        if self.draws and image.checksum is not None:
            row = [i for count in image.rows or [1] * m for i in range(count)]  # of its image
            start = mixed(image.checksum + self.config.seed) + torch.tensor(row, device=image.checksum.device)
            token = torch.arange(n, device=start.device)
            return mixed(mixed(start).unsqueeze(1) + token).argsort(dim=1, stable=True)[:, :k]  # (M, K)
        generator = torch.Generator("cpu").manual_seed(self.config.seed)
        return torch.randperm(n, generator=generator, device="cpu")[:k].expand(m, k)


def mixed(x: Tensor) -> Tensor:
    """Scramble whole numbers, int64: neighbours become unlike in every bit. Steele et al. 2014 (SplitMix64)."""
    x = x + _signed(0x9E3779B97F4A7C15)
    x = (x ^ _shifted(x, 30)) * _signed(0xBF58476D1CE4E5B9)  # int64 wraps around
    x = (x ^ _shifted(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shifted(x, 31)


def _signed(word: int) -> int:
    return word - (1 << 64)  # all three have the highest bit set


def _shifted(x: Tensor, bits: int) -> Tensor:
    """Shift right, zeros from the left; torch's own shift repeats the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
