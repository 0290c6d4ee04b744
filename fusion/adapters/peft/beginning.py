"""What PiSSA, OLoRA and CorDA begin with, which PEFT takes out of the base weights, as a term that is subtracted."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Beginning(nn.Module):
    """The term -scale B0 A0 x of a layer of LoRA, which cancels the one that it starts with.

    Args:
        layer: of PEFT.
        name: of the set of weights.
    """

    A: Tensor  # (R, I)
    B: Tensor  # (O, R)

    def __init__(self, layer: Any, name: str) -> None:
        super().__init__()
        self.name, self.scale, self.transposed = name, layer.scaling[name], layer.fan_in_fan_out
        self.register_buffer("A", layer.lora_A[name].weight.detach().clone())
        self.register_buffer("B", layer.lora_B[name].weight.detach().clone())

    def take(self, layer: Any) -> None:
        """Take the factors of the layer as they are now."""
        self.A.copy_(layer.lora_A[self.name].weight)
        self.B.copy_(layer.lora_B[self.name].weight)

    def forward(self, x: Tensor) -> Tensor:
        """Return the term of x: (..., I) -> (..., O)."""
        term = F.linear(F.linear(x.to(self.A.dtype), self.A), self.B)  # (..., O)
        return (term * -self.scale).to(x.dtype)

    def weight(self) -> Tensor:
        """The term as a weight, laid out as the base layer's."""
        full = self.scale * self.B @ self.A  # (O, I)
        return full.T if self.transposed else full


@contextmanager
def subtracted(beginnings: Mapping[str, Beginning], lm: Any, path: str) -> Iterator[None]:
    """Take the term at the start out of a layer's weight, which gets the trained one meanwhile; rounded once.

    Both are as large as the weight, and what was learnt is their difference: in 16 bits it would be lost in them.
    """
    if path not in beginnings:
        yield
        return
    weight: nn.Parameter = lm.get_submodule(path).get_base_layer().weight
    dtype = weight.dtype
    weight.data = weight.data.to(torch.promote_types(dtype, torch.float32)) - beginnings[path].weight()
    try:
        yield
    finally:
        weight.data = weight.data.to(dtype)
