"""Floating-point operations of a function, as torch counts them while it runs.

torch's counter knows an operation by a formula and counts 0 where it has none, without a word. Which ones it knows
differs between its versions: 2.14 has none for attention fused on a CPU, none has one for grouped products (mixtures
of experts). The formulas here hold on every version, and give what torch gives where it has its own.
"""

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

Shape = Sequence[int]


def count_flops(step: Callable[[], object]) -> int:
    """Count the operations of matrix products and attention in one call of `step`, backward included where it runs."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # one fused operation, which the counter does not know
    try:
        with flop_counter() as counter:
            step()
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    return counter.get_total_flops()


def flop_counter() -> FlopCounterMode:
    """Make torch's counter, with formulas for what some versions of it leave out; to be used by `with`."""
    return FlopCounterMode(display=False, custom_mapping=_FORMULAS)


def _attention(query: Shape, key: Shape, value: Shape, *args: Any, **kwargs: Any) -> int:
    """Two products: scores (B, H, T, S) over D, and their sum over values of width D'. No causal discount."""
    return 2 * prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


def _attention_backward(grad: Shape, query: Shape, key: Shape, value: Shape, *args: Any, **kwargs: Any) -> int:
    """Five products: the scores again, and the gradients of weights, values, queries and keys."""
    return 2 * prod(query[:-1]) * key[-2] * (3 * query[-1] + 2 * value[-1])


def _grouped(a: Shape, b: Shape, *args: Any, **kwargs: Any) -> int:
    """Rows (S, I) by matrices (E, I, O), or (I, S) by (S, O) in E slices: each row is multiplied once either way."""
    return 2 * prod(a) * b[-1]


_FORMULAS = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    torch.ops.aten._grouped_mm: _grouped,
}
