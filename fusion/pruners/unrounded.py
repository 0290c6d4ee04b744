"""Shared by pruners that compare image tokens: products of float32 stay float32 where a model runs under autocast."""

import torch
from torch import Tensor


def unrounded(like: Tensor) -> torch.autocast:
    """Leave autocast for a while, on the device of a tensor: it would round the products to 16 bits.

    Tokens that are nearly alike are then equally so, and what stays of an image depends on the number format.
    """
    return torch.autocast("cpu" if like.is_meta else like.device.type, enabled=False)  # it has no meta device
