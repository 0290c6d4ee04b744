"""The block behind the features: of it, its first norm and its projections to queries and keys (`next_block=true`).

It stays in the tower's list of blocks, so that its weights have the names that checkpoints give them, and passes on
what reaches it. Pruners that choose by the layer that reads the features need it (PruMerge, arXiv:2403.15388); the rest
of that block is neither kept nor run. It is of use with weights of a checkpoint: nothing trains random ones.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.registry import ZooError
from zoo.vision.encoders.attention_scores import row
from zoo.vision.encoders.buffers import as_buffers

_NORMS = ("layer_norm1", "norm1", "layernorm_before", "ln_1")  # of a block, ahead of its attention
_ATTENTIONS = ("self_attn", "attention", "attn")
_OF_QUERY_KEY = ("q_proj", "k_proj", "qkv")  # layers of an attention that make q and k; others are removed


class NextBlock(nn.Module):
    """Passes tokens on. Weights are buffers: nothing here is trained, and data parallelism must not wait for them.

    Args:
        block: of transformers, timm or open_clip, with a norm ahead of its attention. Its modules are taken, by name.

    Raises:
        ZooError: q and k of this block are not projections of normed tokens, alone.
    """

    def __init__(self, block: Any) -> None:
        super().__init__()
        inside = dict(block.named_children())
        norm, attention = (next((n for n in names if n in inside), "") for names in (_NORMS, _ATTENTIONS))
        if not norm or not attention or not _plain(block, inside[attention]):
            raise ZooError(
                f"next_block needs a block whose queries and keys are projections of normed tokens, and this encoder's "
                f"is a {type(block).__name__}: next_block must be false."
            )
        self._norm, self._attention = norm, attention
        self.add_module(norm, inside[norm])
        inner = inside[attention]
        for name, _ in list(inner.named_children()):
            if name not in _OF_QUERY_KEY:
                setattr(inner, name, nn.Identity())
        self.add_module(attention, inner)
        as_buffers(self)

    def forward(self, tokens: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return tokens

    @torch.no_grad()
    def read(self, tokens: Tensor, prefix: int) -> tuple[Tensor, Tensor]:
        """Compute what the block's attention would: the row of [CLS] over the whole width, and the keys.

        Args:
            tokens: (M, P + N, D), [CLS] first.
            prefix: P.

        Returns:
            softmax of q_cls . k / sqrt(C) over all P + N keys, (M, N) float32; and the keys (M, N, C). Heads are not
            split, and rotations of some encoders are left out.
        """
        x, attention = getattr(self, self._norm)(tokens.detach()), getattr(self, self._attention)
        query, key = _query_key(attention, x)
        scores = row(query.unsqueeze(1), key.unsqueeze(1), key.shape[-1] ** -0.5)  # one head
        return scores[:, prefix:], key[:, prefix:]


def _plain(block: Any, attention: Any) -> bool:
    """Whether q and k are projections without a norm of their own, of tokens that the block normed first."""
    if type(block).__name__ in ("ResPostBlock", "EvaBlockPostNorm"):
        return False
    normed = any(not isinstance(getattr(attention, n, nn.Identity()), nn.Identity) for n in ("q_norm", "k_norm"))
    known = isinstance(attention, nn.MultiheadAttention) or any(hasattr(attention, n) for n in ("q_proj", "qkv"))
    return known and not normed


def _query_key(attention: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """The query of the first token (M, 1, C), and all keys (M, L, C)."""
    first = x[:, :1]
    if isinstance(attention, nn.MultiheadAttention):  # torch's own: weights are stacked
        weight, bias = attention.in_proj_weight, attention.in_proj_bias
    elif getattr(attention, "qkv", None) is None:
        return attention.q_proj(first), attention.k_proj(x)
    else:
        weight, bias = attention.qkv.weight, attention.qkv.bias
    query, key, _ = weight.chunk(3)
    of_query, of_key, _ = bias.chunk(3) if bias is not None else (None, None, None)
    if getattr(attention, "q_bias", None) is not None:  # timm's EVA and BEiT
        of_query, of_key = attention.q_bias, attention.k_bias
    return F.linear(first, query, of_query), F.linear(x, key, of_key)
