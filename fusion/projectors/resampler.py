"""A fixed number of learned queries that read the image tokens by cross-attention: the baseline among projectors.

Paper: Alayrac et al., arXiv:2204.14198 (Flamingo), section 3.1.

Each layer lets the queries attend to the image tokens and to themselves at once, then comes a feed-forward. We differ
in adding fixed sine positions of the grid to the image tokens, as Qwen-VL does; without a grid they have none.
Attention is torch's fused kernel, and its weights start as those of torch's own module (Xavier). Queries start with
the norm of normalised tokens: with smaller ones, all queries attend alike at first.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.registry import ImageFeatures, Projector, ZooError, register, require_at_least


@dataclass
class ResamplerConfig:
    num_queries: int = 64  # image tokens of the output, at least 1
    depth: int = 2  # layers, at least 1
    hidden_size: int = 0  # width of the queries; 0: the encoder's
    num_heads: int = 0  # attention heads; 0: one per 64 of the width
    mlp_ratio: float = 4.0  # width of the feed-forward over that of the queries
    input_norm: bool = True  # normalise image tokens, as published; false if their norm carries information

    def __post_init__(self) -> None:
        require_at_least(1, num_queries=self.num_queries, depth=self.depth)
        require_at_least(0, hidden_size=self.hidden_size, num_heads=self.num_heads)
        if self.mlp_ratio <= 0:
            raise ZooError(f"mlp_ratio must be more than 0, got {self.mlp_ratio}.")


@register("projector", "resampler")
class Resampler(Projector, nn.Module):
    """Gives `num_queries` tokens for any number of image tokens."""

    def __init__(self, config: ResamplerConfig, *, vision_dim: int, text_dim: int) -> None:
        super().__init__()
        width = config.hidden_size or vision_dim
        heads = config.num_heads or max(1, width // 64)
        if width % heads:
            raise ZooError(f"projector 'resampler': width {width} is not a multiple of num_heads {heads}.")
        self.num_queries = config.num_queries
        self.queries = nn.Parameter(torch.randn(config.num_queries, width))
        self.proj_in = nn.Linear(vision_dim, width)
        self.norm_in = nn.LayerNorm(width) if config.input_norm else nn.Identity()
        self.layers = nn.ModuleList(_Layer(width, heads, config.mlp_ratio) for _ in range(config.depth))
        self.norm_out = nn.LayerNorm(width)
        self.proj_out = nn.Linear(width, text_dim)

    def num_tokens(self, n: int) -> int:
        """Count the tokens of the output for `n` image tokens."""
        return self.num_queries

    def forward(self, image: ImageFeatures) -> Tensor:
        """Read tokens (M, N, D) into (M, K, C) with K = num_queries."""
        x = self.norm_in(self.proj_in(image.tokens))  # (M, N, W)
        if image.grid is not None:
            x = x + sine_positions(image.grid, x.shape[-1], x.device).to(x.dtype)  # (M, N, W)
        queries = self.queries.expand(len(x), -1, -1)  # (M, K, W)
        for layer in self.layers:
            queries = layer(queries, x)
        return self.proj_out(self.norm_out(queries))  # (M, K, C)


class _Layer(nn.Module):
    def __init__(self, width: int, heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.kv, self.out = nn.Linear(width, width), nn.Linear(width, 2 * width), nn.Linear(width, width)
        for weight in (self.q.weight, *self.kv.weight.chunk(2), self.out.weight):
            nn.init.xavier_uniform_(weight)
        inner = int(width * mlp_ratio)
        self.mlp = nn.Sequential(nn.Linear(width, inner), nn.GELU(), nn.Linear(inner, width))

    def forward(self, queries: Tensor, x: Tensor) -> Tensor:
        own = self.norm1(queries)  # (M, K, W)
        q = self.q(own).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (M, H, K, d)
        k, v = self.kv(torch.cat([x, own], dim=1)).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        read = F.scaled_dot_product_attention(q, k, v)  # (M, H, K, d)
        queries = queries + self.out(read.transpose(1, 2).flatten(2))  # (M, K, W)
        return queries + self.mlp(self.norm2(queries))


def sine_positions(grid: tuple[int, int], width: int, device: torch.device) -> Tensor:
    """Sines and cosines of row and column, (h * w, width); wavelengths from 2 pi to 10 000 times that."""
    quarter = -(-width // 4)
    rates = 10000.0 ** (-torch.arange(quarter, device=device, dtype=torch.float32) / quarter)  # (W/4,)
    rows, columns = (torch.arange(side, device=device, dtype=torch.float32)[:, None] * rates for side in grid)
    rows = torch.cat([rows.sin(), rows.cos()], dim=-1)[:, None].expand(-1, grid[1], -1)  # (h, w, W/2)
    columns = torch.cat([columns.sin(), columns.cos()], dim=-1)[None].expand(grid[0], -1, -1)  # (h, w, W/2)
    return torch.cat([rows, columns], dim=-1).flatten(0, 1)[:, :width]  # (h * w, W)
