"""Attention scores for pruners, computed from q and k beside the encoder's fused kernel; no N x N matrix is kept.

A single row costs O(N). The mean over all rows needs all products but holds a block of them at a time.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.registry import ZooError
from zoo.vision.encoders.buffers import as_buffers

BLOCK = 1 << 22  # scores held at once, over all images and heads


def row(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """Attention of one query, mean over heads: (M, L) float32.

    Args:
        query: (M, H, 1, d).
        key: (M, H, L, d), or fewer heads with grouped queries.
        scale: factor of q.k.
    """
    with torch.no_grad(), _float32(query):
        return _scores(query, key, scale).softmax(-1).mean(1)[:, 0]  # (M, L)


def column_mean(query: Tensor, key: Tensor, scale: float, bias: Tensor | None = None) -> Tensor:
    """Mean attention received by each token, over heads and queries: (M, L) float32; rows sum to 1.

    Args:
        query: (M, H, L, d).
        key: (M, H, L, d), or fewer heads.
        scale: factor of q.k.
        bias: (H, L, L) added to the scores; None: none.
    """
    m, heads, length = query.shape[:3]
    step = min(length, max(1, BLOCK // (m * heads * length)))
    with torch.no_grad(), _float32(query):
        total: Tensor | None = None
        for start in range(0, length, step):
            scores = _scores(query[:, :, start : start + step], key, scale)  # (M, H, Q, L)
            scores = scores if bias is None else scores + bias[:, start : start + step].float()
            seen = scores.softmax(-1).sum((1, 2))  # (M, L)
            total = seen if total is None else total + seen
        assert total is not None, "there is at least one token"
        return total / (heads * length)


def _float32(like: Tensor) -> Any:
    device = "cpu" if like.is_meta else like.device.type  # autocast has no meta device
    return torch.autocast(device, enabled=False)


def _scores(query: Tensor, key: Tensor, scale: float) -> Tensor:
    key = key.float()
    if key.shape[1] != query.shape[1]:
        key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    return (query.float() * scale) @ key.transpose(-1, -2)  # (M, H, Q, L)


class PoolingHead(nn.Module):
    """Scores of SigLIP's attention pooling: the attention of its learned probe to all patches after the last block.

    It runs the rest of the encoder: blocks after the tokens' layer, and the final norm if tokens are taken before it.
    Weights are buffers: nothing here is trained, and data parallelism must not wait for their gradients.

    Args:
        head: `SiglipMultiheadAttentionPoolingHead` of transformers, or timm's `AttentionPoolLatent`.
        blocks: those after the layer of the tokens.
        norm: the final norm, unless the tower keeps it.
        whole: keep the head's layers after the scores, too, for its output.
    """

    def __init__(self, head: Any, blocks: list[nn.Module], norm: nn.Module | None, whole: bool = False) -> None:
        super().__init__()
        for unused in () if whole else ("layernorm", "mlp", "proj", "norm"):  # layers after the scores
            if hasattr(head, unused):
                setattr(head, unused, nn.Identity())
        self.head, self.blocks, self.norm, self.whole = head, nn.ModuleList(blocks), norm, whole
        if hasattr(head, "attention") and not whole:
            head.attention.out_proj = nn.Identity()
        as_buffers(self)

    def forward(self, tokens: Tensor, norm: nn.Module) -> tuple[Tensor, Tensor | None]:
        """Score the patches: (M, N) float32, rows sum to 1; and with `whole` the head's output (M, D).

        Args:
            tokens: (M, N, D), output of the tower's last block.
            norm: the tower's final norm, used if this module has none.
        """
        with torch.no_grad():
            for block in self.blocks:
                out = block(tokens, attention_mask=None) if hasattr(self.head, "attention") else block(tokens)
                tokens = out[0] if isinstance(out, tuple) else out
            tokens = (self.norm or norm)(tokens)
            query, key, scale = self._query_key(tokens)
            summary = self.head(tokens) if self.whole else None
        return row(query, key, scale), summary

    def _query_key(self, tokens: Tensor) -> tuple[Tensor, Tensor, float]:
        head: Any = self.head
        m = tokens.shape[0]
        if hasattr(head, "attention"):  # transformers: torch's own module, whose weights are stacked
            inner = head.attention
            width, heads = inner.embed_dim, (inner.num_heads, -1)
            weight, bias = inner.in_proj_weight, inner.in_proj_bias
            query = F.linear(head.probe, weight[:width], bias[:width]).unflatten(-1, heads).transpose(1, 2)
            key = F.linear(tokens, weight[width : 2 * width], bias[width : 2 * width])  # (M, N, D)
            key = key.unflatten(-1, heads).transpose(1, 2)  # (M, H, N, d)
            return query.expand(m, -1, -1, -1), key, query.shape[-1] ** -0.5
        if head.pos_embed is not None:
            tokens = tokens + head.pos_embed.to(tokens.dtype)
        heads = (head.num_heads, head.head_dim)
        query = head.q_norm(head.q(head.latent).unflatten(-1, heads).transpose(1, 2))  # (1, H, 1, d)
        key = head.kv(tokens).unflatten(-1, (2, *heads))[:, :, 0].transpose(1, 2)  # (M, H, N, d)
        return query.expand(m, -1, -1, -1), head.k_norm(key), head.scale


def pooling_head(
    head: Any, blocks: list[nn.Module], norm: nn.Module | None, name: str, whole: bool = False
) -> PoolingHead:
    """Build a `PoolingHead` from the pooling module of transformers or timm.

    Raises:
        ZooError: the module has no single learned probe.
    """
    if getattr(head, "probe", None) is None and getattr(head, "latent_len", 0) != 1:
        raise ZooError(
            f"{name} has no pooling head with a learned probe, as SigLIP has one: pooling_head (summary) must be false."
        )
    return PoolingHead(head, blocks, norm, whole)
