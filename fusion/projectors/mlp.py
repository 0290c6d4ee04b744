"""Linear layers with GELU between them, token by token: `mlp2x_gelu` of LLaVA-1.5 by default.

Paper: Liu et al., arXiv:2310.03744 (LLaVA-1.5), section 3.2.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor, nn

from zoo.registry import ImageFeatures, Projector, register, require_at_least, unknown

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "gelu": nn.GELU,
    "gelu_tanh": lambda: nn.GELU(approximate="tanh"),
    "relu": nn.ReLU,
    "silu": nn.SiLU,
}


@dataclass
class MLPProjectorConfig:
    depth: int = 2  # linear layers
    hidden_size: int = 0  # width between them; 0: the LLM's
    activation: str = "gelu"  # between them: gelu | gelu_tanh | relu | silu
    bias: bool = True  # of the linear layers

    def __post_init__(self) -> None:
        require_at_least(1, depth=self.depth)
        if self.activation not in ACTIVATIONS:
            raise unknown("activation", self.activation, ACTIVATIONS)
        require_at_least(0, hidden_size=self.hidden_size)


@register("projector", "mlp")
class MLPProjector(Projector, nn.Module):
    """Keeps the number of tokens."""

    def __init__(self, config: MLPProjectorConfig, *, vision_dim: int, text_dim: int) -> None:
        super().__init__()
        inner = [config.hidden_size or text_dim] * (config.depth - 1)
        widths = [vision_dim, *inner, text_dim]
        layers: list[nn.Module] = [nn.Linear(widths[0], widths[1], bias=config.bias)]
        for a, b in pairwise(widths[1:]):
            layers += [ACTIVATIONS[config.activation](), nn.Linear(a, b, bias=config.bias)]
        self.net = nn.Sequential(*layers)

    def num_tokens(self, n: int) -> int:
        """Count the tokens of the output for `n` image tokens."""
        return n

    def forward(self, image: ImageFeatures) -> Tensor:
        """Project tokens (M, N, D) to (M, N, C)."""
        return self.net(image.tokens)
