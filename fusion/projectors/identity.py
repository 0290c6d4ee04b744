"""The encoder's tokens as they are, for encoders that end with the width of the LLM, as those of Qwen-VL do."""

from dataclasses import dataclass

from torch import Tensor, nn

from zoo.registry import ImageFeatures, Projector, ZooError, register


@dataclass
class IdentityConfig:
    pass


@register("projector", "identity")
class Identity(Projector, nn.Module):
    """Has no weights, and passes on the encoder's features for further layers of the LLM (`ImageFeatures.deep`)."""

    passes_deep = True

    def __init__(self, config: IdentityConfig, *, vision_dim: int, text_dim: int) -> None:
        super().__init__()
        if vision_dim != text_dim:
            raise ZooError(
                f"the encoder's tokens are {vision_dim} wide and the LLM's {text_dim}: take projector=linear or mlp, "
                "or an encoder that ends with the LLM's width (vision.out_width of qwen_vision)"
            )

    def num_tokens(self, n: int) -> int:
        """Count the tokens of the output for `n` image tokens."""
        return n

    def forward(self, image: ImageFeatures) -> Tensor:
        """Return the tokens (M, N, C)."""
        return image.tokens
