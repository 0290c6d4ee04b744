"""Run the experts of a mixture by torch's grouped kernel where it supports their sizes, else by the family's own loop.

transformers multiplies all experts at once (`grouped_mm`) wherever torch has such a kernel, without asking whether the
kernel takes these rows. It wants 16 or 32 bit numbers and rows that begin at multiples of 16 bytes, and on the meta
device it refuses float32 (torch 2.14): the error is torch's own, from deep inside. `zoo_grouped` asks first.
"""

import math
from typing import Any, cast

import torch
from torch import Tensor, nn

GROUPED = "grouped_mm"  # transformers' name of the kernel, and its default
ZOO_GROUPED = "zoo_grouped"

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def use_zoo_grouped(lm: Any) -> None:
    """Switch a transformers model from `grouped_mm` to `zoo_grouped`; other choices stay."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    if getattr(lm.config, "_experts_implementation", None) == GROUPED:
        ALL_EXPERTS_FUNCTIONS.register(ZOO_GROUPED, zoo_grouped)
        lm.set_experts_implementation(ZOO_GROUPED)


def zoo_grouped(experts: Any, hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    """Run experts at once where a kernel takes them, else one after another; the same up to rounding.

    Args:
        experts: of a layer, as transformers builds them: their matrices in stacks (E, O, I).
        hidden: tokens (S, C).
        chosen: expert indices of each token (S, k).
        weights: of the experts' outputs (S, k).

    Returns:
        Weighted sums of expert outputs (S, C).
    """
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    if takes_grouped(experts):
        run = ALL_EXPERTS_FUNCTIONS[GROUPED]
    elif hidden.is_meta:  # shapes alone, and nothing that reads which expert was chosen
        run = ALL_EXPERTS_FUNCTIONS["batched_mm"]
    else:
        run = cast(Any, type(experts).forward).__wrapped__  # the family's own loop, its "eager" implementation
    return run(experts, hidden, chosen, weights)


def takes_grouped(experts: nn.Module) -> bool:
    """Whether torch's grouped product takes these experts' matrices, forward and backward."""
    stacks = [p for p in experts.parameters() if p.dim() == 3]
    sizes = math.gcd(*(size for p in stacks for size in p.shape[1:]))
    return all(p.dtype in _DTYPES and not p.is_meta and sizes * p.element_size() % 16 == 0 for p in stacks)


def skipping(experts: Any) -> Any:
    """Return a view of a transformers model's experts that skips rows routed to index m, one past the last.

    This is how expert parallelism marks rows of another rank. The flag is set on a second object with the same
    parameters, since other threads may be running the experts themselves.
    """
    made = object.__new__(type(experts))
    made.__dict__.update(experts.__dict__, _is_expert_parallel=True)
    return made
