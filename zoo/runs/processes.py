"""Starting on one process or many, and the few things that processes say to each other."""

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch

from zoo.registry import ZooError

T = TypeVar("T")
# What `accelerate launch` may ask for and this loop does not run on, by the variable that the launcher sets.
NOT_OURS = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "tensor or context parallelism",
}
# What is computed, which the config says. Beginnings of names.
IGNORED = (
    "ACCELERATE_GRADIENT_",
    "ACCELERATE_MIXED_PRECISION",
    "ACCELERATE_DOWNCAST_BF16",
    "ACCELERATE_DYNAMO_",
    "ACCELERATE_FP8_",
)


@contextlib.contextmanager
def launcher_alone() -> Iterator[None]:
    """Hide from accelerate what the environment says of numbers; it reads some of it whenever it is asked something."""
    hidden = {name: os.environ.pop(name) for name in list(os.environ) if name.startswith(IGNORED)}
    try:
        yield
    finally:
        os.environ |= hidden


def start_accelerator(device: str = "auto") -> Any:
    """Make the accelerator for the processes that are there.

    Where a run computes is the launcher's business, what it computes is the config's: accumulation, number format and
    compilation are said stage by stage, whatever `ACCELERATE_*` the environment holds or another user of accelerate in
    this process (a transformers Trainer in bf16, say) left behind.

    Args:
        device: auto, cpu, cuda, ...

    Raises:
        ZooError: a launcher started several processes and they did not find each other, asks for a way of sharing the
            work that this loop does not know, or the device is not there.
    """
    from accelerate import Accelerator, DistributedDataParallelKwargs
    from accelerate.state import AcceleratorState

    for variable, what in NOT_OURS.items():
        if os.environ.get(variable, "").lower() in ("1", "true", "yes", "on"):
            raise ZooError(
                f"The launcher asks for {what} ({variable}={os.environ[variable]}); this loop runs on one process, DDP "
                "or FSDP2. Choose one of them with `accelerate config`, or unset the variable."
            )
    cpu = device == "cpu" or (device == "auto" and not torch.cuda.is_available())
    # A rank whose batch has no image, or whose experts stay idle, leaves parameters without gradient.
    ddp = DistributedDataParallelKwargs(find_unused_parameters=True)
    AcceleratorState._reset_state(reset_partial_state=False)
    try:
        with launcher_alone():
            accelerator = Accelerator(cpu=cpu, mixed_precision="no", kwargs_handlers=[ddp])
    except (ImportError, ValueError) as error:
        given = ", ".join(f"{k}={v}" for k, v in sorted(os.environ.items()) if k.startswith("ACCELERATE_"))
        raise ZooError(
            f"accelerate cannot start: {error}. The environment has {given or 'no ACCELERATE_*'}."
        ) from error
    wanted = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes != wanted:
        raise ZooError(
            f"The launcher started {wanted} processes, but this one sees {accelerator.num_processes}. "
            "On CPU use: torchrun --nproc_per_node <n> -m zoo.train ..."
        )
    if device != "auto" and accelerator.device.type != device.partition(":")[0]:
        raise ZooError(f"device={device} was asked for, and this process would compute on {accelerator.device.type}.")
    return accelerator


def by_first(accelerator: Any, function: Callable[[], T]) -> T:
    """Let the first process do something, and give every process the result.

    What it raises there ends all of them: the others leave in silence, for the first one says why.
    """
    if accelerator.num_processes == 1:
        return function()
    done, result = False, None
    try:
        if accelerator.is_main_process:
            result = function()
        done = True
    finally:
        done, result = broadcast(accelerator, (done, result))
    if not done:
        raise SystemExit(2)
    return result  # type: ignore[return-value]


def stop_all(accelerator: Any, error: ZooError) -> None:
    """End all processes, which know that they must, and let the first one say why.

    Raises:
        ZooError: in the first process.
        SystemExit: in the others.
    """
    if accelerator.is_main_process:
        raise error
    raise SystemExit(2)


def broadcast(accelerator: Any, value: Any) -> Any:
    """Give every process the value of the first."""
    if accelerator.num_processes == 1:
        return value
    from accelerate.utils import broadcast_object_list

    return broadcast_object_list([value])[0]


def gather(accelerator: Any, value: Any) -> list[Any]:
    """Give every process the values of all, in order."""
    if accelerator.num_processes == 1:
        return [value]
    result: list[Any] = [None] * accelerator.num_processes
    torch.distributed.all_gather_object(result, value)
    return result
