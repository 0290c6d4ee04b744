"""Density peaks clustering with k nearest neighbours (DPC-KNN): centres are dense, and far from what is denser.

Papers: Rodriguez and Laio, Science 344 (2014); Du et al., Knowledge-Based Systems 99 (2016).
"""

import torch
from torch import Tensor


@torch.no_grad()
def density_peaks(x: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Cluster the rows of `x` (n, C), in float32; ties go to the first, and nothing is random.

    A row's density is exp of minus the mean of its `count` smallest squared distances, its own 0 among them; distances
    are divided by the root of C. Centres are the rows with the largest product of density and distance to the nearest
    denser row (where there is none, the largest distance of all).

    Args:
        count: number of clusters, from 1 to n; also of the neighbours that make a density.

    Returns:
        Indices (count,) of the centres, the best first, and the cluster (n,) of each row: that of the nearest centre.
    """
    x = x.float() - x.float().mean(0)  # distances lose fewer digits around the mean
    with torch.autocast(x.device.type, enabled=False):
        product = x @ x.T  # (n, n)
    size = product.diagonal()
    square = size[:, None] + size - product - product.T  # symmetric, so that equal distances are equal
    distance = (square.clamp(min=0) / x.shape[1]).sqrt()
    distance.fill_diagonal_(0)
    density = (-distance.topk(count, dim=1, largest=False).values.square().mean(1)).exp()  # (n,)
    denser = density > density[:, None]  # (n, n), column j denser than row i
    away = distance.masked_fill(~denser, torch.inf).amin(1)
    away = torch.where(denser.any(1), away, distance.max())
    centres = (density * away).argsort(descending=True, stable=True)[:count]
    cluster = distance[:, centres].argmin(1)
    cluster[centres] = torch.arange(count, device=x.device)
    return centres, cluster


def cluster_means(x: Tensor, cluster: Tensor, count: int) -> Tensor:
    """Average the rows of `x` (n, C) by cluster: (count, C), with gradients.

    Sums are float32 at least: those of hidden states leave the range of float16.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    sums = wide.new_zeros(count, x.shape[1]).index_add(0, cluster, wide)
    return (sums / torch.bincount(cluster, minlength=count).clamp(min=1)[:, None]).to(x.dtype)
