"""Run by test_idle_experts in two processes: adapters, where experts or generators stay idle.

Each process takes its rows, gradients are averaged, and compared with those of one process on all rows: with DDP, and
with parameters that torch's `fully_shard` keeps in halves.
"""

import gc
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from tests.fusion_builders import SMALL, VOCAB, features, peft_node, tiny_llm
from zoo import registry
from zoo.registry.forward_pass import running


class Both(nn.Module):
    """A language model and its adapter, as one module."""

    def __init__(self, model_type: str, node: dict[str, Any]) -> None:
        super().__init__()
        self.llm = tiny_llm(model_type).requires_grad_(False)
        torch.manual_seed(1)
        self.adapter = registry.build("adapter", node, llm=self.llm, vision_dim=24, grid=(4, 4))
        self.adapter.attach()
        with torch.no_grad():
            for p in self.adapter.parameters():
                p.add_(0.1 * torch.randn_like(p))
            for layer in getattr(self.adapter, "layers", {}).values():
                if hasattr(layer, "router"):
                    layer.router.bias[0] = -100.0  # expert 0 is idle everywhere
        self.train()

    def forward(self, ids: torch.Tensor, images: list[int]) -> torch.Tensor:
        with running():
            self.adapter.condition(features(m=1) if sum(images) else None, images)
            hidden = self.llm.hidden(inputs_embeds=self.llm.embed(ids)).last_hidden_state
            return hidden.sin().sum() + 0.0 * sum(self.adapter.aux_losses().values())


def grads(module: nn.Module) -> dict[str, torch.Tensor]:
    """Gradients of the adapter by name, whole."""
    found = {}
    for name, p in module.named_parameters():
        if p.requires_grad:
            assert p.grad is not None, name
            whole = p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
            found[name.removeprefix("module.")] = whole
    return found


def main() -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    ids = torch.randint(0, VOCAB, (2, 24), generator=torch.Generator().manual_seed(0))
    images = [1, 0]  # the second process has nothing for a guarded expert, and nothing to make weights of
    cases = [
        ("llama", {"name": "mole", "rank": 4, "dropout": 0.0}),
        ("llama", {"name": "mole", "rank": 4, "dropout": 0.0, "gate": "prob", "balance": 0.0}),
        ("mixtral", {"name": "moextend", "layers": [0], "guard": True}),
        ("llama", {"name": "vlora", **SMALL["vlora"]}),
        ("llama", {"name": "peft", **peft_node("dora")}),
        ("llama", {"name": "peft", **peft_node("loha")}),
    ]
    for model_type, node in cases:
        alone = Both(model_type, node)
        alone(ids, images).backward()
        wanted = grads(alone)
        mine: tuple[Any, ...] = (ids[rank : rank + 1], images[rank : rank + 1])
        ddp = DistributedDataParallel(Both(model_type, node))
        sharded = Both(model_type, node)
        mesh = init_device_mesh("cpu", (2,))
        for layer in sharded.llm.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(sharded, mesh=mesh)
        for module in (ddp, sharded):
            module(*mine).backward()
            for name, grad in grads(module).items():
                close = torch.allclose(2 * grad, wanted[name], atol=1e-4 * max(1.0, float(wanted[name].abs().max())))
                assert close, (node, type(module).__name__, name)
    if rank == 0:
        print("all as one process")
    del alone, ddp, sharded
    gc.collect()
    dist.barrier()
    dist.destroy_process_group()
