"""Tensors from outside into a layer that reentrant checkpointing runs.

The backward of such a layer is a backward of its own, which would walk into the graph behind a tensor from outside,
once for each layer that uses it. So the layer gets copies that are leaves, and hands on what they have gathered.
"""

from typing import Any

import torch
from torch import Tensor


def carry(hidden: Tensor, tensors: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Cut `tensors` off their graph for a layer whose input is `hidden`.

    Returns:
        What goes into the layer in place of `hidden`, and of `tensors`. The layer's backward is over, and the copies'
        gradients are full, when that of `hidden` comes: it sends them on.
    """
    copies = [tensor.detach().requires_grad_(tensor.requires_grad) for tensor in tensors]
    return _Carry.apply(copies, hidden, *tensors), copies


class _Carry(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, copies: list[Tensor], hidden: Tensor, *tensors: Tensor) -> Tensor:
        ctx.copies = copies
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        gathered = [copy.grad for copy in ctx.copies]
        for copy in ctx.copies:
            copy.grad = None
        return (None, grads[0], *gathered)
