"""Start in one process or several, and exchange values between them."""

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch

from zoo.registry import ZooError
from zoo.runs.launchers import USE_TORCHRUN, adopt_launcher
from zoo.runs.tensor_parallel import MESH
from zoo.runs.zero import ASKED, use_zero, zero_plugin
from zoo.settings.parallel import ParallelConfig

T = TypeVar("T")
# Modes of `accelerate launch` that the training loop does not support, by the variable that the launcher sets.
UNSUPPORTED = {
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "tensor or context parallelism",
}
# Variables of settings that belong to the config, by their prefix.
IGNORED = (
    "ACCELERATE_GRADIENT_",
    "ACCELERATE_MIXED_PRECISION",
    "ACCELERATE_DOWNCAST_BF16",
    "ACCELERATE_DYNAMO_",
    "ACCELERATE_FP8_",
)


@contextlib.contextmanager
def launcher_alone() -> Iterator[None]:
    """Hide variables of numerical settings from accelerate, which reads some of them at every call."""
    hidden = {name: os.environ.pop(name) for name in list(os.environ) if name.startswith(IGNORED)}
    try:
        yield
    finally:
        os.environ |= hidden


@contextlib.contextmanager
def _decided_here(name: str) -> Iterator[None]:
    """Hide a variable that accelerate reads beside its arguments, and sets for all that follow."""
    before = os.environ.pop(name, None)
    try:
        yield
    finally:
        os.environ.pop(name, None)
        os.environ |= {} if before is None else {name: before}


def start_accelerator(device: str = "auto", parallel: ParallelConfig | None = None) -> Any:
    """Make the accelerator of this process group, whether torchrun, accelerate, SLURM or MPI started it.

    The launcher sets devices and processes; the config sets accumulation, precision and compilation, stage by stage,
    regardless of `ACCELERATE_*` variables or of the state that another user of accelerate in this process (a
    transformers Trainer in bf16, say) left.

    Args:
        device: auto, cpu, cuda, ...
        parallel: how the processes share the model; None: whole copies, or as the launcher asks.

    Raises:
        ZooError: the processes of the launcher did not connect, it asks for an unsupported kind of parallelism, or the
            device does not exist.
    """
    from accelerate import Accelerator, DistributedDataParallelKwargs
    from accelerate.state import AcceleratorState

    for variable, what in UNSUPPORTED.items():
        if os.environ.get(variable, "").lower() in ("1", "true", "yes", "on"):
            raise ZooError(
                f"The launcher asks for {what} ({variable}={os.environ[variable]}); this loop runs on one process, "
                "DDP, FSDP2 or DeepSpeed. Choose one of them with `accelerate config`, or unset the variable."
            )
    place = adopt_launcher()
    cpu = torch.device(device).type == "cpu" if device != "auto" else not torch.cuda.is_available()
    if place is not None and not cpu and place.local_world > 1 and torch.cuda.device_count() == 1:
        os.environ.setdefault("ACCELERATE_TORCH_DEVICE", "cuda:0")  # the task was given one device, not all of the node
    plugin = _fsdp_plugin(parallel or ParallelConfig())
    with launcher_alone():
        zero = zero_plugin(parallel or ParallelConfig())
    ddp = DistributedDataParallelKwargs()  # `Engine` sets find_unused_parameters, stage by stage
    # accelerate keeps settings in a singleton; the process group, in PartialState, stays.
    AcceleratorState._reset_state(reset_partial_state=False)
    try:
        with launcher_alone(), _decided_here("ACCELERATE_USE_FSDP"), _decided_here(ASKED):
            accelerator = Accelerator(
                cpu=cpu, mixed_precision="no", kwargs_handlers=[ddp], fsdp_plugin=plugin, deepspeed_plugin=zero
            )
    except (ImportError, ValueError) as error:
        given = ", ".join(f"{k}={v}" for k, v in sorted(os.environ.items()) if k.startswith("ACCELERATE_"))
        raise ZooError(
            f"accelerate cannot start: {error}. The environment has {given or 'no ACCELERATE_*'}."
        ) from error
    wanted = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes != wanted:
        raise ZooError(
            f"The launcher started {wanted} processes, but this one is in a group of {accelerator.num_processes}. "
            f"On CPU use: {USE_TORCHRUN}"
        )
    if plugin is not None:
        _use_fsdp(accelerator, plugin, parallel or ParallelConfig())
    if zero is not None and accelerator.num_processes > 1:
        use_zero(accelerator, zero)
    if device != "auto":
        _use_device(accelerator, torch.device(device))
    return accelerator


def _use_device(accelerator: Any, device: torch.device) -> None:
    """Choose the device that was named: accelerate alone takes the first one, or that of a process by its number.

    Raises:
        ZooError: it is not there, or one device was named for several processes.
    """
    there = accelerator.device
    if there.type != device.type:
        raise ZooError(f"device={device} was asked for, but this process would run on {there.type}.")
    if device.type != "cuda" or device.index is None:
        return
    count = torch.cuda.device_count()
    if device.index >= count:
        raise ZooError(f"device={device} was asked for, and there are {count}, counted from cuda:0.")
    if accelerator.num_processes > 1 and count > 1:
        raise ZooError(
            f"device={device} is one device, and the launcher started {accelerator.num_processes} processes, each of "
            "which takes its own: set device=cuda, and choose among devices by CUDA_VISIBLE_DEVICES."
        )
    torch.cuda.set_device(device)  # what takes no device runs there, too
    accelerator.state.device = device


def _fsdp_plugin(parallel: ParallelConfig) -> Any:
    """Return accelerate's options of FSDP2 where the config or the launcher asks for it, else None.

    Raises:
        ZooError: the launcher asks for FSDP's first version.
    """
    from accelerate import FullyShardedDataParallelPlugin

    asked = os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"
    if parallel.shard == "none" or (parallel.shard == "launcher" and not asked and parallel.tensor == 1):
        return None
    version = os.environ.get("FSDP_VERSION", "1")
    if parallel.shard == "launcher" and asked and version != "2":
        raise ZooError(
            f"The launcher asks for FSDP of version {version} (ACCELERATE_USE_FSDP=true); this loop runs on FSDP2: "
            "accelerate launch --use_fsdp --fsdp_version 2, or parallel.shard=fsdp2."
        )
    return FullyShardedDataParallelPlugin(fsdp_version=2)


def _use_fsdp(accelerator: Any, plugin: Any, parallel: ParallelConfig) -> None:
    """Choose FSDP2 on CPUs too, where accelerate ignores the plugin and would train whole copies.

    The mesh is torch's own: accelerate's ParallelismConfig has one for FSDP2 beside tensor parallelism only where
    `from_pretrained` divided the layers.

    Raises:
        ZooError: the processes do not form the groups that are asked for.
    """
    from accelerate.utils import DistributedType
    from torch.distributed.device_mesh import init_device_mesh

    world, copies, tensor = accelerator.num_processes, parallel.replicate, parallel.tensor
    if world % tensor:
        raise ZooError(f"parallel.tensor={tensor} does not divide {world} process{'es' * (world > 1)} into groups.")
    readers = world // tensor
    if copies > 1 and world > 1 and (readers % copies or readers // copies < 2):
        raise ZooError(
            f"parallel.replicate={copies} does not divide {readers} processes into groups of two or more"
            + (f" (of {world}, {tensor} share each layer)." if tensor > 1 else ".")
        )
    if world == 1:
        return
    accelerator.state.fsdp_plugin = plugin
    accelerator.state.distributed_type = DistributedType.FSDP
    if copies * tensor > 1:
        shape = (copies, readers // copies, tensor)
        accelerator.state.device_mesh = init_device_mesh(accelerator.device.type, shape, mesh_dim_names=MESH)


def by_first(accelerator: Any, function: Callable[[], T]) -> T:
    """Call a function in the first process, and return its result in every process.

    An error ends all processes: it is raised in the first one, the others exit without a message.
    """
    if accelerator.num_processes == 1:
        return function()
    done, result = False, None
    try:
        if accelerator.is_main_process:
            result = function()
        done = True
    finally:  # also after an error, since the others wait for this message
        done, result = broadcast(accelerator, (done, result))
    if not done:
        raise SystemExit(2)
    return result  # type: ignore[return-value]


def stop_all(accelerator: Any, error: ZooError) -> None:
    """End all processes with one message. Each of them calls this, after they agreed on the error.

    Raises:
        ZooError: in the first process.
        SystemExit: in the others.
    """
    if accelerator.is_main_process:
        raise error
    raise SystemExit(2)


def broadcast(accelerator: Any, value: Any) -> Any:
    """Return the first process's value in every process."""
    if accelerator.num_processes == 1:
        return value
    from accelerate.utils import broadcast_object_list

    return broadcast_object_list([value])[0]


def gather(accelerator: Any, value: Any) -> list[Any]:
    """Return the values of all processes, by rank."""
    if accelerator.num_processes == 1:
        return [value]
    result: list[Any] = [None] * accelerator.num_processes
    torch.distributed.all_gather_object(result, value)
    return result
