"""Starting on one process or many, and the few things that processes say to each other."""

import os
from typing import Any

import torch

from zoo.registry import ZooError


def start_accelerator(device: str = "auto", log: list[str] | None = None, folder: str | None = None) -> Any:
    """Make the accelerator for the processes that are there.

    Args:
        device: auto, cpu, cuda, ...
        log: trackers beside metrics.jsonl.
        folder: where trackers write.

    Raises:
        ZooError: a launcher started several processes and they did not find each other.
    """
    from accelerate import Accelerator, DistributedDataParallelKwargs
    from accelerate.state import AcceleratorState

    cpu = device == "cpu" or (device == "auto" and not torch.cuda.is_available())
    # A rank whose batch has no image, or whose experts stay idle, leaves parameters without gradient.
    ddp = DistributedDataParallelKwargs(find_unused_parameters=True)
    # The number format is ours to choose, stage by stage: neither what another user of accelerate in this process (a
    # transformers Trainer in bf16, say) left behind nor the launcher's environment shall wrap our forward passes.
    AcceleratorState._reset_state(reset_partial_state=False)
    accelerator = Accelerator(
        cpu=cpu, mixed_precision="no", log_with=log or None, project_dir=folder, kwargs_handlers=[ddp]
    )
    wanted = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes != wanted:
        raise ZooError(
            f"The launcher started {wanted} processes, but this one sees {accelerator.num_processes}. "
            "On CPU use: torchrun --nproc_per_node <n> -m zoo.train ..."
        )
    return accelerator


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
