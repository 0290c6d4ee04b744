"""Functions that run in several processes on this machine, which make up one group as a launcher would start them."""

import gc
import json
import multiprocessing
import os
import socket
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from zoo.registry import ZooError

IMPORTED = ("zoo.training.loop", "zoo.loading.build", "torch.distributed.fsdp", "torch.distributed.checkpoint")


def in_group(world: int, function: Callable[..., Any], *args: Any, context: Any = None) -> list[Any]:
    """Call a function in each of `world` processes, and return what they gave, by rank; plain values.

    Args:
        world: number of processes; each finds RANK, WORLD_SIZE and the like in its environment.
        function: of a module, with arguments that can be pickled.
        context: of multiprocessing; None: forked from a process that has imported what they need.

    Raises:
        ZooError: one of them failed.
    """
    if context is None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([*IMPORTED, function.__module__])
    with socket.socket() as place, tempfile.TemporaryDirectory() as folder:
        place.bind(("127.0.0.1", 0))
        port = place.getsockname()[1]
        place.close()
        children = [
            context.Process(target=_call, args=(rank, world, port, folder, function, args)) for rank in range(world)
        ]
        for child in children:
            child.start()
        while any(child.is_alive() for child in children):
            if any(child.exitcode for child in children):  # the others would wait for it
                for child in children:
                    child.kill()
            time.sleep(0.05)
        if any(child.exitcode for child in children):
            codes = ", ".join(str(child.exitcode) for child in children)
            raise ZooError(f"{function.__name__} failed in a process of {world} (exit codes {codes}).")
        return [json.loads((Path(folder) / str(rank)).read_text()) for rank in range(world)]


def _call(rank: int, world: int, port: int, folder: str, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    if world > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
        os.environ |= {"LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    gc.freeze()  # what was imported is not looked through again
    found = function(*args)
    (Path(folder) / str(rank)).write_text(json.dumps(found))
    gc.collect()
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
