"""The state of a run between two steps: weights trained so far, optimiser states, and progress.

Everything else is a function of the config and of the step (see `zoo.runs.batches` and `zoo.training.step`). Frozen
weights are not written again: they are read from the model's base checkpoints. Works for whole and for sharded
parameters.

A checkpoint ends with SHA256SUMS, a hash of each of its files in the format of `sha256sum -c`. Hashing takes 0.6 s a GB
on a core with SHA extensions (1.7 GB/s), weights and optimisers side by side, when a checkpoint is written and when a
run is resumed: by calculation 33 s for a 7B model that trains in full, with 28 GB of weights and 56 GB of AdamW states,
which a disk of 1 GB/s takes 84 s to write.
"""

import json
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from zoo.registry import ZooError, refuse_code
from zoo.registry.foreign import read_json, require_file
from zoo.storage.atomic import hashes
from zoo.storage.safetensors_file import listing
from zoo.storage.weights import whole

WEIGHTS, OPTIMIZERS, STATE, SUMS = "weights.safetensors", "optimizers.pt", "state.json", "SHA256SUMS"
FORMAT = 2  # with hashes since 2


class DamagedError(ZooError):
    """A checkpoint differs from what was written."""


@dataclass
class State:
    """The content of a checkpoint, unsharded and on the CPU."""

    weights: dict[str, Tensor]
    optimizers: list[dict[str, Any]]
    progress: Mapping[str, Any]

    def not_finite(self, names: set[str]) -> list[str]:
        """Return those of the weights `names` that hold a NaN or an infinity."""
        return [n for n, t in self.weights.items() if n in names and not _is_finite(t)]

    def save(self, folder: Path) -> None:
        """Write a checkpoint into an empty folder."""
        from safetensors.torch import save_file

        save_file({k: v.contiguous() for k, v in self.weights.items()}, folder / WEIGHTS)
        if self.optimizers:
            # Given a path, torch.save hides a full disk behind an error of its zip writer; given a file, it raises
            # OSError.
            with (folder / OPTIMIZERS).open("wb") as file:
                torch.save(self.optimizers, file)
        state = {"format": FORMAT, **self.progress}
        (folder / STATE).write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")
        lines = [f"{digest}  {name}\n" for name, digest in hashes(folder.iterdir()).items()]
        # Last, so that it covers all files.
        (folder / SUMS).write_text("".join(lines), encoding="utf-8")


def collect(
    named: Mapping[str, Tensor], optimizers: list[Any], progress: Mapping[str, Any], *, keep: bool = True
) -> State:
    """Gather the content of a checkpoint on the CPU. A collective operation: every process calls it.

    Args:
        named: weights and buffers by the names that checkpoints use.
        optimizers: whose states are saved.
        progress: of the run.
        keep: False in processes that do not write: they send their shards and hold no copy.
    """
    take: Callable[[Any], Any] = whole if keep else _send_shard
    weights = {name: take(tensor) for name, tensor in named.items()}
    return State(weights, [_map(o.state_dict(), take) for o in optimizers], progress)


def verify(folder: Path) -> dict[str, Any]:
    """Check the hash of every file of a checkpoint, and return the run's progress.

    Checkpoints of format 1 have no hashes and are not checked.

    Raises:
        DamagedError: a file is missing, cannot be read, or has another hash than when it was written.
    """
    try:
        state = read_json(folder / STATE)
        refuse_code(state, STATE)
        if not (folder / SUMS).is_file() and isinstance(state, dict) and "format" not in state:
            return state
        lines = (folder / SUMS).read_text(encoding="utf-8").splitlines()
        stated = {name: digest for digest, name in (line.split("  ", 1) for line in lines)}
        for name in stated:
            if Path(name).name != name:  # the list may come from elsewhere, and could name files outside the folder
                raise ValueError(f"{name!r} is not a file of the checkpoint")
            if (folder / name).exists():
                require_file(folder / name)
        # A list without the two files that every checkpoint has is damaged as well.
        found = hashes(folder / name for name in {WEIGHTS, STATE, *stated})
    except OSError as error:
        raise DamagedError(f"{Path(error.filename or folder).name}: {error.strerror}") from error
    except ValueError as error:
        raise DamagedError(f"{STATE} or {SUMS} cannot be read: {error}") from error
    if other := [name for name, digest in found.items() if digest != stated.get(name)]:
        raise DamagedError(f"{', '.join(other)}: another hash than when it was written")
    return state


def names_in_float32(folder: Path, prefix: str = "") -> list[str]:
    """Return the names of the checkpoint's float32 weights that begin with `prefix`, without it."""
    stored = listing([folder / WEIGHTS]).items()
    return [n.removeprefix(prefix) for n, t in stored if n.startswith(prefix) and t.dtype == torch.float32]


@torch.no_grad()
def load_weights(folder: Path, named: Mapping[str, Tensor], prefix: str = "") -> None:
    """Copy the checkpoint's weights into `named`; tensors that it does not hold keep their values.

    Args:
        folder: of the checkpoint.
        named: parameters and buffers by the names that checkpoints use.
        prefix: of the names to load.

    Raises:
        ZooError: the checkpoint holds a weight that the model does not have, or of another shape.
    """
    from safetensors import safe_open

    listing([folder / WEIGHTS])  # raises a ZooError with file and reason, where the library's error has neither
    with safe_open(folder / WEIGHTS, "pt") as file:
        for name in filter(lambda n: n.startswith(prefix), file.keys()):
            tensor = file.get_tensor(name)
            if name not in named:
                raise ZooError(f"The checkpoint {str(folder)!r} holds {name!r}, which the model does not have.")
            if tensor.shape != named[name].shape:
                raise ZooError(
                    f"The checkpoint {str(folder)!r} holds {name!r} as {tuple(tensor.shape)}, "
                    f"the model has {tuple(named[name].shape)}."
                )
            named[name].copy_(shared_as(tensor.to(named[name].device), named[name]))


def load_optimizers(folder: Path, optimizers: list[Any]) -> None:
    """Restore the checkpoint's optimiser states.

    Raises:
        ZooError: they belong to other optimisers, or the file was not written by torch.
    """
    file = folder / OPTIMIZERS
    _refuse_compressed(file)
    try:
        states = torch.load(file, weights_only=True, map_location="cpu")  # tensors, numbers and lists; no code runs
    except Exception as error:  # of pickle, of zip, of torch
        raise ZooError(f"{str(file)!r} cannot be read: {' '.join(str(error).split())[:300]}") from error
    if len(states) != len(optimizers):
        raise ZooError(
            f"The checkpoint {str(folder)!r} is of {len(states)} optimisers, the stage has {len(optimizers)}."
        )
    for optimizer, saved in zip(optimizers, states, strict=True):
        # States are saved unsharded; each is sharded as its parameter is now, so the number of processes may change.
        params = [p for g in optimizer.param_groups for p in g["params"]]
        for index, values in saved["state"].items():
            saved["state"][index] = {k: _placed(v, params[index]) for k, v in values.items()}
        optimizer.load_state_dict(saved)


def _refuse_compressed(file: Path) -> None:
    """Refuse an archive that unpacks to more than its own size: torch never compresses, so it may be a zip bomb."""
    size = require_file(file)
    try:
        with zipfile.ZipFile(file) as members:
            stated = sum(member.file_size for member in members.infolist())
    except (zipfile.BadZipFile, OSError, ValueError) as error:
        raise ZooError(f"{str(file)!r} was not written by torch: {error}") from error
    if stated > size:
        raise ZooError(f"{str(file)!r} has {size:,} bytes and states {stated:,}: torch did not write it.")


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """Return parameters and persistent buffers, each once, by the names they are saved under.

    A wrapped layer (LoRA's) has the names that it has without the wrapper, so that they do not change while an adapter
    is detached. Buffers hold running statistics, for example, which change during training.
    """
    named = {n: t for n, t in module.state_dict(keep_vars=True).items() if isinstance(t, Tensor)}
    first = {id(t): n for n, t in reversed(named.items())}  # tied tensors keep their first name
    return {n: t for n, t in named.items() if first[id(t)] == n}


def _send_shard(tensor: Any) -> None:
    """Take part in the gathering of a sharded tensor without keeping the result."""
    if hasattr(tensor, "full_tensor"):
        tensor.full_tensor()


def shared_as(tensor: Tensor, like: Any) -> Tensor:
    """Return `tensor` sharded as `like` is."""
    if not hasattr(like, "full_tensor"):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor, like.device_mesh, like.placements)


def _is_finite(tensor: Tensor) -> bool:
    """Return whether all values are finite. If their sum is, they are, and no mask is allocated."""
    return bool(torch.isfinite(tensor.sum())) or bool(torch.isfinite(tensor).all())


def _placed(value: Any, param: Tensor) -> Any:
    same = isinstance(value, Tensor) and value.shape == param.shape
    return shared_as(value.to(param.device), param) if same else value


def _map(value: Any, function: Any) -> Any:
    if isinstance(value, dict):
        return {k: _map(v, function) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_map(v, function) for v in value)
    return function(value)
