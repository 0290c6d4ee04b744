"""Attention inside of segments that follow one another: windows, images and frames of the encoders of Qwen-VL.

transformers gives kernels of its flash kind all rows at once, with where each segment ends, and calls any other kernel
for one segment after the other. Here segments of one length are one batch, without a mask: the same numbers to the bit
in a few calls, where an image of 1092 x 1932 has 180 windows in each of 28 blocks.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

SEGMENTS = "zoo_flash_segments"  # transformers asks for "flash" in the name of a kernel that takes all segments


def use_segments(tower: Any) -> None:
    """Let a tower of transformers attend by `attend`, in place of its loop over sdpa."""
    from transformers import AttentionInterface

    AttentionInterface.register(SEGMENTS, attend)
    tower.config._attn_implementation_internal = SEGMENTS  # the setter looks for a package of that name


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    *,
    scaling: float,
    cu_seq_lens_q: Tensor,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend within each segment.

    Args:
        module: the attention layer.
        query: (1, H, S, d), of all segments.
        key: the same.
        value: the same.
        attention_mask: None; a segment attends to all of itself.
        scaling: of the products.
        cu_seq_lens_q: (segments + 1,) where segments begin, and where the last one ends.
        dropout: of the weights.
        kwargs: what other kernels take besides.

    Returns:
        (1, S, H, d), and no weights.
    """
    how: dict[str, Any] = {"dropout_p": dropout, "scale": scaling}
    lengths = (cu_seq_lens_q[1:] - cu_seq_lens_q[:-1]).tolist()
    if len(set(lengths)) == 1:  # views, no copies
        batch = [x[0].unflatten(1, (len(lengths), -1)).transpose(0, 1) for x in (query, key, value)]  # (G, H, L, d)
        return F.scaled_dot_product_attention(*batch, **how).transpose(1, 2).flatten(0, 1)[None], None
    split = [x.split(lengths, dim=2) for x in (query, key, value)]  # of (1, H, L, d)
    groups: dict[int, list[int]] = {}
    for i, length in enumerate(lengths):
        groups.setdefault(length, []).append(i)
    made: dict[int, Tensor] = {}
    for some in groups.values():
        batch = [torch.cat([parts[i] for i in some]) if len(some) > 1 else parts[some[0]] for parts in split]
        made |= dict(zip(some, F.scaled_dot_product_attention(*batch, **how).transpose(1, 2), strict=True))  # (L, H, d)
    return torch.cat([made[i] for i in range(len(lengths))])[None], None
