"""Weight-only quantisation of a frozen model to 8 or 4 bits, products in the input's dtype: saves memory, not time.

Symmetric: 8 bits with a scale per row, 4 bits with a scale per group of 64 numbers of a row, two numbers in a byte.
Only the linear layers of the decoder; embeddings, norms and the vocabulary projection are not quantised.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.fusion.attach import move_hooks
from zoo.registry import ZooError

GROUP = 64  # numbers that share a scale at 4 bits
BITS = (8, 4)


class QuantizedLinear(nn.Module):
    """A linear layer whose weight is dequantised in each forward."""

    def __init__(self, linear: nn.Linear, bits: int) -> None:
        super().__init__()
        self.bits, self.shape = bits, tuple(linear.weight.shape)
        rows, columns = self.shape
        group = columns if bits == 8 else GROUP
        weight = F.pad(linear.weight.detach().float(), (0, -columns % group))  # (O, I), I a multiple of the group
        parts = weight.view(rows, -1, group)  # (O, groups, group)
        top = 2 ** (bits - 1) - 1
        scale = parts.abs().amax(-1, keepdim=True).clamp(min=1e-12) / top
        whole = (parts / scale).round_().to(torch.int8).view(rows, -1)
        if bits == 4:
            whole = (whole[:, ::2] & 15) | (whole[:, 1::2] << 4)
        self.register_buffer("weight_bits", whole.contiguous())
        self.register_buffer("scale", scale.squeeze(-1).to(linear.weight.dtype))
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """Multiply (..., I) to (..., O)."""
        return F.linear(x, self.weight_in(x.dtype), self.bias)

    @property
    def weight(self) -> Tensor:
        """The weight (O, I), dequantised: layers of PEFT read it of the layer that they have inside."""
        return self.weight_in(self.get_buffer("scale").dtype)

    def weight_in(self, dtype: torch.dtype) -> Tensor:
        """Return the weight (O, I), dequantised to a dtype."""
        bits, scale = self.get_buffer("weight_bits"), self.get_buffer("scale")
        if self.bits == 4:
            low = (bits << 4) >> 4  # int8: the shift back extends the sign of the low four bits
            bits = torch.stack([low, bits >> 4], -1).flatten(1)
        parts = bits.view(len(bits), scale.shape[1], -1).to(dtype) * scale.unsqueeze(-1).to(dtype)
        return parts.flatten(1)[:, : self.shape[1]]


def quantize(root: nn.Module, bits: int, keep: Callable[[str], bool] = lambda name: False) -> int:
    """Replace the linear layers below `root`, in place; returns the bytes saved.

    Hooks of adapters on a layer move to its replacement, so their terms are added to its output.

    Args:
        root: module whose linear layers are replaced.
        bits: 8 or 4.
        keep: whether the weight of a name is left as it is: those of adapters.

    Raises:
        ZooError: no such number of bits.
    """
    if bits not in BITS:
        raise ZooError(f"Weights can be held in 8 or 4 bits, got bits={bits}.")
    saved = 0
    for path, parent in list(root.named_modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear and not keep(f"{path}.{name}.weight"):
                small = QuantizedLinear(child, bits)
                move_hooks(child, small)
                buffers = sum(b.numel() * b.element_size() for b in small.buffers())
                saved += child.weight.numel() * child.weight.element_size() - buffers
                setattr(parent, name, small)
    return saved
