"""Frozen float32 weights in 16 bits, for the products of a stage in bf16.

Autocast rounds a float32 weight to bfloat16 in every product. It remembers the result for weights that require a
gradient alone: a frozen language model is rounded anew in each pass, which takes 15 % of a step of SmolLM2-135M on
short rows. Here linear layers get rounded copies once, and compute from them what they computed before, bit for bit.

In a pass with gradients the layers that a gradient goes through hold such copies anyway, until backward. Where
activations are recomputed they do not, and memory counts: no copies are made then.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.fusion.attach import compute_by, stands_aside


class ShortLinear:
    """A frozen linear layer that computes from a copy in bfloat16 where autocast is on."""

    def __init__(self, linear: nn.Linear) -> None:
        self.linear, self.short = linear, linear.weight.detach().to(torch.bfloat16)

    def forward(self, x: Tensor) -> Tensor:
        device = x.device.type
        if torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.bfloat16:
            return F.linear(x, self.short, self.linear.bias)
        return F.linear(x, self.linear.weight, self.linear.bias)


def shorten(model: Any) -> Callable[[], None]:
    """Give the frozen float32 linear layers of a model copies in bfloat16; returns a function that takes them away.

    The weights must not change meanwhile.
    """
    undo = [
        compute_by(module, ShortLinear(module).forward)
        for module in model.modules()
        if type(module) is nn.Linear
        and module.weight.dtype == torch.float32
        and not module.weight.requires_grad
        and not stands_aside(module)
    ]

    def all_back() -> None:
        while undo:
            undo.pop()()

    return all_back
