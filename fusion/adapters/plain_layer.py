"""Whether a feed-forward layer is a function of hidden states alone, as parts that stand around it presume."""

import torch
from torch import Tensor, nn

from zoo.registry import ZooError


def require_plain(layer: nn.Module, width: int, who: str) -> None:
    """Refuse a layer that asks for more than hidden states (BLOOM's residual) or gives more (GPT-OSS's router scores).

    It is tried on the meta device, so where a composition is checked; what else fails there says nothing.

    Args:
        layer: of a language model, alone.
        width: of the hidden states.
        who: what messages call the part that stands around it.
    """
    first = next(layer.parameters(), None)
    if first is None or not first.is_meta:
        return
    try:
        with torch.no_grad():
            given = layer(torch.empty(1, 2, width, device="meta", dtype=first.dtype))  # (1, 2, C)
    except TypeError as error:
        if "required positional argument" in str(error):
            raise ZooError(
                f"{who} stands around {type(layer).__name__}, which takes more than hidden states."
            ) from error
    except Exception:  # routing and kernels may need data
        return
    else:
        if not isinstance(given, Tensor):
            raise ZooError(f"{who} stands around {type(layer).__name__}, which gives more than hidden states.")
