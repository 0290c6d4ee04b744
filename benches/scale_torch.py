"""torch's own estimate of what a device of many holds: its memory tracker of FSDP2, on tensors without numbers."""

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from zoo.checking import dry_run
from zoo.checking.memory import assumed_batch, set_up
from zoo.composed.masters import to_widen
from zoo.composed.outputs import LOSS_ALONE
from zoo.runs.sharding import shard
from zoo.runs.tensor_parallel import MESH
from zoo.settings.parallel import ParallelConfig
from zoo.storage.precision import autocast


@contextlib.contextmanager
def pretended(devices: int, tensor: int = 1) -> Iterator[Any]:
    """Be the first of many processes that exist only in torch's fake process group."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=devices)
    try:
        yield init_device_mesh("cpu", (1, devices // tensor, tensor), mesh_dim_names=MESH)
    finally:
        dist.destroy_process_group()


def by_torch(model: Any, stage: Any, plan: Any, devices: int, samples: int, tensor: int = 1) -> dict[str, int]:
    """Return bytes by torch's kinds and `Total`, at the largest moment of the second step.

    The model's parameters are replaced: it cannot be used again.

    Args:
        model: on the meta device, with the parameters that train set.
        stage, plan: as in `zoo.checking.devices.on_device`; AdamW, one pass a step.
        devices: that share the model by `zoo.runs.sharding`.
        samples: of a device's pass.
        tensor: devices that share each layer of the LLM.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
    from torch.distributed.fsdp import OffloadPolicy

    cpu = torch.device("cpu")
    batch = assumed_batch(stage, model, samples)
    set_up(model, stage, plan, torch.device("cuda"), stage.precision)
    wide = {id(p) for p in to_widen(model, stage.precision).values()}
    with pretended(devices, tensor) as mesh, FakeTensorMode(allow_non_fake_inputs=True):
        _fill(model, wide)
        batch = {
            k: dry_run._like(v) if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in batch.items()
        }
        plugin = SimpleNamespace(cpu_offload=OffloadPolicy(), reshard_after_forward=True)
        accelerator: Any = SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin), device=cpu)
        accelerator.torch_device_mesh = mesh
        shard(accelerator, model, ParallelConfig(shard="fsdp2"), short=stage.precision == "bf16")
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-4, foreach=False)
        tracker = FSDPMemTracker(model, optimizer)
        with tracker:
            for number in range(2):  # the first one makes the moments
                with dry_run._silent(), _Contents():
                    with autocast(stage.precision, cpu):
                        out = model(**batch, **LOSS_ALONE)
                    out.loss.backward()
                    del out
                    optimizer.step()
                    optimizer.zero_grad()
                if not number:
                    tracker.reset_mod_stats()
        found: dict[str, int] = {str(k): v for k, v in tracker.get_tracker_snapshot("peak")[cpu].items()}
    return found


def _fill(model: nn.Module, wide: set[int]) -> None:
    """Give a model fake parameters on the CPU, tied ones once, and buffers."""
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, p in list(module._parameters.items()):
            if p is not None:
                dtype = torch.float32 if id(p) in wide else p.dtype
                if id(p) not in made:
                    made[id(p)] = nn.Parameter(torch.empty(p.shape, dtype=dtype, device="cpu"), p.requires_grad)
                module._parameters[name] = made[id(p)]
        for name, buffer in list(module._buffers.items()):
            if buffer is not None:
                module._buffers[name] = dry_run._like(buffer)


class _Contents(torch.utils._python_dispatch.TorchDispatchMode):
    """Integers and masks have contents, as in `zoo.checking.dry_run`; bytes, as FSDP sends weights, have none."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        from torch.distributed.tensor import DTensor

        kwargs = kwargs or {}
        if any(t is DTensor for t in types):
            return NotImplemented
        if dry_run._is_real(func, args, kwargs):
            with dry_run.unset_fake_temporarily():
                return func(*args, **kwargs)
        if func.overloadpacket in dry_run._BY_MASK:
            args = (args[0], dry_run._indices(args[1]), *args[2:])
        return dry_run.tree_map(
            lambda x: x if getattr(x, "dtype", None) is torch.uint8 else dry_run._with_content(x),
            func(*args, **kwargs),
        )
