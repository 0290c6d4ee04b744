"""Attention inside of segments that follow one another: windows, images and frames of the encoders of Qwen-VL.

transformers gives kernels of its flash kind all rows at once, with where each segment ends, and calls any other kernel
for one segment after the other. Here segments of one length are one batch, without a mask: the same numbers to the bit
in a few calls, where an image of 1092 x 1932 has 180 windows in each of 28 blocks. On CUDA in 16 bits all segments go
to torch's kernel for segments of unlike length (`torch.nn.attention.varlen`), in one call. **That way ran on no GPU**:
which way is taken, and what the kernel is given, is tested on a CPU. flash-attn, where it is installed, is chosen by
`attention=flash_attention_2`, and transformers calls it.
"""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

SEGMENTS = "zoo_flash_segments"  # transformers asks for "flash" in the name of a kernel that takes all segments


def use_segments(tower: Any) -> None:
    """Let a tower of transformers attend by `attend`, in place of its loop over sdpa."""
    from transformers import AttentionInterface

    AttentionInterface.register(SEGMENTS, attend)
    tower.config._attn_implementation_internal = SEGMENTS  # the setter looks for a package of that name


def unlike_lengths(query: Tensor, dropout: float) -> Callable[..., Tensor] | None:
    """Return torch's kernel for segments of unlike length; None where it does not take these queries.

    It takes float16 and bfloat16 on CUDA devices of capability 8 and more, heads of a multiple of 8 numbers, at most
    256, and drops no weights.

    Args:
        query: of shape (..., d).
        dropout: of the weights.
    """
    wide = query.shape[-1]
    if query.device.type != "cuda" or dropout or wide % 8 or wide > 256:
        return None
    if query.dtype not in (torch.float16, torch.bfloat16) or torch.version.cuda is None:
        return None
    if torch.cuda.get_device_capability(query.device) < (8, 0):
        return None
    from torch.nn.attention.varlen import varlen_attn

    return cast(Callable[..., Tensor], varlen_attn)  # it gives further tensors only where they are asked for


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    *,
    scaling: float,
    cu_seq_lens_q: Tensor,
    max_length_q: int | None = None,
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
        max_length_q: patches of the longest segment; None: counted.
        dropout: of the weights.
        kwargs: what other kernels take besides.

    Returns:
        (1, S, H, d), and no weights.
    """
    if (kernel := unlike_lengths(query, dropout)) is not None:
        ends = cu_seq_lens_q.to(torch.int32)
        most = int(max_length_q or (ends[1:] - ends[:-1]).max())
        packed = (x[0].transpose(0, 1) for x in (query, key, value))  # (S, H, d)
        return kernel(*packed, ends, ends, most, most, scale=scaling)[None], None
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
