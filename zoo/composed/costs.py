"""What a decoder's prefill and an encoder cost, in closed form.

Counted are products of matrices, as torch's FLOP counter does: 2 for a multiplication with its addition, no causal
discount, no norms, no softmax.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from zoo.fusion.llm.hf_config import TOP_K, first_of


@dataclass(frozen=True)
class DecoderSizes:
    """Of a decoder; of one with gated feed-forward layers where `products` is not given."""

    width: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    num_layers: int
    vocab: int
    products: int = 0  # multiplications of one token with the weights of one layer; 0: by the sizes

    @classmethod
    def of(cls, config: Any, layer: Any = None) -> "DecoderSizes":
        """Read the sizes from a transformers config.

        Args:
            config: of the decoder.
            layer: one of its layers, whose weights say how many products they take; of experts those that a token uses.
        """
        heads = config.num_attention_heads
        products = 0
        for weight in [] if layer is None else layer.parameters():
            used = 1 if weight.dim() == 2 else (first_of(config, TOP_K) or 1) / len(weight) if weight.dim() == 3 else 0
            products += int(weight.numel() * used)
        return cls(
            config.hidden_size,
            getattr(config, "intermediate_size", None) or 4 * config.hidden_size,
            heads,
            getattr(config, "num_key_value_heads", None) or heads,
            getattr(config, "head_dim", None) or config.hidden_size // heads,
            config.num_hidden_layers,
            config.vocab_size,
            products,
        )

    @property
    def per_token(self) -> int:
        """Operations of one token with the weights of one layer."""
        if self.products:
            return 2 * self.products
        attention = 2 * self.width * self.head_dim * (self.heads + self.kv_heads)
        return 2 * (attention + 3 * self.width * self.intermediate)

    @property
    def cache_per_token(self) -> int:
        """Numbers that one token leaves in the cache of one layer."""
        return 2 * self.kv_heads * self.head_dim


def matmul_flops(sizes: DecoderSizes, tokens: Sequence[int], head_rows: int = 0) -> int:
    """Count the products of a prefill with `tokens` in each layer, and of `head_rows` rows of the vocabulary."""
    layers = sum(n * sizes.per_token + 4 * n * n * sizes.heads * sizes.head_dim for n in tokens)
    return layers + 2 * head_rows * sizes.width * sizes.vocab


def encoder_flops(runner: Any, patches: int) -> int | None:
    """Count the products of a vision transformer for one image of `patches` patches, of its blocks that run.

    None where convolutions do more than cut patches: their sizes depend on the ones before.

    Args:
        runner: of the encoder (`zoo.vision.encoders.runner`).
        patches: of an image.
    """
    from torch import nn

    tokens, flops = patches + runner.num_prefix, 0
    for module in runner.tower.modules():
        if isinstance(module, nn.Linear):
            flops += 2 * module.weight.numel() * tokens
        elif isinstance(module, nn.Conv2d):
            if module.kernel_size != module.stride:
                return None
            flops += 2 * module.weight.numel() * patches
    return flops + runner.num_blocks * 4 * tokens * tokens * runner.hidden_size
