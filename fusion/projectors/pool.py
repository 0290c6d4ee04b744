"""Mean of windows on the patch grid, then LLaVA's two-layer MLP on each: few image tokens, each with its own place.

Paper: Wang et al., arXiv:2311.06791 (InfMLLM), the pool-adapter.

With patches X[r, c] on an (H, W) grid and windows of kh = H/h rows and kw = W/w columns:

    P[i, j] = mean over u < kh, v < kw of X[i * kh + u, j * kw + v]
    Z[i * w + j] = W2 gelu(W1 P[i, j] + b1) + b2        W1: (C, D), W2: (C, C), exact GELU

Pooling comes first, as in the authors' code; the two do not commute. Nothing else is in it: no position embedding, no
separator of rows, so the index is all that the LLM knows of a place, and the grid must not change after training.

Their released model pools 32 x 32 patches of EVA ViT-g at 448 px to 16 x 16 (stride 2: 256 tokens of 1024). We differ:
their code takes the side of a square grid from the number of tokens and drops a [CLS] token itself; here the grid comes
from the encoder, need not be square, and [CLS] is not an image token. Sides that the windows do not divide are refused
as in their code, or get adaptive windows on request (commented out in their code). Means are taken in float32. The norm
ahead of it (`ln_vision`, saved with their model) is an option.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.registry import ImageFeatures, Projector, ZooError, register, require_at_least

_UNEVEN = ("error", "adaptive")


@dataclass
class PoolProjectorConfig:
    stride: int = 2  # side of a window, in patches; 1: no pooling
    target: list[int] = field(default_factory=list)  # rows and columns to pool to ([16, 16]); empty: by the stride
    uneven: str = "error"  # grids that windows do not divide: error, or adaptive windows of unlike size
    norm: bool = False  # LayerNorm of the image tokens ahead of pooling, in float32

    def __post_init__(self) -> None:
        require_at_least(1, stride=self.stride)
        if self.target and (len(self.target) != 2 or min(self.target) < 1):
            raise ZooError(f"target must be two positive numbers, rows and columns, got {list(self.target)}.")
        if self.uneven not in _UNEVEN:
            raise ZooError(f"uneven must be one of {', '.join(_UNEVEN)}, got {self.uneven!r}.")


@register("projector", "pool")
class PoolProjector(Projector, nn.Module):
    """A quarter of the tokens by default, in rows from the top left."""

    needs: frozenset[str] = frozenset({"grid"})
    choices = {"uneven": ("adaptive",)}  # what `zoo check` may offer

    def __init__(
        self, config: PoolProjectorConfig, *, vision_dim: int, text_dim: int, grid: tuple[int, int] | None
    ) -> None:
        super().__init__()
        self.config = config
        self.grid_in = None if grid is None else (grid[0], grid[1])
        self.grid_out = None if self.grid_in is None else self._pooled(self.grid_in)
        self.norm = nn.LayerNorm(vision_dim) if config.norm else None
        self.net = nn.Sequential(nn.Linear(vision_dim, text_dim), nn.GELU(), nn.Linear(text_dim, text_dim))

    def num_tokens(self, n: int) -> int:
        """Count the tokens given for a grid with `n`."""
        if self.grid_in is None or self.grid_out is None:
            return n  # refused by the check: the grid this needs is not there
        if n != self.grid_in[0] * self.grid_in[1]:
            raise ZooError(
                f"projector 'pool' was made for a grid {list(self.grid_in)}, which does not hold {n} tokens."
            )
        return self.grid_out[0] * self.grid_out[1]

    def forward(self, image: ImageFeatures) -> Tensor:
        """Pool tokens (M, H * W, D) and project them to (M, h * w, C), in the order of the pooled grid."""
        x = image.tokens
        if self.norm is not None:
            weight, bias = self.norm.weight.float(), self.norm.bias.float()
            x = F.layer_norm(x.float(), self.norm.normalized_shape, weight, bias, self.norm.eps).to(x.dtype)
        return self.net(self.pool(x, image.grid))  # (M, h * w, C)

    def pool(self, tokens: Tensor, grid: tuple[int, int] | None) -> Tensor:
        """Average windows of tokens (M, H * W, D) to (M, h * w, D)."""
        if grid is None:
            raise ZooError("projector 'pool' needs a grid, and the image tokens have none.")
        if self.grid_in is None or tuple(grid) != self.grid_in or tokens.shape[1] != grid[0] * grid[1]:
            made = "no grid" if self.grid_in is None else f"a grid {list(self.grid_in)}"
            raise ZooError(
                f"projector 'pool' was made for {made}, and was given {tokens.shape[1]} tokens on {list(grid)}."
            )
        assert self.grid_out is not None, "made with grid_in"
        (rows, columns), (h, w) = self.grid_in, self.grid_out
        wide = tokens if tokens.dtype == torch.float64 else tokens.float()
        if rows % h == 0 and columns % w == 0:
            cells = wide.reshape(-1, h, rows // h, w, columns // w, tokens.shape[-1])  # (M, h, kh, w, kw, D)
            return cells.mean(dim=(2, 4)).flatten(1, 2).to(tokens.dtype)  # (M, h * w, D)
        cells = wide.transpose(1, 2).unflatten(2, self.grid_in)  # (M, D, H, W)
        return F.adaptive_avg_pool2d(cells, (h, w)).flatten(2).transpose(1, 2).to(tokens.dtype)  # (M, h * w, D)

    def _pooled(self, grid: tuple[int, int]) -> tuple[int, int]:
        config = self.config
        if config.target:
            h, w = config.target
        else:
            h, w = (-(-side // config.stride) for side in grid)
        if h > grid[0] or w > grid[1]:
            raise ZooError(f"projector 'pool': target {[h, w]} is larger than the grid {list(grid)}.")
        even = not (grid[0] % h or grid[1] % w) and (config.target or not any(s % config.stride for s in grid))
        if config.uneven == "error" and not even:
            sides = " x ".join(f"({', '.join(str(k) for k in range(1, s + 1) if s % k == 0)})" for s in grid)
            how = f"target {[h, w]}" if config.target else f"stride {config.stride}"
            raise ZooError(
                f"projector 'pool': {how} does not divide the grid {list(grid)}. Grids that do, rows x columns: "
                f"{sides}; or uneven=adaptive."
            )
        return h, w
