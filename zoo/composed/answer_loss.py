"""Cross-entropy of the answers, with the vocabulary projection only where there is a label."""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from zoo.registry import IGNORE_INDEX

LOGITS_AT_ONCE = 1 << 26  # elements of a logit chunk; above this the loss recomputes chunk by chunk in backward


def answer_loss(
    llm: Any, hidden: Tensor, labels: Tensor, num_labels: Tensor | float | None = None, *, compiled: bool = False
) -> Tensor:
    """Average the cross-entropy of each next token over the labels.

    Args:
        llm: the language model, for its vocabulary projection.
        hidden: (B, T, C), output of the decoder before that projection.
        labels: (B, T), not shifted; IGNORE_INDEX where no target is.
        num_labels: divisor of the sum; None: the labels of this batch.
        compiled: run the projection and the loss as one compiled function.
    """
    shifted = labels[:, 1:]
    where = shifted != IGNORE_INDEX  # (B, T - 1)
    rows, wanted = hidden[:, :-1][where], shifted[where]  # (S, C), (S,)
    if not len(wanted):
        return hidden.sum() * 0.0  # nothing to learn in this batch: a loss that still reaches every parameter
    chunk = max(1, LOGITS_AT_ONCE // llm.vocab_size)
    summed = compiled_sum() if compiled else summed_loss
    if len(wanted) <= chunk:
        total = summed(llm, rows, wanted)
    else:
        pairs = zip(rows.split(chunk), wanted.split(chunk), strict=True)
        total = torch.stack([checkpoint(summed, llm, r, w, use_reentrant=False) for r, w in pairs]).sum()
    return total / (len(wanted) if num_labels is None else num_labels)


def summed_loss(llm: Any, hidden: Tensor, target: Tensor) -> Tensor:
    """Sum the cross-entropies of `target` (S,) after `hidden` (S, C)."""
    return F.cross_entropy(llm.head(hidden).float(), target, reduction="sum")


@cache
def compiled_sum() -> Callable[[Any, Tensor, Tensor], Tensor]:
    """Compile `summed_loss`, once for all models."""
    return torch.compile(summed_loss)
