"""Products of a mixture's experts, where torch's grouped kernel takes them and where it does not.

transformers multiplies all experts at once (`grouped_mm`) wherever torch has such a kernel, without asking whether the
kernel takes these rows. It wants 16 or 32 bit numbers and rows that begin at multiples of 16 bytes, and on the meta
device it refuses float32 (torch 2.14): the error is torch's own, from deep inside. `zoo_grouped` asks first.
"""

import math
from typing import Any, cast

import torch
from torch import Tensor, nn

GROUPED = "grouped_mm"  # what transformers calls them, and takes where nothing else was asked for
ZOO_GROUPED = "zoo_grouped"

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def use_zoo_grouped(lm: Any) -> None:
    """Let a transformers model whose experts would run as `grouped_mm` run them as `zoo_grouped`."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    if getattr(lm.config, "_experts_implementation", None) == GROUPED:
        ALL_EXPERTS_FUNCTIONS.register(ZOO_GROUPED, zoo_grouped)
        lm.set_experts_implementation(ZOO_GROUPED)


def zoo_grouped(experts: Any, hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    """Run experts at once where a kernel takes them, else one after another; the same up to rounding.

    Args:
        experts: of a layer, as transformers builds them: their matrices in stacks (E, O, I).
        hidden: tokens (S, C).
        chosen: which experts a token goes to (S, k).
        weights: of their answers (S, k).

    Returns:
        Answers (S, C).
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
    """The experts of a transformers model as they take index m, one past the last, for another device's expert.

    It is how transformers leaves rows out of its products. The experts themselves are not told, not even for a call,
    since other threads may be in one: this is a second object that holds all that they hold.
    """
    made = object.__new__(type(experts))
    made.__dict__.update(experts.__dict__, _is_expert_parallel=True)
    return made
