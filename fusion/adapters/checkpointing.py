"""Pass tensors into a layer under reentrant checkpointing without using them as arguments of the layer.

Reentrant checkpointing runs a nested backward per layer. It would traverse, and free, the graph behind a closed-over
tensor once for each layer that uses it. So the layer gets detached copies, which are leaves, and the gradients that
they accumulate are sent on to the originals when the layer's backward is over.
"""

from typing import Any

import torch
from torch import Tensor


def detach_through_checkpoint(hidden: Tensor, tensors: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Detach `tensors` from their graph for a layer whose input is `hidden`.

    Returns:
        A view of `hidden` to pass to the layer, and the detached copies. The gradient of that view arrives after the
        layer's nested backward, so the copies' gradients are complete then, and are passed on to `tensors`.
    """
    copies = [tensor.detach().requires_grad_(tensor.requires_grad) for tensor in tensors]
    return _DetachThroughCheckpoint.apply(copies, hidden, *tensors), copies


class _DetachThroughCheckpoint(torch.autograd.Function):
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
