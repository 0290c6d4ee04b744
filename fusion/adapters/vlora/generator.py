"""The perceptual weights generator of VLoRA: learned queries read an image and become low-rank factors of weights.

Paper: Ma et al., arXiv:2405.20339. A query decoder as in DETR, or a Perceiver whose memory is never updated: each block
lets the queries attend to each other, then to the image, then comes a feed-forward, all with norms ahead of them. The
memory itself is not normalised. One query for each matrix that changes.

Initialisation is what the authors' code comes to, not what it intends: linear layers are a truncated normal of std
0.02, biases 0; the packed projections of attention keep Xavier's; queries are a normal of std 1.

There are few queries and many patches, so the matrices of keys and values act on the side of the queries:
q (M K)^T = (q K^T) M^T, and a (M V) = (a M) V. The result is the same and the memory is never projected: for three
queries of 16 heads on 576 patches a tenth of the products.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class WeightGenerator(nn.Module):
    """Memory (G, S, W) to factors (G, K, out) with K queries."""

    def __init__(self, num_queries: int, width: int, depth: int, num_heads: int, mlp_ratio: float, out: int) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(num_queries, width))
        self.blocks = nn.ModuleList(GeneratorBlock(width, num_heads, mlp_ratio) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, out)
        self.apply(init_linear)

    def forward(self, memory: Tensor) -> Tensor:
        """Read memory (G, S, W); returns (G, K, out)."""
        queries = self.queries.to(memory.dtype).expand(len(memory), -1, -1)  # (G, K, W)
        for block in self.blocks:
            queries = block(queries, memory)
        return self.head(self.norm(queries))  # (G, K, out)


class GeneratorBlock(nn.Module):
    """Queries to queries, queries to memory, feed-forward."""

    def __init__(self, width: int, num_heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(width), nn.LayerNorm(width), nn.LayerNorm(width)
        self.own = nn.MultiheadAttention(width, num_heads, batch_first=True)
        self.cross = nn.MultiheadAttention(width, num_heads, batch_first=True)
        inner = int(width * mlp_ratio)
        self.mlp = nn.Sequential(nn.Linear(width, inner), nn.GELU(), nn.Linear(inner, width))

    def forward(self, queries: Tensor, memory: Tensor) -> Tensor:
        """Update queries (G, K, W) from memory (G, S, W)."""
        x = self.norm1(queries)
        queries = queries + self.own(x, x, x, need_weights=False)[0]
        queries = queries + self.read(self.norm2(queries), memory)
        return queries + self.mlp(self.norm3(queries))

    def read(self, queries: Tensor, memory: Tensor) -> Tensor:
        """Attend from queries (G, K, W) to memory (G, S, W): what `self.cross` gives, in another order of products."""
        attention: Any = self.cross
        heads = (attention.num_heads, -1)
        to_q, to_k, to_v = attention.in_proj_weight.chunk(3)
        bias_q, _, bias_v = attention.in_proj_bias.chunk(3)  # that of keys moves all scores of a query alike
        q = F.linear(queries, to_q, bias_q).unflatten(-1, heads)  # (G, K, H, d)
        scale = q.shape[-1] ** -0.5
        q = torch.einsum("gkhd,hdw->gkhw", q * scale, to_k.unflatten(0, heads))  # (G, K, H, W)
        weights = (q.flatten(1, 2) @ memory.mT).softmax(-1)  # (G, K * H, S)
        seen = (weights @ memory).unflatten(1, (-1, attention.num_heads))  # (G, K, H, W)
        values = torch.einsum("gkhw,hdw->gkhd", seen, to_v.unflatten(0, heads)) + bias_v.unflatten(0, heads)
        return attention.out_proj(values.flatten(2))  # (G, K, W)


def init_linear(module: nn.Module, std: float = 0.02) -> None:
    """Initialise a linear layer as the authors do; packed projections of attention are bare parameters, and are not."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=std)
        nn.init.zeros_(module.bias)
