"""Relations between an image's tokens, of a student against a teacher, without holding logits.

LLaVA-KD compares R = Y Y^T, where Y (N, V) are the raw logits of an image's tokens. With Y = H W^T that is H G H^T;
G = W^T W (C, C) is made once for a frozen teacher and once a step for a student whose head trains: N C^2 + N^2 C
operations and no array over the vocabulary. A head that caps its logits is not linear; its R is summed over pieces of
the vocabulary.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from zoo.registry import LinearHead, ZooError

NORMALISE = ("none", "unit", "centred_unit")
PIECE = 1 << 13  # rows of a vocabulary projection at once


class Gram(torch.autograd.Function):
    """W^T W (C, C) of a table W (V, C), in float32, a piece of the vocabulary at a time."""

    @staticmethod
    def forward(ctx: Any, table: Tensor) -> Tensor:
        ctx.save_for_backward(table)
        wide = table.dtype if table.dtype == torch.float64 else torch.float32
        total = table.new_zeros(table.shape[1], table.shape[1], dtype=wide)
        for piece in table.split(PIECE):
            total.addmm_(piece.t().to(wide), piece.to(wide))
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        (table,) = ctx.saved_tensors
        both = grad + grad.t()
        result = torch.empty_like(table)
        for out, piece in zip(result.split(PIECE), table.split(PIECE), strict=True):
            out.copy_(piece.to(both.dtype) @ both)
        return result


def relations(llm: Any, rows: Tensor, vocab: int, normalise: str = "none", gram: Tensor | None = None) -> Tensor:
    """Give R (M, N, N) of image tokens (M, N, C); tokens that are zero, as padding is, have relations of zero.

    Args:
        llm: whose vocabulary projection makes logits of the rows.
        rows: (M, N, C) hidden states.
        vocab: tokens of the vocabulary that count, the first ones.
        normalise: none, the published form; unit: of logits with norm 1 for each token; centred_unit: the mean over
            the vocabulary is taken off first, so that a constant on a token's logits changes nothing.
        gram: result of `gram_of` for this head, if it was cached.
    """
    head = _plain_head(llm)
    device = rows.device.type
    with torch.autocast(device, enabled=False):
        wide = rows if rows.dtype == torch.float64 else rows.float()
        if head.cap is not None:
            result = _capped(wide, head, vocab, normalise == "centred_unit")
        else:
            real = (wide != 0).any(-1, keepdim=True)
            wide = wide if head.bias is None else torch.cat([wide, real.to(wide.dtype)], -1)
            gram = gram if gram is not None else gram_of(llm, vocab, normalise)
            assert gram is not None, "a plain head has a Gram matrix"
            result = wide @ gram @ wide.transpose(-1, -2) * head.scale**2  # (M, N, N)
        if normalise == "none":
            return result
        size = result.diagonal(dim1=-2, dim2=-1).clamp(min=torch.finfo(result.dtype).tiny).rsqrt()  # (M, N)
        return result * size.unsqueeze(-1) * size.unsqueeze(-2)


def gram_of(llm: Any, vocab: int, normalise: str = "none") -> Tensor | None:
    """Give G of a vocabulary projection, its bias as one more column; None where the projection caps its logits."""
    head = _plain_head(llm)
    if head.cap is not None:
        return None
    table = head.weight[:vocab]
    if head.bias is not None:
        table = torch.cat([table, head.bias[:vocab].unsqueeze(-1).to(table.dtype)], -1)
    with torch.autocast(table.device.type, enabled=False):
        gram = Gram.apply(table)
        if normalise == "centred_unit":  # of W without its mean row
            mean = table.mean(0, dtype=gram.dtype)
            gram = gram - vocab * torch.outer(mean, mean)
    return gram


def relation_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """1 - cosine of the relations (M, N, N) of each image: (M,), in [0, 1]."""
    return 1 - F.cosine_similarity(student.flatten(1), teacher.flatten(1), dim=1, eps=1e-12)


def by_image(rows: Tensor, group: Tensor, images: int) -> Tensor:
    """Sort rows (P, C) by the image they belong to (P,): (M, N, C), padded with zeros."""
    counts = torch.bincount(group, minlength=images)  # (M,)
    order = group.argsort(stable=True)
    start = counts.cumsum(0) - counts
    place = torch.arange(len(group), device=group.device) - start[group[order]]
    size = int(counts.max()) if len(group) else 0
    flat = rows.new_zeros(images * size, rows.shape[1]).index_copy(0, group[order] * size + place, rows[order])
    return flat.view(images, size, rows.shape[1])


def _capped(rows: Tensor, head: LinearHead, vocab: int, centred: bool) -> Tensor:
    real = (rows != 0).any(-1, keepdim=True).to(rows.dtype)
    result = rows.new_zeros(rows.shape[0], rows.shape[1], rows.shape[1])
    sums = rows.new_zeros(rows.shape[:2])

    def piece(rows: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        assert head.cap is not None, "called for capped heads"
        logits = F.linear(rows, weight.to(rows.dtype), None if bias is None else bias.to(rows.dtype)) * head.scale
        logits = torch.tanh(logits / head.cap) * head.cap * real  # (M, N, piece)
        return logits @ logits.transpose(-1, -2), logits.sum(-1)

    for start in range(0, vocab, PIECE):
        part = slice(start, min(start + PIECE, vocab))
        bias = None if head.bias is None else head.bias[part]
        more, some = checkpoint(piece, rows, head.weight[part], bias, use_reentrant=False)
        result, sums = result + more, sums + some
    return result - sums.unsqueeze(-1) * sums.unsqueeze(-2) / vocab if centred else result


def _plain_head(llm: Any) -> LinearHead:
    head = llm.linear_head()
    if head is None:
        raise ZooError(
            "Relations of image tokens need a vocabulary projection that is a plain linear layer; here it has a hook "
            "or an adapter. Set relation_weight=0, or leave the projection out of the adapter's targets."
        )
    return head
