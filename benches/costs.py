"""What a decoder's prefill costs, in closed form, for a number of tokens in each layer.

Two conventions, a multiplication with its addition being 2 in both. `matmul_flops` counts products of matrices, as
torch's FLOP counter does: no causal discount, no norms, no softmax. `roofline_flops` is that of LLM-Viewer, which the
tables of AIM (Zhong et al., arXiv:2412.03248) were made with: softmax, norms, residuals and activations as well, one
row of the vocabulary projection, no causal discount either, without the vision encoder.
"""

from collections.abc import Sequence

from zoo.composed.costs import DecoderSizes, encoder_flops, matmul_flops

__all__ = ["DecoderSizes", "cache_bytes", "encoder_flops", "matmul_flops", "roofline_flops"]

QWEN2_7B = DecoderSizes(3584, 18944, 28, 4, 128, 28, 152064)
VICUNA_7B = DecoderSizes(4096, 11008, 32, 32, 128, 32, 32000)


def roofline_flops(sizes: DecoderSizes, tokens: Sequence[int]) -> int:
    """Count what LLM-Viewer counts of a prefill with `tokens` in each layer."""
    rest = sum(5 * sizes.heads * n * n + (14 + 2 + 2) * sizes.width * n for n in tokens)
    return matmul_flops(sizes, tokens, head_rows=1) + rest


def cache_bytes(sizes: DecoderSizes, tokens: Sequence[int], bytes_each: int) -> int:
    """Count the bytes of keys and values with `tokens` in each layer."""
    return sum(tokens) * sizes.cache_per_token * bytes_each
