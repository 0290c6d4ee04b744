"""Bipartite merging of image tokens: the most similar pairs are replaced by their mean, round by round.

Paper: Bolya et al., arXiv:2210.09461 (ToMe), as AIM's public code uses it (Zhong et al., arXiv:2412.03248).
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from zoo.fusion.pruners.unrounded import unrounded


def removals(n: int, ratio: float) -> list[int]:
    """Return how many tokens each round removes until a share `ratio` of `n` is left.

    Rounds halve the count while the ratio allows (196: 98, then 49); a last round removes the rest.
    """
    rounds: list[int] = []
    left, share = n, 1.0
    while share / 2 >= ratio and left > 1:
        share /= 2
        rounds.append(min(int(n * share), left // 2))
        left -= rounds[-1]
    if share > ratio and (rest := min(left - max(1, int(n * ratio + 0.5)), left // 2)) > 0:
        rounds.append(rest)
    return [r for r in rounds if r]


def merge(
    tokens: Tensor,
    rounds: Sequence[int],
    *,
    metric: Tensor | None = None,
    order: str = "released",
    weigh_sizes: bool = False,
) -> tuple[Tensor, Tensor]:
    """Merge tokens within each row of the batch, never across.

    In a round, tokens at even places are sources and those at odd places destinations. Each source is matched to the
    destination with the largest cosine similarity; the `r` best matched sources are merged into theirs by a mean.

    Args:
        tokens: (M, N, D).
        rounds: number of tokens that each round removes, at most half of the tokens left.
        metric: (M, N, E) features for the similarity, merged alongside; None: the tokens themselves.
        order: `released`: unmerged sources, best matched first, then destinations; `raster`: in the order of the input.
        weigh_sizes: weigh tokens in a mean by how many source tokens they contain; else equally in each round.

    Returns:
        Tokens (M, K, D), and for each of the N tokens the index of the token that contains it (M, N).
    """
    m, n, _ = tokens.shape
    group = torch.arange(n, device=tokens.device).expand(m, n)
    x, like = tokens.float(), None if metric is None else metric.float()
    size = x.new_ones(m, n, 1)
    for r in rounds:
        count = x.shape[1]
        r = min(r, count // 2)
        if r <= 0:
            continue
        unit = F.normalize(x if like is None else like, dim=-1)
        with unrounded(x):
            best, nearest = (unit[:, ::2] @ unit[:, 1::2].transpose(1, 2)).max(-1)  # (M, ceil(count / 2))
        rank = best.argsort(dim=1, descending=True, stable=True)
        gone, left = rank[:, :r], rank[:, r:]
        into = nearest.gather(1, gone)  # (M, r)
        stay = left.shape[1]
        # New index of each token: unmerged sources come first, destinations after them, merged sources to their
        # destination.
        goes = group.new_empty(m, count)
        goes[:, 1::2] = torch.arange(stay, count - r, device=x.device)
        goes[:, ::2] = (
            goes.new_empty(m, rank.shape[1])
            .scatter(1, gone, into + stay)
            .scatter(1, left, torch.arange(stay, device=x.device).expand(m, -1))
        )
        if order == "raster":
            # Old places of the tokens in released order; the rank of a place is the index in raster order.
            place = torch.cat([2 * left, 2 * torch.arange(count // 2, device=x.device).expand(m, -1) + 1], 1)
            goes = place.argsort(dim=1).argsort(dim=1).gather(1, goes)
        weight = size if weigh_sizes else torch.ones_like(size)
        x = _summed(x * weight, goes, count - r) / _summed(weight, goes, count - r)
        like = None if like is None else _summed(like * weight, goes, count - r) / _summed(weight, goes, count - r)
        size = _summed(size, goes, count - r)
        group = goes.gather(1, group)
    return x.to(tokens.dtype), group


def _summed(x: Tensor, goes: Tensor, count: int) -> Tensor:
    """Sum the rows of (M, N, D) by their new index: (M, count, D)."""
    return x.new_zeros(len(x), count, x.shape[2]).scatter_add(1, goes.unsqueeze(-1).expand_as(x), x)
