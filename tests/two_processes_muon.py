"""Run by test_several_processes in both of two processes: Muon works on each matrix once, whole or sharded."""

import gc

import torch
import torch.distributed as dist
from torch import nn

from zoo.runs import optim, shared_matrices
from zoo.runs.checkpoint import shared_as

SHAPES = [(8, 6)] * 3 + [(7, 12), (3, 5), (1, 4)] + [(16, 4)] * 2  # uneven shares, and a process without rows


def steps(like=None) -> list[torch.Tensor]:
    """Whole weights behind three steps."""
    g = torch.Generator().manual_seed(0)
    share = (lambda t: t) if like is None else (lambda t: shared_as(t, like))
    params = [nn.Parameter(share(torch.randn(shape, generator=g))) for shape in SHAPES]
    muon = optim.StackedMuon([{"params": params[:5], "lr": 0.1}, {"params": params[5:], "lr": 0.05}])
    for _ in range(3):
        for p in params:
            p.grad = share(torch.randn(p.shape, generator=g))
        muon.step()
    return [shared_matrices._whole(p.detach()) for p in params]


def main() -> None:
    dist.init_process_group("gloo")
    worked, inner = [0], optim.orthogonalise

    def counted(stack, *args):
        worked[0] += len(stack)
        return inner(stack, *args)

    optim.orthogonalise = counted
    group_of, shared_matrices._group_of = shared_matrices._group_of, lambda matrix: None
    alone = steps()
    shared_matrices._group_of = group_of
    assert worked[0] == 3 * len(SHAPES)
    mesh = dist.init_device_mesh("cpu", (2,))
    like = dist.tensor.distribute_tensor(torch.zeros(4, 4), mesh, [dist.tensor.Shard(0)])
    for sharded in (None, like):
        worked[0] = 0
        found = steps(sharded)
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(found, alone, strict=True)), sharded
        assert worked[0] == 3 * len(SHAPES) // 2, "each process works on half of the matrices"
    gc.collect()
    dist.barrier()
    dist.destroy_process_group()
