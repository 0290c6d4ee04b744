"""Shared by pruners of videos: how much tokens changed from one frame to another."""

from torch import Tensor
from torch.nn import functional as F

STILL = 1e-6  # smaller changes are what rounding makes of equal tokens


def unit(tokens: Tensor) -> Tensor:
    """Scale tokens (..., C) to length 1, in float32 and without a gradient; zeros stay."""
    return F.normalize(tokens.detach().float(), dim=-1, eps=1e-8)


def moved(cosine: Tensor, still: float = STILL) -> Tensor:
    """Turn cosines into changes, 0 where they are below `still`."""
    change = 1 - cosine
    return change.masked_fill(change < still, 0.0) if still else change
