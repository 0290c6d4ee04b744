"""Matrices whose first rows are a base's: only the others are saved, as `llm.lm.lm_head.weight[49152:]`.

An embedding that grew by a token has all rows of its checkpoint, and is most of a small language model.
"""

import re

import torch
from torch import Tensor

_NAME = re.compile(r"(.+)\[(\d+):\]")
_PIECE = 4096  # rows compared at once


def rows_behind(name: str, first: int) -> str:
    """Return the name of the rows of a matrix from `first` on."""
    return f"{name}[{first}:]"


def split(name: str) -> tuple[str, int]:
    """Return the name of a matrix and its first row that is meant: 0 for a whole tensor."""
    found = _NAME.fullmatch(name)
    return (found[1], int(found[2])) if found else (name, 0)


def rows_in_common(tensor: Tensor, base: Tensor) -> int:
    """Count the leading rows of a matrix (rows, columns) that loading `base` in its data type gives, to the bit."""
    if tensor.ndim != 2 or tensor.shape != base.shape or not tensor.is_floating_point():
        return 0
    bits = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    for start in range(0, len(tensor), _PIECE):
        piece = tensor[start : start + _PIECE].detach().cpu().contiguous()
        other = base[start : start + _PIECE].detach().to(device="cpu", dtype=piece.dtype).contiguous()
        equal = (piece.view(bits) == other.view(bits)).all(1)
        if not bool(equal.all()):
            return start + int(equal.int().argmin())
    return len(tensor)
