"""Even: keep image tokens at equal distances, row by row; a baseline that looks at nothing."""

from dataclasses import dataclass

import torch
from torch import nn

from zoo.registry import ImageFeatures, Preset, Pruner, ZooError, register


@dataclass
class EvenConfig:
    keep_ratio: float = 0.5  # share of image tokens kept, in (0, 1]

    def __post_init__(self) -> None:
        if not 0 < self.keep_ratio <= 1:
            raise ZooError(f"keep_ratio must be in (0, 1], got {self.keep_ratio}.")


@register("pruner", "even")
class Even(Pruner, nn.Module):
    """Training-free: adds no parameters and needs nothing of the encoder."""

    destroys = frozenset({"grid"})
    presets = {"quarter": Preset({"keep_ratio": 0.25}, "this example")}

    def __init__(self, config: EvenConfig) -> None:
        super().__init__()
        self.keep_ratio = config.keep_ratio
        if self.keep_ratio == 1:
            self.destroys = frozenset()  # all tokens are kept, and their grid

    def num_tokens(self, n: int) -> int:
        return max(1, round(n * self.keep_ratio))

    def forward(self, image: ImageFeatures) -> ImageFeatures:
        m, n = image.tokens.shape[:2]
        k = self.num_tokens(n)
        if k == n:
            return image
        keep = torch.arange(k, device=image.tokens.device) * n // k  # (K,) ascending
        return image.take(keep.expand(m, -1))  # (M, K, D)
