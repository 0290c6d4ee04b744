"""Whole weights of a sharded model, for the one process that saves it: gathered one at a time, and kept in a file.

Saving compares weights with those of base checkpoints, rounds some of them and divides them among files, so the process
that saves reads each of them more than once. In a file they take no memory: what is read are maps of its pages. A
process takes three times the largest weight beyond its shards: gathered, joined, and one that is about to be freed.
"""

import contextlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from zoo.runs.folder import RunFolder
from zoo.runs.processes import by_first
from zoo.storage.atomic import BESIDE, remove
from zoo.storage.safetensors_file import listing, value_of
from zoo.storage.sharded import Part, in_order, write_parts
from zoo.storage.weights import once_each, whole


@contextlib.contextmanager
def whole_weights(accelerator: Any, model: Any, folder: RunFolder) -> Iterator[dict[str, Tensor]]:
    """Yield the weights of a model, each once, by the first of its names; every process calls this.

    Args:
        accelerator: of the run.
        model: composed.
        folder: of the run, which takes the file for the time of the block.

    Returns:
        Whole tensors in the first process; in the others without those that are sharded.

    Raises:
        ZooError: the disk is full; the other processes exit.
    """
    named = once_each(model)
    sharded: dict[str, Any] = {n: t for n, t in named.items() if hasattr(t, "full_tensor")}
    if not sharded:
        yield {n: t.detach() for n, t in named.items()}
        return
    parts = in_order(Part(n, t.dtype, tuple(t.shape), (0,) * t.dim()) for n, t in sharded.items())
    values = _gathered((sharded[part.name] for part in parts), accelerator.is_main_process)
    file: Path = folder.path / f".gathered.safetensors{BESIDE}"

    def drain() -> None:
        for _ in values:
            pass

    def write() -> None:
        try:
            remove(file)
            with folder.writing("the model"):
                write_parts(file, parts, values)
        finally:
            drain()  # the others take part in each gather that is left

    try:
        if not accelerator.is_main_process:
            drain()
        by_first(accelerator, write)
        found = {n: value_of(stored) for n, stored in listing([file]).items()} if accelerator.is_main_process else {}
        plain = {n: t.detach() for n, t in named.items() if n not in sharded}
        yield plain | found
    finally:
        if accelerator.is_main_process:
            remove(file)


def _gathered(tensors: Iterable[Any], wanted: bool) -> Iterator[Tensor]:
    """Gather sharded tensors one at a time; where they are not wanted, this process gives its shards."""
    for tensor in tensors:
        yield whole(tensor) if wanted else tensor.detach().full_tensor()
