"""A linear layer with one term of LoRA: PEFT's, by a shorter way where that term alone acts.

In each pass PEFT finds out which sets of weights act, and casts the input of each to float32, which autocast casts back
beside the base's own cast. Here the term is computed from an input that is cast once, as PEFT computes it to the bit.
All else (merged, switched off, other sets of weights, other kinds of layers) is PEFT's own forward.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn


def shorten(layer: nn.Module, name: str) -> None:
    """Let a layer of PEFT without dropout take the shorter way.

    Its class becomes a subclass, which copies of the model have too. A hook in its place costs each call more than the
    cast: a module with one leaves torch's fast path.

    Args:
        layer: of PEFT, with a term of LoRA.
        name: of the set of weights.
    """
    kind: Any = type(layer)
    layer.__class__ = _shorter(kind, name)


@cache
def _shorter(theirs: Any, name: str) -> type:
    from peft.tuners.lora.layer import Linear

    one, plain = (name, [name]), theirs is Linear

    class Shorter(theirs):
        def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            cast = _autocasts(x)
            if cast:
                x = x.to(torch.get_autocast_dtype(x.device.type))
            if not plain or args or kwargs or self._disable_adapters or self.merged_adapters:
                return super().forward(x, *args, **kwargs)
            if self._active_adapter not in one or self.lora_variant:
                return super().forward(x)
            out = self.base_layer(x)
            down = self.lora_A[name]
            term = self.lora_B[name](down(x if cast else x.to(down.weight.dtype)))
            return (out + term * self.scaling[name]).to(out.dtype)

        def _cast_input_dtype(self, x: Any, dtype: torch.dtype) -> Any:
            return x if x is not None and _autocasts(x) else super()._cast_input_dtype(x, dtype)

        def __reduce_ex__(self, protocol: Any) -> Any:  # pickle finds no class of this name
            made: Any = super().__reduce_ex__(protocol)
            return _blank, (theirs, name), *made[2:]

    Shorter.__name__, Shorter.__qualname__, Shorter.__module__ = theirs.__name__, theirs.__qualname__, theirs.__module__
    return Shorter


def _blank(theirs: Any, name: str) -> Any:
    return object.__new__(_shorter(theirs, name))


def _autocasts(x: Tensor) -> bool:
    return (
        x.device.type != "meta"
        and torch.is_autocast_enabled(x.device.type)
        and x.dtype in (torch.float32, torch.bfloat16, torch.float16)
    )
