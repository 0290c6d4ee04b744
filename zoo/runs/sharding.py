"""FSDP2: each process holds a share of the model, gathered layer by layer, by torch's `fully_shard`.

A decoder layer is a unit: its weights are gathered when it runs and shared out again behind it. All else (embedding,
head, encoder, projector, adapters beside the layers) is the root, gathered once for a pass: what runs or does not run
in it, and how often, may depend on the batch of a process, and a unit that one process gathers and another does not
would leave both waiting.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from zoo.registry import ZooError
from zoo.runs.tensor_parallel import MESH, divide, tensor_size
from zoo.settings.parallel import ParallelConfig
from zoo.storage.streamed import streamed


def is_sharded(model: nn.Module) -> bool:
    """Whether a model's weights are shared out over processes."""
    return hasattr(model, "set_requires_gradient_sync")


def gathers_short(parallel: ParallelConfig, precisions: Iterable[str]) -> bool:
    """Whether layers are gathered in bfloat16.

    Args:
        parallel: of the run.
        precisions: of the products of all stages, fp32 or bf16: a model is shared out once.

    Raises:
        ZooError: bfloat16 is asked for beside products in float32.
    """
    wide = "fp32" in set(precisions)
    if parallel.gather == "bf16" and wide:
        raise ZooError(
            "parallel.gather=bf16 gathers weights for products in bf16, and a stage has precision=fp32: set "
            "precision=bf16, or parallel.gather=auto."
        )
    return parallel.gather != "fp32" and not wide


def shard(accelerator: Any, model: Any, parallel: ParallelConfig, *, short: bool = False) -> None:
    """Share a model's weights out over the processes, in place; one that is shared out stays as it is.

    Args:
        accelerator: of the run, with the plugin that the launcher or `start_accelerator` made.
        model: composed, whole, on the CPU, with most of its values still in files: each process reads its own. Its
            parameters are replaced by sharded ones.
        parallel: of the run.
        short: gather layers in bfloat16. Weights that are stored in float32 (masters) stay so in their shards.
    """
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard

    if is_sharded(model):
        return
    plugin = accelerator.state.fsdp_plugin
    reduce = torch.bfloat16 if parallel.reduce == "bf16" else torch.float32
    layer = MixedPrecisionPolicy(param_dtype=torch.bfloat16 if short else None, reduce_dtype=reduce)
    # The root computes under autocast, as without shards: norms and routers keep float32 weights.
    root = MixedPrecisionPolicy(reduce_dtype=reduce, cast_forward_inputs=False)
    options = {"mesh": mesh_of(accelerator), "offload_policy": plugin.cpu_offload}
    offloaded = isinstance(plugin.cpu_offload, CPUOffloadPolicy)
    with streamed(model, torch.device("cpu") if offloaded else accelerator.device):
        if tensor_size(accelerator) > 1:
            divide(model.llm, accelerator.torch_device_mesh[MESH[-1]])
        for unit in model.llm.layers:
            fully_shard(unit, mp_policy=layer, reshard_after_forward=plugin.reshard_after_forward, **options)
        fully_shard(model, mp_policy=root, **options)


def may_share(teacher: Mapping[str, Any]) -> bool:
    """Whether a teacher of these options is shared out beside a student that is."""
    return bool(teacher["shard"]) and not teacher["bits"] and not teacher["device"]


def shard_layers(accelerator: Any, teacher: Any) -> None:
    """Share the decoder layers of a frozen model out over the processes, in the number format that they have.

    All else stays whole: a student may use the same encoder.
    """
    from torch.distributed.fsdp import fully_shard

    mesh = mesh_of(accelerator)
    teacher.requires_grad_(False)
    for layer in teacher.llm.layers:
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)


def shard_like(module: nn.Module, accelerator: Any) -> None:
    """Share a distiller out over the processes that share the model, so that its gradients are averaged too."""
    from torch.distributed.fsdp import fully_shard

    # A distiller that continues from the previous stage is shared out already.
    if any(not hasattr(p, "device_mesh") for p in module.parameters()):
        fully_shard(module, mesh=mesh_of(accelerator))


@contextmanager
def gathered(accelerator: Any, model: nn.Module) -> Iterator[bool]:
    """Hold whole weights in each process, so that each may run the model as often as it likes; False: it may not.

    Then they do not fit, or processes share layers, and all have to run the same passes, together: what is outside of
    the decoder layers is held all the same, since an answer runs parts of it by themselves. A model that is not shared
    out is whole.
    """
    from torch.distributed.fsdp import FSDPModule

    units: list[Any] = [m for m in model.modules() if isinstance(m, FSDPModule)]
    fits = not units or _fits(accelerator, model)
    held: list[Any] = units if fits else [model]
    for unit in held:
        unit.set_reshard_after_forward(False, recurse=False)
        unit.unshard()
    try:
        yield fits and tensor_size(accelerator) == 1
    finally:
        for unit in held:
            unit.set_reshard_after_forward(
                unit is not model and accelerator.state.fsdp_plugin.reshard_after_forward, recurse=False
            )
            unit.reshard()


def _fits(accelerator: Any, model: nn.Module) -> bool:
    """Whether whole weights fit beside all else on the device of every process."""
    if accelerator.device.type != "cuda":
        return True
    free = torch.cuda.mem_get_info(accelerator.device)[0] + torch.cuda.memory_reserved(accelerator.device)
    free -= torch.cuda.memory_allocated(accelerator.device)
    least = torch.tensor(free, device=accelerator.device)
    torch.distributed.all_reduce(least, torch.distributed.ReduceOp.MIN)
    return sum(p.numel() * p.element_size() for p in model.parameters()) < 0.8 * int(least)


def mesh_of(accelerator: Any) -> Any:
    """Return the mesh of processes that shares are spread over."""
    from torch.distributed.device_mesh import init_device_mesh

    if (mesh := accelerator.torch_device_mesh) is not None:
        return mesh[MESH[:2]] if mesh[MESH[0]].size() > 1 else mesh[MESH[1]]
    return init_device_mesh(accelerator.device.type, (accelerator.num_processes,))


def require_one_format(model: nn.Module) -> None:
    """Refuse weights that train in several number formats, which FSDP2 cannot reduce together."""
    found = {str(p.dtype).removeprefix("torch."): name for name, p in model.named_parameters() if p.requires_grad}
    if len(found) > 1:
        which = ", ".join(f"{name} in {dtype}" for dtype, name in sorted(found.items()))
        raise ZooError(
            f"FSDP2 reduces gradients of one number format, and weights of several train: {which}. Set "
            "master_weights=fp32, so that all that train are float32."
        )
