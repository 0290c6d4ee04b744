"""Write the checkpoints of a run by torch.distributed.checkpoint: each process writes the parts that it holds.

Nothing is gathered. With several processes, or on an accelerator, a checkpoint is written behind the training: its
content is copied to a buffer on the CPU first, and the loop goes on while a thread writes. The folder gets its name in
one step, by the first process, once every process has written its files and they are on the disk
(`RunFolder.checkpoint`), so that a checkpoint is whole or not there, whichever process is killed when. What several
processes hold alike (all of it under DDP) is written by the first of them alone.
"""

import contextlib
import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import DefaultSavePlanner, StorageWriter, async_save, save
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.storage import WriteResult

from zoo.registry import ZooError
from zoo.runs.checkpoint import FORMAT, OPTIMIZERS, STATE, SUMS, WEIGHTS, files_of
from zoo.runs.folder import RunFolder
from zoo.runs.processes import stop_all
from zoo.storage.atomic import hashes
from zoo.storage.sharded import Part, in_order, write_parts

FILES = {"weights": WEIGHTS, "optimizers": OPTIMIZERS}


class Saver:
    """Writes checkpoints of a run into its folder, one at a time.

    Args:
        accelerator: of the run.
        folder: of the run.
        keep: number of checkpoints; older ones are removed.
    """

    def __init__(self, accelerator: Any, folder: RunFolder, keep: int) -> None:
        self.accelerator, self.folder, self.keep = accelerator, folder, keep
        self.several = accelerator.num_processes > 1
        # On one CPU process a copy would cost memory, and the writing thread a core of the training.
        self.behind = self.several or accelerator.device.type != "cpu"
        self._group: Any = None
        self._stager: Any = None
        self._future: Future[Any] | None = None
        self._writer: FolderWriter | None = None

    def save(
        self, step: int, named: Mapping[str, Tensor], optimizers: Sequence[Any], progress: Mapping[str, Any]
    ) -> None:
        """Write a checkpoint, or begin to; every process calls this.

        Args:
            step: of the run, in the name of the checkpoint.
            named: weights and buffers by the names that checkpoints use.
            optimizers: whose states are saved.
            progress: of the run, as plain values.

        Raises:
            ZooError: this checkpoint or the one before cannot be written; every process raises or exits.
        """
        self.wait()
        content, settings = content_of(named, optimizers)
        state = {"format": FORMAT, **progress, **({"optimizers": settings} if settings else {})}
        self._writer = FolderWriter(lambda: self.folder.checkpoint(step, self.keep), state, self.folder.flush_metrics)
        options: dict[str, Any] = {"storage_writer": self._writer, "no_dist": not self.several}
        options |= {"planner": DefaultSavePlanner(dedup_save_to_lowest_rank=True), "process_group": self._own_group()}
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
        if self.behind:
            self._future = async_save(content, async_stager=self._staging(), **options)  # type: ignore[assignment]
        else:
            with self._errors():
                save(content, **options)

    def wait(self) -> None:
        """Wait until the checkpoint that is being written is there; every process calls this.

        Raises:
            ZooError: it cannot be written; every process raises or exits.
        """
        future, self._future = self._future, None
        if future is not None:
            with self._errors():
                future.result()
            if self._stager is not None and self.accelerator.device.type == "cpu":
                self._stager.close()  # gives the buffer back; of an accelerator it is pinned, and used again
                self._stager = None

    def close(self) -> None:
        """Wait for the checkpoint that is being written, whatever becomes of it."""
        with contextlib.suppress(Exception, SystemExit):
            self.wait()

    def _own_group(self) -> Any:
        """Return a group for the collectives of the writing thread, which must not meet those of the loop."""
        if self.several and self._group is None:
            self._group = torch.distributed.new_group(backend="gloo")
        return self._group

    def _staging(self) -> Any:
        if self._stager is None:
            pinned = self.accelerator.device.type == "cuda"
            self._stager = DefaultStager(StagingOptions(pinned, False, False, pinned))
        return self._stager

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        """Raise what went wrong in any of the processes, once, and remove what was written."""
        try:
            yield
        except CheckpointException as failed:
            _, (error, _) = min(failed.failures.items())
            self._abandon(error)
            try:
                with self.folder.writing("a checkpoint"):
                    raise error
            except ZooError as said:
                if not self.several:
                    raise
                stop_all(self.accelerator, said)
        except BaseException as error:
            self._abandon(error)
            raise

    def _abandon(self, error: BaseException) -> None:
        if self._writer is not None:
            self._writer.abandon(error)


def content_of(
    named: Mapping[str, Tensor], optimizers: Sequence[Any]
) -> tuple[dict[str, dict[str, Tensor]], list[list[dict[str, Any]]]]:
    """Return the tensors of a checkpoint, and the settings of the optimisers as plain values.

    Args:
        named: weights and buffers by the names that checkpoints use; among them what the optimisers train.
        optimizers: whose states are saved.

    Returns:
        "weights" and "optimizers", each with tensors by name (`0:exp_avg:model.llm...` for a state of the first
        optimiser), in parts where they are sharded; and for each optimiser its groups, with names for parameters.
    """
    weights = {name: tensor.detach() for name, tensor in named.items()}
    states: dict[str, Tensor] = {}
    names, settings = {id(t): n for n, t in named.items()}, []
    for number, optimizer in enumerate(optimizers):
        for parameter, state in optimizer.state.items():
            for key, value in state.items():
                states[f"{number}:{key}:{names[id(parameter)]}"] = torch.as_tensor(value).detach()
        groups = [{**g, "params": [names[id(p)] for p in g["params"]]} for g in optimizer.param_groups]
        settings.append([{k: v.item() if isinstance(v, Tensor) else v for k, v in g.items()} for g in groups])
    return {"weights": weights, "optimizers": states}, settings


class FolderWriter(StorageWriter):
    """Writes what a process holds as safetensors, and makes the folder valid once all have.

    Args:
        begin: opens the folder, in the first process: a context whose end gives the folder its name.
        state: content of state.json.
        ahead: called by the first process before the folder gets its name.
    """

    def __init__(
        self, begin: Callable[[], contextlib.AbstractContextManager[Path]], state: dict[str, Any], ahead: Any = None
    ) -> None:
        self.begin, self.state, self.ahead = begin, state, ahead
        self.open = ExitStack()
        self.path: Path | None = None  # in the first process

    def reset(self, checkpoint_id: Any = None) -> None:
        """Nothing is kept between two checkpoints."""

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        if is_coordinator:
            self.path = self.open.enter_context(self.begin())

    def prepare_local_plan(self, plan: Any) -> Any:
        return plan

    def prepare_global_plan(self, plans: list[Any]) -> list[Any]:
        """Choose the files, in the first process: one of each kind for each process that has something to write."""
        counts: dict[str, int] = {}
        places: list[dict[str, str]] = [{} for _ in plans]
        for kind, file in FILES.items():
            having = [i for i, plan in enumerate(plans) if any(_kind(item) == kind for item in plan.items)]
            having = having or ([0] if file == WEIGHTS else [])  # the weights' file is there, if empty
            counts[kind] = len(having)
            for index, name in zip(having, files_of(file, len(having)), strict=True):
                places[index][kind] = str(self.path / name)  # type: ignore[operator]
        self.state["files"] = counts
        return [replace(plan, storage_data=place) for plan, place in zip(plans, places, strict=True)]

    def write_data(self, plan: Any, planner: Any) -> Any:
        """Write the files of this process, and return their hashes."""
        results = []
        for kind, file in plan.storage_data.items():
            items = {_part(item): item for item in plan.items if _kind(item) == kind}
            parts = in_order(items)
            values = (planner.resolve_data(items[part]) for part in parts)
            digest = write_parts(Path(file), parts, values)
            results.append(WriteResult(MetadataIndex(Path(file).name), Path(file).stat().st_size, digest))
        written: Any = torch.futures.Future()
        written.set_result(results)
        return written

    def finish(self, metadata: Any, results: list[list[WriteResult]]) -> None:
        """Make the folder valid, in the first process: state and hashes are written, and it gets its name."""
        with self.open:
            assert self.path is not None, "the first process made the folder"
            (self.path / STATE).write_text(json.dumps(self.state, indent=2) + "\n", encoding="utf-8")
            found = {str(r.index.fqn): str(r.storage_data) for each in results for r in each}
            lines = [f"{digest}  {name}\n" for name, digest in {**found, **hashes([self.path / STATE])}.items()]
            (self.path / SUMS).write_text("".join(sorted(lines, key=lambda line: line[66:])), encoding="utf-8")
            if self.ahead is not None:
                self.ahead()

    def abandon(self, error: BaseException) -> None:
        """Remove what was written, in the first process; nothing where the folder has its name."""
        with contextlib.suppress(BaseException):  # the error is raised by the caller
            self.open.__exit__(type(error), error, error.__traceback__)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return False  # the folder is that of `begin`


def _kind(item: Any) -> str:
    return str(item.index.fqn).partition(".")[0]


def _part(item: Any) -> Part:
    """Return what DCP plans to write of a tensor, by its name in the file."""
    data, name = item.tensor_data, str(item.index.fqn).partition(".")[2]
    return Part(name, data.properties.dtype, tuple(data.chunk.sizes), tuple(data.chunk.offsets))
