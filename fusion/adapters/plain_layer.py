"""Check that a feed-forward layer maps hidden states to hidden states, as adapters around the whole layer assume."""

import torch
from torch import Tensor, nn

from zoo.registry import ZooError


def require_plain(layer: nn.Module, width: int, who: str) -> None:
    """Refuse a layer that takes more than hidden states (BLOOM's residual) or returns more (GPT-OSS's router scores).

    The layer runs on the meta device, that is, while a composition is checked; other failures there are ignored.

    Args:
        layer: feed-forward layer of a language model.
        width: of the hidden states.
        who: the adapter around it, for messages.
    """
    first = next(layer.parameters(), None)
    if first is None or not first.is_meta:
        return
    try:
        with torch.no_grad():
            given = layer(torch.empty(1, 2, width, device="meta", dtype=first.dtype))  # (1, 2, C)
    except TypeError as error:
        if "required positional argument" in str(error):
            raise ZooError(f"{who} wraps {type(layer).__name__}, which takes more than hidden states.") from error
    except Exception:  # routing and kernels may need data
        return
    else:
        if not isinstance(given, Tensor):
            raise ZooError(f"{who} wraps {type(layer).__name__}, which returns more than hidden states.")
