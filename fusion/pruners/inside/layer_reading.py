"""Queries and keys of the layer behind a cut, at its input before anything is dropped.

The layer's own forward runs as far as its attention function, where `attention_tap` ends it. So the input norm, biases,
norms of queries and keys, rotary tables and fused projections are the family's own, and adapters on the projections
act. It is given no cache, and nothing in it changes.

Only rows with a vote need queries, and no row needs values. Where a family has linear layers q_proj and v_proj, their
products are left out for the other rows; elsewhere they are computed and not used.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from zoo.fusion.pruners.inside.attention_tap import attention_of
from zoo.fusion.pruners.inside.layer_arguments import rows_of
from zoo.registry.versions import without_cache


class Reached(Exception):
    """Ends a layer's forward at its attention function, with what that was given."""

    def __init__(self, query: Tensor, key: Tensor, scaling: float | None, softcap: float | None) -> None:
        super().__init__("queries and keys are read")
        self.query, self.key, self.scaling, self.softcap = query, key, scaling, softcap


@torch.no_grad()
def read_layer(layer: nn.Module, name: str, given: Mapping[str, Any], voters: Tensor) -> Reached:
    """Return queries and keys of a tapped decoder layer.

    Args:
        layer: whose tap raises `Reached`.
        name: of the argument with the hidden states (B, L, C).
        given: its arguments by name, as long as these.
        voters: (V,) indices of rows that need a query.

    Returns:
        Query (B, H, L, d), 0 in other rows, and key (B, H_kv, L, d).
    """
    given = without_cache(given)
    hidden: Tensor = given[name]
    length = hidden.shape[1]
    if 2 * len(voters) > length or not {"q_proj", "k_proj"} <= _projections(layer).keys():
        return _run(layer, given, ("v_proj",))
    whole = _run(layer, given, ("q_proj", "v_proj"))
    index = voters.expand(len(hidden), -1)  # (B, V)
    few = {k: _at(v, index) if k in (name, "position_embeddings", "position_ids") else v for k, v in given.items()}
    part = _run(layer, few, ("k_proj", "v_proj"))
    query = torch.zeros_like(whole.query, memory_format=torch.contiguous_format)
    query[:, :, voters] = part.query.to(query.dtype)
    return Reached(query, whole.key, whole.scaling, whole.softcap)


def _run(layer: nn.Module, given: Mapping[str, Any], without: tuple[str, ...]) -> Reached:
    linear = _projections(layer)
    kind = next(layer.parameters()).device.type
    # A weight that autocast keeps in its cache while there are no gradients would get none in the layer itself.
    cast = torch.autocast(
        kind,
        dtype=torch.get_autocast_dtype(kind),
        enabled=torch.is_autocast_enabled(kind),
        cache_enabled=False,
    )
    with cast, _Without([linear[n].weight for n in without if n in linear]):
        try:
            layer.forward(**given)
        except Reached as found:
            return found
    raise AssertionError("the layer has no attention that is tapped")


def _projections(layer: nn.Module) -> dict[str, nn.Linear]:
    found = {n.rpartition(".")[2]: m for n, m in layer.named_modules() if isinstance(m, nn.Linear)}
    return {n: m for n, m in found.items() if n in ("q_proj", "k_proj", "v_proj")}


def reading_flops(layer: nn.Module, length: int, voters: int = 1) -> int:
    """Count the FLOPs of reading a decoder layer at `length` rows of a prompt, of which `voters` get a query."""
    linear = _projections(layer)
    if {"q_proj", "k_proj"} <= linear.keys():
        return 2 * (length * linear["k_proj"].weight.numel() + voters * linear["q_proj"].weight.numel())
    inside = [m for m in attention_of(layer).modules() if isinstance(m, nn.Linear)]
    return 2 * length * sum(m.weight.numel() for m in inside[:-1])  # the last is that of the output


class _Without(TorchFunctionMode):
    """Zeros in place of the products with some weights."""

    def __init__(self, weights: list[Tensor]) -> None:
        super().__init__()
        self.weights = weights

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear and len(args) > 1 and any(args[1] is w for w in self.weights):
            return args[0].new_zeros(()).expand(*args[0].shape[:-1], args[1].shape[0])
        return func(*args, **(kwargs or {}))


def _at(value: Any, index: Tensor) -> Any:
    if value is None:
        return None
    if isinstance(value, (tuple, list)):
        return tuple(rows_of(x, index) for x in value)
    return rows_of(value, index)
