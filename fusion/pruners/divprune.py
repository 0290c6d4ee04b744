"""DivPrune: keep the most diverse image tokens, whatever the question.

Paper: Alvar et al., arXiv:2503.02175. The subset with the largest smallest cosine distance, found greedily: first the
token whose nearest other token is farthest, then again and again the token that is farthest from all chosen ones.

Departures. The authors compare tokens behind the projector, we those in front of it, where fewer of them are projected.
We round halves up, where their count is Python's `round`. They keep all N x N distances; here each choice costs one
product with the token just chosen.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from zoo.fusion.pruners.keeps import KeepsSome
from zoo.fusion.pruners.topk import check_ratio, count_kept
from zoo.registry import ImageFeatures, Preset, register

BLOCK = 256  # tokens that are compared with all others at once, to find the first


@dataclass
class DivPruneConfig:
    keep_ratio: float = 0.25  # share of image tokens kept, in (0, 1]

    def __post_init__(self) -> None:
        check_ratio(self.keep_ratio)


@register("pruner", "divprune")
class DivPrune(KeepsSome):
    """Training-free, for any encoder; kept tokens stay in grid order."""

    presets = {"llava15_56": Preset({"keep_ratio": 0.098}, "the release's default: 15 % of LLaVA-1.5's FLOPs")}

    def __init__(self, config: DivPruneConfig, *, num_tokens: int | None = None) -> None:
        super().__init__(config, num_tokens)

    def num_tokens(self, n: int) -> int:
        """Count the tokens kept of `n`."""
        return count_kept(n, self.config.keep_ratio)

    def choose(self, image: ImageFeatures, k: int) -> Tensor:
        """Choose tokens that are far from each other, in the order of choice: (M, K)."""
        return farthest(image.tokens, k)


@torch.no_grad()
def farthest(tokens: Tensor, k: int) -> Tensor:
    """Choose greedily (M, K) indices of tokens (M, N, D), in the order of choice; equal distances: the first token."""
    x = F.normalize(tokens.float(), dim=-1)
    chosen = [_loneliest(x)]  # each (M,)
    nearest = torch.full(x.shape[:2], -2.0, device=x.device)  # similarity to the nearest chosen token
    for _ in range(k - 1):
        last = chosen[-1].unsqueeze(1)  # (M, 1)
        pick = x.gather(1, last.unsqueeze(-1).expand(-1, -1, x.shape[-1]))  # (M, 1, D)
        nearest = nearest.maximum((x @ pick.transpose(1, 2)).squeeze(-1)).scatter(1, last, torch.inf)
        chosen.append(nearest.argmin(dim=1))
    return torch.stack(chosen, dim=1)


def _loneliest(x: Tensor) -> Tensor:
    """Index (M,) of the token whose most similar other token is least similar."""
    nearest = []
    for at in range(0, x.shape[1], BLOCK):
        some = x[:, at : at + BLOCK]
        alike = some @ x.transpose(1, 2)  # (M, block, N)
        alike.diagonal(offset=at, dim1=1, dim2=2).fill_(-2.0)
        nearest.append(alike.amax(-1))
    return torch.cat(nearest, dim=1).argmin(dim=1)
