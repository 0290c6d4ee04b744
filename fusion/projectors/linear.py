"""One linear layer from the encoder's width to the LLM's, token by token.

Paper: Liu et al., arXiv:2304.08485 (LLaVA).
"""

from dataclasses import dataclass

from torch import Tensor, nn

from zoo.registry import ImageFeatures, Projector, register


@dataclass
class LinearProjectorConfig:
    bias: bool = True


@register("projector", "linear")
class LinearProjector(Projector, nn.Module):
    """As many tokens out as in."""

    def __init__(self, config: LinearProjectorConfig, *, vision_dim: int, text_dim: int) -> None:
        super().__init__()
        self.proj = nn.Linear(vision_dim, text_dim, bias=config.bias)

    def num_tokens(self, n: int) -> int:
        """Count the tokens given for `n` of an image."""
        return n

    def forward(self, image: ImageFeatures) -> Tensor:
        """Project tokens (M, N, D) to (M, N, C)."""
        return self.proj(image.tokens)
