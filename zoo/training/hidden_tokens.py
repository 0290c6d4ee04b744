"""Training with image tokens hidden at random (`stages.<stage>.keep_range`): the model learns to answer from some.

Uptraining as EVS has it (arXiv:2510.14624: stochastic pruning rates make a model robust to any rate): each row draws
the share of its image tokens that the LLM attends to. Hidden tokens stay in the sequence and are masked, so the number
of placeholders stays the same, and the result equals that of a pruner with `positions=kept`. A step costs as much as
one with all tokens.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def hide_image_tokens(attention_mask: Tensor, slots: Tensor, keep_range: Sequence[float]) -> Tensor:
    """Return the mask (B, T) without some of the image tokens; at least one is left in each row that has any.

    Draws from torch's CPU generator, which a run seeds by its step.

    Args:
        attention_mask: (B, T) 1 for valid tokens.
        slots: (B, T) bool, where image tokens are.
        keep_range: least and greatest share that is left, drawn evenly for each row.
    """
    lowest, highest = keep_range
    share = lowest + (highest - lowest) * torch.rand(len(slots), 1, device="cpu")  # (B, 1)
    key = torch.rand(slots.shape, device="cpu").to(slots.device).masked_fill(~slots, 2.0)
    rank = key.argsort(1).argsort(1)  # of each image token in its row; text comes behind them
    left = (share.to(slots.device) * slots.sum(1, keepdim=True)).round().clamp(min=1)
    return attention_mask.masked_fill(slots & (rank >= left), 0)
