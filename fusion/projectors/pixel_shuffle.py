"""Pixel shuffle: each square of neighbouring tokens becomes one token of their joined channels, then linear layers.

Paper: Laurencon et al., arXiv:2408.12637 (Idefics3), section 3.1; Chen et al., arXiv:2404.16821 (InternVL 1.5),
section 3.1. Idefics3 and SmolVLM project with one linear layer without bias, InternVL with a norm and two layers.
"""

from dataclasses import dataclass

from torch import Tensor, nn

from zoo.registry import ImageFeatures, Projector, ZooError, register, require_at_least, unknown

ACTIVATIONS = {"gelu": "none", "gelu_tanh": "tanh"}  # name -> how GELU is approximated


@dataclass
class PixelShuffleConfig:
    factor: int = 2  # side of the square that becomes one token
    norm: bool = False  # LayerNorm before the first linear layer
    depth: int = 1  # linear layers
    activation: str = "gelu"  # between them: gelu | gelu_tanh
    bias: bool = False  # of the linear layers

    def __post_init__(self) -> None:
        require_at_least(1, factor=self.factor, depth=self.depth)
        if self.activation not in ACTIVATIONS:
            raise unknown("activation", self.activation, ACTIVATIONS)


@register("projector", "pixel_shuffle")
class PixelShuffle(Projector, nn.Module):
    """Needs the grid, and gives N / factor^2 tokens."""

    needs: frozenset[str] = frozenset({"grid"})

    def __init__(
        self, config: PixelShuffleConfig, *, vision_dim: int, text_dim: int, grid: tuple[int, int] | None
    ) -> None:
        super().__init__()
        self.factor = config.factor
        if grid is not None and any(side % config.factor for side in grid):
            raise ZooError(f"factor {config.factor} does not divide the grid {list(grid)}.")
        self.grid = None if grid is None else (grid[0] // config.factor, grid[1] // config.factor)
        width = vision_dim * config.factor**2
        self.norm = nn.LayerNorm(width) if config.norm else None
        layers: list[nn.Module] = [nn.Linear(width, text_dim, bias=config.bias)]
        for _ in range(config.depth - 1):
            layers += [nn.GELU(ACTIVATIONS[config.activation]), nn.Linear(text_dim, text_dim, bias=config.bias)]
        self.net = nn.Sequential(*layers)

    def num_tokens(self, n: int) -> int:
        """Count the tokens of the output for `n` image tokens."""
        return n // self.factor**2

    def forward(self, image: ImageFeatures) -> Tensor:
        """Project tokens (M, h * w, D) to (M, h * w / factor^2, C)."""
        if image.grid is None:
            raise ZooError("projector 'pixel_shuffle' needs a grid, and the image tokens have none.")
        (h, w), s = image.grid, self.factor
        x = image.tokens.unflatten(1, (h // s, s, w // s, s))  # (M, h/s, s, w/s, s, D)
        x = x.transpose(2, 3).flatten(3).flatten(1, 2)  # (M, N / s^2, s * s * D)
        return self.net(x if self.norm is None else self.norm(x))  # (M, N / s^2, C)
