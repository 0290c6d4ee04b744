"""Frozen float32 weights in 16 bits, for the products of a stage in bf16.

Autocast rounds a float32 weight to bfloat16 in every product. It remembers the result for weights that require a
gradient alone: a frozen language model is rounded anew in each pass. Here linear layers get rounded copies once, and
compute from them what they computed before, bit for bit.

In a pass with gradients the layers that a gradient goes through hold such copies anyway, until backward. Where
activations are recomputed they do not, and memory counts: no copies are made then, nor for compiled layers.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.fusion.attach import compute_by, compute_itself, stands_aside


class ShortLinear:
    """A frozen linear layer that computes from a copy in bfloat16 where autocast is on."""

    def __init__(self, linear: nn.Linear) -> None:
        self.linear, self.short = linear, linear.weight.detach().to(torch.bfloat16)
        self.state = self._state()

    def _state(self) -> tuple[int, int]:
        return self.linear.weight.data_ptr(), self.linear.weight._version

    def refresh(self) -> None:
        """Round the weight again if it changed."""
        if self._state() != self.state:
            self.short, self.state = self.linear.weight.detach().to(torch.bfloat16), self._state()

    def forward(self, x: Tensor) -> Tensor:
        device, weight = x.device.type, self.linear.weight
        if weight.requires_grad or device == "meta" or not torch.is_autocast_enabled(device):
            return F.linear(x, weight, self.linear.bias)
        if torch.get_autocast_dtype(device) != torch.bfloat16:
            return F.linear(x, weight, self.linear.bias)
        self.refresh()  # a copy of the model has weights of its own
        return F.linear(x, self.short, self.linear.bias)


class ShortWeights:
    """The copies of a stage: made ahead of its first step, behind all that a stage changes as it begins.

    Args:
        model: composed, without copies of an earlier stage.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.layers: list[ShortLinear] | None = None  # None: not made yet

    def ready(self) -> None:
        """Make the copies, or those anew whose weights changed. Called ahead of each step."""
        if self.layers is None:
            self.layers = [ShortLinear(module) for module in self.model.modules() if _is_frozen(module)]
            for layer in self.layers:
                compute_by(layer.linear, layer.forward)
        for layer in self.layers:
            layer.refresh()


def release(model: Any) -> None:
    """Leave the layers of a model as they were without copies."""
    for module in model.modules():
        if isinstance(getattr(module.__dict__.get("forward"), "__self__", None), ShortLinear):
            compute_itself(module)  # of a copied model too, whose layers are others


def _is_frozen(module: nn.Module) -> bool:
    if type(module) is not nn.Linear or stands_aside(module):
        return False
    return module.weight.dtype == torch.float32 and not module.weight.requires_grad
