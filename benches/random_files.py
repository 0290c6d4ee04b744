"""Checkpoints of any size with random weights, written tensor by tensor: the model is never in memory."""

import json
import math
from collections.abc import Mapping
from pathlib import Path

import torch

_BLOCK = 1 << 22  # numbers drawn; longer tensors repeat them
_NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


def write_random(shapes: Mapping[str, tuple[int, ...]], file: Path, dtype: torch.dtype) -> int:
    """Write a safetensors file: matrices of normal numbers, biases of zeros, other vectors of ones.

    Args:
        shapes: by name.
        file: to write.
        dtype: of all tensors.

    Returns:
        The bytes of the weights.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    content = json.dumps(header).encode()
    content += b" " * (-len(content) % 8)
    block = (torch.randn(_BLOCK, generator=torch.Generator().manual_seed(0)) * 0.02).to(dtype)
    with file.open("wb") as stream:
        stream.write(len(content).to_bytes(8, "little") + content)
        for name, shape in shapes.items():
            left = math.prod(shape)
            value = 0.0 if name.endswith("bias") else 1.0
            part = block if len(shape) > 1 else torch.full((left,), value, dtype=dtype)
            while left > 0:
                piece = part[: min(left, len(part))]
                stream.write(piece.view(torch.uint8).numpy().data)
                left -= len(piece)
    return end
