"""One linear layer from the encoder's width to the LLM's, token by token.

Paper: Liu et al., arXiv:2304.08485 (LLaVA).
"""

from dataclasses import dataclass

from torch import Tensor, nn

from zoo.registry import ImageFeatures, Projector, register


@dataclass
class LinearProjectorConfig:
    bias: bool = True  # add a bias


@register("projector", "linear")
class LinearProjector(Projector, nn.Module):
    """Keeps the number of tokens."""

    def __init__(self, config: LinearProjectorConfig, *, vision_dim: int, text_dim: int) -> None:
        super().__init__()
        self.proj = nn.Linear(vision_dim, text_dim, bias=config.bias)

    def num_tokens(self, n: int) -> int:
        """Count the tokens of the output for `n` image tokens."""
        return n

    def forward(self, image: ImageFeatures) -> Tensor:
        """Project tokens (M, N, D) to (M, N, C)."""
        return self.proj(image.tokens)
