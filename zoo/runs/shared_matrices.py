"""Each matrix of an optimiser step is worked on once: in one of the processes, which sends the others what they need.

Newton-Schulz mixes all rows and columns of a matrix, so its owner has to have it whole. Owners take turns over all
matrices of a step. What travels is bfloat16, as what the iteration computes in.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Work = Callable[[Tensor], Tensor]  # matrices (n, rows, columns) in bfloat16 -> the same


def worked_on(matrices: Sequence[Tensor], work: Work, first: int = 0) -> list[Tensor]:
    """Apply `work` to matrices of one shape; returns the whole of each, or this process's share of a sharded one.

    Collective where matrices are sharded, or the same in several processes: all of these call it alike.

    Args:
        matrices: (rows, columns) each; plain and then the same in every process, or sharded over its rows.
        work: what is computed of each.
        first: number of matrices before these in the step: owners take turns over all.
    """
    group = _group_of(matrices[0])
    if group is None:
        return list(work(torch.stack([_whole(m) for m in matrices]).to(torch.bfloat16)).unbind())
    shares: Any = [m.to_local() if hasattr(m, "to_local") else m for m in matrices]
    stack = torch.stack(shares).to(torch.bfloat16)  # (n, own rows, columns)
    if hasattr(matrices[0], "to_local"):
        return list(_exchanged(stack, matrices[0].shape[0], work, first, group).unbind())
    return list(_gathered(stack, work, first, group).unbind())


def _group_of(matrix: Any) -> Any:
    """Return the processes that divide the work; None: this one alone, or shards of something else than rows."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return None
    if not hasattr(matrix, "to_local"):
        return torch.distributed.group.WORLD if torch.distributed.get_world_size() > 1 else None
    shards = [(i, p) for i, p in enumerate(matrix.placements) if not p.is_replicate()]
    if len(shards) != 1 or not shards[0][1].is_shard(0):
        return None
    group = matrix.device_mesh.get_group(shards[0][0])
    return group if torch.distributed.get_world_size(group) > 1 else None


def _exchanged(stack: Tensor, rows: int, work: Work, first: int, group: Any) -> Tensor:
    """Send shares to the owners of matrices, work, and send each process its share of the results.

    Args:
        stack: (n, own rows, columns).
        rows: of a whole matrix.
    """
    count, height, columns = stack.shape
    owned, rank = _owned(count, first, group)
    order = [i for some in owned for i in some]
    heights = [len(c) for c in _chunks(rows, len(owned))]
    mine = len(owned[rank])
    out = [len(some) * height * columns for some in owned]  # to each owner, and back
    into = [mine * h * columns for h in heights]  # from each process, and back
    pieces = _sent(stack[order].flatten(), out, into, group).split(into)
    whole = torch.cat([p.view(mine, h, columns) for p, h in zip(pieces, heights, strict=True)], 1)
    done = work(whole)  # (mine, rows, columns)
    back = torch.cat([part.flatten() for part in done.split(heights, 1)])
    result = torch.empty_like(stack)
    result[order] = _sent(back, into, out, group).view(count, height, columns)
    return result


def _gathered(stack: Tensor, work: Work, first: int, group: Any) -> Tensor:
    """Work on the matrices that this process owns, and send the results to all: (n, rows, columns)."""
    owned, rank = _owned(len(stack), first, group)
    most = max(map(len, owned))
    done = stack.new_zeros(most, *stack.shape[1:])
    done[: len(owned[rank])] = work(stack[owned[rank]])
    everything = stack.new_empty(len(owned) * most, *stack.shape[1:])
    torch.distributed.all_gather_into_tensor(_bytes(everything), _bytes(done), group=group)
    result = torch.empty_like(stack)
    for some, part in zip(owned, everything.split(most), strict=True):
        result[some] = part[: len(some)]
    return result


def _owned(count: int, first: int, group: Any) -> tuple[list[list[int]], int]:
    """Return the matrices of each process, and which process this is."""
    world = torch.distributed.get_world_size(group)
    return [[i for i in range(count) if (first + i) % world == rank] for rank in range(world)], group.rank()


def _chunks(rows: int, world: int) -> list[range]:
    """Return the rows of each process, as `Shard(0)` divides them."""
    size = -(-rows // world)
    return [range(min(rows, rank * size), min(rows, (rank + 1) * size)) for rank in range(world)]


def _sent(values: Tensor, out: list[int], into: list[int], group: Any) -> Tensor:
    """Exchange values: `out` of them to each process, `into` from each."""
    got = values.new_empty(sum(into))
    width = values.element_size()
    sizes = ([width * n for n in into], [width * n for n in out])
    torch.distributed.all_to_all_single(_bytes(got), _bytes(values.contiguous()), *sizes, group=group)
    return got


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.view(torch.uint8)  # every backend sends these


def _whole(tensor: Any) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
