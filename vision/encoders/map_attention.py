"""The attention of the block that computes a map, where it is between all of its tokens: FastViT, MetaFormer, LeViT.

Others have none (convolutional ones), windows (Swin, MaxViT), keys that are fewer than the tokens (PVT), attention
between channels (XCiT), or layers behind it (hybrids of MobileNetV4).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor


def last_attention(tower: Any) -> Any:
    """Return the attention of the last block of a model of timm, cut behind its stage; None: none of this kind."""
    from timm.models import fastvit, levit, metaformer

    stages = getattr(tower, "stages", None)
    blocks = getattr(stages[-1], "blocks", None) if stages else None
    if not blocks:
        return None
    for name in ("token_mixer", "attn"):
        found = getattr(blocks[-1], name, None)
        if type(found) in (fastvit.Attention, metaformer.Attention, levit.Attention):
            return found
    return None


def split_qkv(attention: Any, qkv: Tensor) -> tuple[Tensor, Tensor]:
    """Split the output of an attention's layer `qkv` into queries and keys, (M, H, N, d) each.

    Args:
        attention: found by `last_attention`.
        qkv: (M, N, C), or (M, C, h, w) of a LeViT made of convolutions.
    """
    heads = attention.num_heads
    if not hasattr(attention, "attention_biases"):
        query, key, _ = qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)  # (3, M, H, N, d)
        return query, key
    sizes = [attention.key_dim, attention.key_dim, attention.val_dim]  # of a head: its values are wider
    if qkv.ndim == 4:
        query, key, _ = qkv.flatten(2).unflatten(1, (heads, -1)).transpose(2, 3).split(sizes, dim=3)  # (M, H, N, d)
        return query, key
    query, key, _ = qkv.unflatten(-1, (heads, -1)).transpose(1, 2).split(sizes, dim=3)
    return query, key
