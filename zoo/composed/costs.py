"""What a decoder's prefill and an encoder cost, in closed form.

Counted are products of matrices, as torch's FLOP counter does: 2 for a multiplication with its addition, no causal
discount, no norms, no softmax.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import repeat
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
    products: tuple[int, ...] = ()  # multiplications of one token with the weights of each layer; empty: by the sizes

    @classmethod
    def of(cls, config: Any, layers: Iterable[Any] = ()) -> "DecoderSizes":
        """Read the sizes from a transformers config.

        Args:
            config: of the decoder.
            layers: all of them, whose weights say how many products they take, since the first ones of a mixture of
                experts may be dense; of experts those that a token uses.
        """
        heads, top_k = config.num_attention_heads, first_of(config, TOP_K) or 1

        def products(layer: Any) -> int:
            stacks = [w.numel() * top_k // len(w) for w in layer.parameters() if w.dim() == 3]
            return sum(stacks) + sum(w.numel() for w in layer.parameters() if w.dim() == 2)

        return cls(
            config.hidden_size,
            getattr(config, "intermediate_size", None) or 4 * config.hidden_size,
            heads,
            getattr(config, "num_key_value_heads", None) or heads,
            getattr(config, "head_dim", None) or config.hidden_size // heads,
            config.num_hidden_layers,
            config.vocab_size,
            tuple(map(products, layers)),
        )

    @property
    def per_token(self) -> int:
        """Multiplications of one token with the weights of one layer, by the sizes."""
        attention = 2 * self.width * self.head_dim * (self.heads + self.kv_heads)
        return attention + 3 * self.width * self.intermediate

    @property
    def cache_per_token(self) -> int:
        """Numbers that one token leaves in the cache of one layer."""
        return 2 * self.kv_heads * self.head_dim


def matmul_flops(sizes: DecoderSizes, tokens: Sequence[int], head_rows: int = 0) -> int:
    """Count the products of a prefill with `tokens` in each layer, and of `head_rows` rows of the vocabulary."""
    each = zip(tokens, sizes.products or repeat(sizes.per_token), strict=bool(sizes.products))
    layers = sum(2 * n * products + 4 * n * n * sizes.heads * sizes.head_dim for n, products in each)
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
        elif isinstance(module, nn.MultiheadAttention) and module.in_proj_weight is not None:
            flops += 2 * module.in_proj_weight.numel() * tokens  # no linear layer; the projection behind it is one
        elif isinstance(module, nn.Conv2d):
            if module.kernel_size != module.stride:
                return None
            flops += 2 * module.weight.numel() * patches
    return flops + runner.num_blocks * 4 * tokens * tokens * runner.hidden_size
