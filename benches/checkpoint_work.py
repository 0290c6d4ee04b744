"""What `zoo bench checkpoint` runs in each of several processes: saving, loading and resuming in shares."""

import hashlib
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from zoo.benches.peak import forget_peak, give_back, memory
from zoo.runs.processes import start_accelerator
from zoo.settings.parallel import ParallelConfig

SHARDED = ParallelConfig(shard="fsdp2")


def save(width: int, layers: int, rounds: int, root: str) -> dict[str, Any]:
    """Save a sharded model with its AdamW states by DCP alone, by ours, and by ours behind the training, in turns.

    Returns:
        Bytes of this process's share, and for each way seconds of the clock that the loop waits, seconds of the
        processor, and the most bytes beyond what was there.
    """
    import torch.distributed.checkpoint as dcp
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    from zoo.runs.checkpoint import tensors_of
    from zoo.runs.folder import RunFolder
    from zoo.runs.saving import Saver, content_of

    accelerator = start_accelerator("cpu")
    model: Any = nn.Sequential(*[nn.Linear(width, width, bias=False) for _ in range(layers)])
    mesh = init_device_mesh("cpu", (accelerator.num_processes,))
    for layer in [*model, model]:
        fully_shard(layer, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    model(torch.randn(2, width)).sum().backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    named = tensors_of(model)
    folder = RunFolder(Path(root) / "run")
    savers = {way: Saver(accelerator, folder, 1) for way in ("sync", "behind")}
    savers["sync"].behind = False
    step = 0

    def by_dcp() -> Callable[[], object]:
        content, _ = content_of(named, [optimizer])
        dcp.save(content, checkpoint_id=Path(root) / f"dcp-{step}")
        return lambda: None

    def by_ours(way: str) -> Callable[[], object]:
        savers[way].save(step, named, [optimizer], {})
        return savers[way].wait

    ways = {"dcp": by_dcp, "sync": lambda: by_ours("sync"), "behind": lambda: by_ours("behind")}
    found: dict[str, Any] = {way: [] for way in ways}
    memory_of: dict[str, int] = {}
    for number in range(rounds + 2):  # the first makes folders, groups and threads; the second is for memory
        for way, work in ways.items():
            step += 1
            if number == 1:
                give_back()  # a run on a CPU keeps freed memory (zoo.runs.allocator), which would hide what is taken
            torch.distributed.barrier()
            before, start, cpu = forget_peak(), time.perf_counter(), time.process_time()
            rest = work()
            torch.distributed.barrier()  # the loop goes on when all do
            seen = time.perf_counter() - start
            rest()
            peak = memory("VmHWM") - before
            if way == "dcp" and accelerator.is_main_process:
                shutil.rmtree(Path(root) / f"dcp-{step}")
            torch.distributed.barrier()
            if number == 1:
                memory_of[way] = peak
            elif number:
                found[way].append({"seen": seen, "cpu": time.process_time() - cpu})
    content, _ = content_of(named, [optimizer])
    own = sum(_local(t).nbytes for tensors in content.values() for t in tensors.values())
    return {"own": own, "extra": memory_of, **found}


def load(words: list[str]) -> dict[str, float]:
    """Build a model in shares, as a run does; returns the bytes of this process's share, and the peak beside it."""
    from torch.distributed.fsdp import fully_shard

    from zoo.loading.build import build
    from zoo.runs.sharding import mesh_of, shard
    from zoo.settings.config import compose
    from zoo.settings.source import source_of
    from zoo.storage.streamed import streamed

    accelerator = start_accelerator("cpu", SHARDED)
    source = source_of(compose("load", words), pretrained=False)

    def built() -> Any:
        torch.manual_seed(0)
        model, _ = build(source, device="cpu", masters=True)
        return model

    # What is imported, and what libraries keep of a first model, is not of its values, which stay in files here.
    built()
    small: Any = nn.Linear(8, 8)
    with streamed(small, accelerator.device):
        fully_shard(small, mesh=mesh_of(accelerator))
    before = forget_peak()
    model = built()
    shard(accelerator, model, SHARDED)
    peak = memory("VmHWM") - before
    tensors = {id(t): t for t in [*model.parameters(), *model.buffers()]}.values()
    fresh = sum(p.numel() * p.element_size() for n, p in model.named_parameters() if n.startswith("projector."))
    return {"own": float(sum(_local(t).nbytes for t in tensors)), "peak": float(peak), "fresh": float(fresh)}


def values(words: list[str]) -> dict[str, str]:
    """Build a model in the processes that there are; returns a hash of each of its weights, gathered."""
    from zoo.loading.build import build
    from zoo.runs.sharding import shard
    from zoo.settings.config import compose
    from zoo.settings.source import source_of
    from zoo.storage.weights import state_of

    accelerator = start_accelerator("cpu", SHARDED)
    torch.manual_seed(0)
    model, _ = build(source_of(compose("load", words), pretrained=False), device="cpu", masters=True)
    if accelerator.num_processes > 1:
        shard(accelerator, model, SHARDED)
    return {name: _digest(tensor) for name, tensor in state_of(model).items()}


def train(configs: str, words: list[str]) -> dict[str, Any]:
    """Train a run, or go on with one; returns the losses that it logged and a hash of each step's samples, in order."""
    from zoo.runs.folder import read_metrics
    from zoo.runs.processes import gather
    from zoo.settings.config import compose
    from zoo.training.loop import Run

    samples: dict[str, list[str]] = {}

    class Watched(Run):
        def _step(self, name: str, number: int, engine: Any, loader: Any, source: Any) -> None:
            item = next(source)
            batch = item["batch"]
            rows = [_digest(t) for t in batch["pixel_values"]]
            every = gather(self.accelerator, rows)
            samples[str(self.progress.global_step)] = [row for rows in every for row in rows]
            super()._step(name, number, engine, loader, iter([item]))

    with Watched(compose("train", words, configs)) as run:
        run.train()
    losses = {str(row["step"]): row["loss"] for row in read_metrics(run.folder.metrics) if "loss" in row}
    return {"losses": losses, "samples": samples}


def _digest(tensor: Tensor) -> str:
    flat: Any = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
    return hashlib.sha256(flat).hexdigest()[:16]


def _local(tensor: Any) -> Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor
