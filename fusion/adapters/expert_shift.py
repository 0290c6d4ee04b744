"""Which layers of a mixture of experts a new modality shifts most: where MoExtend adds experts, and copies of which.

Paper: Zhong et al., arXiv:2408.03511. The routers of a copy of the model are tuned for a while on the new data; per
layer, f and f' are the shares of choices that each expert gets before and after. The layers whose difference f' - f has
the largest standard deviation are extended, from the expert with the largest f'.

Where we differ from the release: it counts the two least likely experts of each token; we count those that ran.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from zoo.fusion.adapters.moextend import expert_blocks
from zoo.fusion.adapters.routing_trace import Passes, never
from zoo.registry import ZooError


@contextmanager
def counted(llm: Any) -> Iterator[dict[int, Tensor]]:
    """Count the choices of each expert while language-model passes run; padding does not count.

    Yields:
        Layer -> (E,) counts, filled as passes run.
    """
    blocks = expert_blocks(llm)
    if not blocks:
        raise ZooError("There are no experts to count: no layer of the LLM is a mixture of experts.")
    passes = Passes(llm, never, "counted")
    counts = {i: torch.zeros(block.gate.weight.shape[0], dtype=torch.long) for i, block in blocks.items()}
    undo = passes.attach()

    def watch(i: int) -> Any:
        def hook(gate: Any, args: Any, out: tuple[Tensor, Tensor, Tensor]) -> None:
            chosen = out[2]
            keep = passes.keep_of(i)
            chosen = chosen if keep is None else chosen[keep]
            counts[i] += torch.bincount(chosen.flatten().cpu(), minlength=len(counts[i]))[: len(counts[i])]

        return hook

    undo += [block.gate.register_forward_hook(watch(i)).remove for i, block in blocks.items()]
    try:
        yield counts
    finally:
        for step in undo:
            step()


def select(before: dict[int, Tensor], after: dict[int, Tensor], share: float = 0.5) -> tuple[list[int], list[int]]:
    """Choose layers and the experts to copy.

    Args:
        before, after: layer -> (E,) counts of choices, of the model and of its router-tuned copy.
        share: of the layers, in (0, 1]; rounded down.

    Returns:
        Layers, ascending, and for each the expert that the tuned copy chose most.

    Raises:
        ZooError: the models have no such layers in common, or nothing was counted in one of them.
    """
    if before.keys() != after.keys():
        raise ZooError("The two models do not have experts in the same layers.")
    if not 0 < share <= 1 or int(len(before) * share) < 1:
        raise ZooError(f"share must be in (0, 1] and leave a layer of {len(before)}, got {share}.")
    for i in before:
        if before[i].shape != after[i].shape:
            raise ZooError(f"Layer {i} has {len(before[i])} experts in the first model, {len(after[i])} in the second.")
        for which, counts in (("first", before[i]), ("second", after[i])):
            if counts.sum() <= 0 or (counts < 0).any():
                raise ZooError(
                    f"No choice of an expert was counted in layer {i} of the {which} model (counts {counts.tolist()}): "
                    "run both on the data before layers are selected."
                )
    shares = {i: (before[i] / before[i].sum(), after[i] / after[i].sum()) for i in before}
    shift = {i: float((new - old).double().std()) for i, (old, new) in shares.items()}  # ddof = 1
    layers = sorted(sorted(shift, key=lambda i: (-shift[i], i))[: int(len(shift) * share)])
    return layers, [int(after[i].argmax()) for i in layers]
