"""The state of a run between two steps: weights trained so far, optimiser states, and progress.

Everything else is a function of the config and of the step (see `zoo.runs.batches` and `zoo.training.step`). Frozen
weights are not written again: they are read from the model's base checkpoints.

    state.json                               progress, settings of the optimisers, number of files
    weights.safetensors                      or weights-00001-of-00004.safetensors, ... of processes that hold parts
    optimizers.safetensors                   likewise; absent between two stages
    SHA256SUMS                               a hash of each of them, in the format of `sha256sum -c`

`zoo.runs.saving` writes them, here they are read, by any number of processes: each reads the parts that it holds
(`zoo.storage.sharded`). Nothing in them is pickled.

Hashing takes 0.6 s a GB on a core with SHA extensions (1.7 GB/s), several files side by side, when a checkpoint is
written and when a run is resumed: by calculation 33 s for a 7B model that trains in full, with 28 GB of weights and
56 GB of AdamW states, which a disk of 1 GB/s takes 84 s to write.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from zoo.registry import ZooError, refuse_code
from zoo.registry.foreign import read_json, require_file
from zoo.storage.atomic import hashes
from zoo.storage.sharded import listing_of_parts, read_own

WEIGHTS, OPTIMIZERS, STATE, SUMS = "weights.safetensors", "optimizers.safetensors", "state.json", "SHA256SUMS"
PICKLED = "optimizers.pt"  # of formats 1 and 2
FORMAT = 3  # with hashes since 2, without pickles since 3
_MOST_FILES = 100_000  # of one kind, in what a state.json may state


class DamagedError(ZooError):
    """A checkpoint differs from what was written."""


def files_of(kind: str, count: int) -> list[str]:
    """Return the names of `count` files of one kind, WEIGHTS or OPTIMIZERS."""
    stem, _, end = kind.partition(".")
    return [kind] if count == 1 else [f"{stem}-{i:05d}-of-{count:05d}.{end}" for i in range(1, count + 1)]


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
        # A list without the files that every checkpoint has is damaged as well.
        found = hashes(folder / name for name in {STATE, *files_of(WEIGHTS, _count(state, "weights")), *stated})
    except OSError as error:
        raise DamagedError(f"{Path(error.filename or folder).name}: {error.strerror}") from error
    except ValueError as error:
        raise DamagedError(f"{STATE} or {SUMS} cannot be read: {error}") from error
    if other := [name for name, digest in found.items() if digest != stated.get(name)]:
        raise DamagedError(f"{', '.join(other)}: another hash than when it was written")
    return state


def _count(state: Any, kind: str) -> int:
    """Return the number of files of one kind, of a state.json that may come from elsewhere."""
    counts = state.get("files", {}) if isinstance(state, dict) else None
    count = counts.get(kind, 1) if isinstance(counts, dict) else None
    if type(count) is not int or not 0 <= count <= _MOST_FILES:
        raise ValueError(f"{count!r:.20} files of {kind}")
    return count


def _stored(folder: Path, kind: str) -> dict[str, Any]:
    """Return where the tensors of one kind are: name -> location."""
    state = read_json(folder / STATE) if (folder / STATE).is_file() else {}
    try:
        names = files_of(kind, _count(state, kind.partition(".")[0]))
    except ValueError as error:
        raise ZooError(f"{str(folder / STATE)!r} cannot be read: it states {error}.") from error
    return listing_of_parts(folder / name for name in names)


def names_in_float32(folder: Path, prefix: str = "") -> list[str]:
    """Return the names of the checkpoint's float32 weights that begin with `prefix`, without it."""
    stored = _stored(folder, WEIGHTS).items()
    return [n.removeprefix(prefix) for n, t in stored if n.startswith(prefix) and t.dtype == torch.float32]


@torch.no_grad()
def load_weights(folder: Path, named: Mapping[str, Tensor], prefix: str = "") -> None:
    """Read the checkpoint's weights into `named`, of a sharded one the part that this process holds.

    Tensors that the checkpoint does not hold keep their values.

    Args:
        folder: of the checkpoint.
        named: parameters and buffers by the names that checkpoints use.
        prefix: of the names to load.

    Raises:
        ZooError: the checkpoint holds a weight that the model does not have, or of another shape.
    """
    for name, stored in _stored(folder, WEIGHTS).items():
        if not name.startswith(prefix):
            continue
        if name not in named:
            raise ZooError(f"The checkpoint {str(folder)!r} holds {name!r}, which the model does not have.")
        if tuple(stored.shape) != tuple(named[name].shape):
            raise ZooError(
                f"The checkpoint {str(folder)!r} holds {name!r} as {tuple(stored.shape)}, "
                f"the model has {tuple(named[name].shape)}."
            )
        read_own(stored, named[name])


def load_optimizers(folder: Path, optimizers: list[Any], named: Mapping[str, Tensor]) -> None:
    """Restore the checkpoint's optimiser states, of sharded parameters the parts that this process holds.

    Args:
        folder: of the checkpoint.
        optimizers: of the stage, on the parameters of this process.
        named: the parameters by the names that checkpoints use.

    Raises:
        ZooError: the states belong to other optimisers, or are pickled.
    """
    if (folder / PICKLED).exists():
        raise ZooError(
            f"{str(folder / PICKLED)!r} is a pickled file of an earlier version, which is not read: resume the run "
            "with the version that zoo.lock names, up to the end of a stage."
        )
    stored = _stored(folder, OPTIMIZERS)
    settings = read_json(folder / STATE).get("optimizers")
    if not isinstance(settings, list) or len(settings) != len(optimizers):
        count = len(settings) if isinstance(settings, list) else 0
        raise ZooError(f"The checkpoint {str(folder)!r} is of {count} optimisers, the stage has {len(optimizers)}.")
    names = {id(p): n for n, p in named.items()}
    for number, (optimizer, groups) in enumerate(zip(optimizers, settings, strict=True)):
        params = [p for group in optimizer.param_groups for p in group["params"]]
        index = {names[id(p)]: i for i, p in enumerate(params)}
        if _names_in(groups) != sorted(index):
            raise ZooError(f"The checkpoint {str(folder)!r} holds optimiser {number} of other parameters than trained.")
        states: dict[int, dict[str, Tensor]] = {}
        for full, found in stored.items():
            owner, key, name = [*full.split(":", 2), "", ""][:3]
            if owner == str(number):
                if name not in index:
                    raise ZooError(f"The checkpoint {str(folder)!r} holds a state of {name!r}, which does not train.")
                states.setdefault(index[name], {})[key] = _state(found, params[index[name]])
        counts = iter(range(len(params)))
        # Rates and the like are those of the config, which a person may have changed; states are the checkpoint's.
        restored = [{**g, "params": [next(counts) for _ in g["params"]]} for g in optimizer.param_groups]
        optimizer.load_state_dict({"state": states, "param_groups": restored})


def _names_in(groups: Any) -> list[str] | None:
    """Return the names of the parameters in an optimiser's groups, of a state.json that may come from elsewhere."""
    try:
        return sorted(str(name) for group in groups for name in group["params"])
    except (TypeError, KeyError):
        return None


def _state(stored: Any, parameter: Tensor) -> Tensor:
    """Read a state of a parameter: sharded like it if it has its shape, else whole."""
    alike = tuple(stored.shape) == tuple(parameter.shape)
    like = {"dtype": stored.dtype, "requires_grad": False}
    target = torch.empty_like(parameter, **like) if alike else torch.empty(stored.shape, dtype=stored.dtype)
    read_own(stored, target)
    return target


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """Return parameters and persistent buffers, each once, by the names they are saved under.

    A wrapped layer (LoRA's) has the names that it has without the wrapper, so that they do not change while an adapter
    is detached. Buffers hold running statistics, for example, which change during training.
    """
    named = {n: t for n, t in module.state_dict(keep_vars=True).items() if isinstance(t, Tensor)}
    first = {id(t): n for n, t in reversed(named.items())}  # tied tensors keep their first name
    return {n: t for n, t in named.items() if first[id(t)] == n}


def shared_as(tensor: Tensor, like: Any) -> Tensor:
    """Return `tensor` sharded as `like` is."""
    if not hasattr(like, "full_tensor"):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor, like.device_mesh, like.placements)


def not_finite(named: Mapping[str, Tensor]) -> list[str]:
    """Return the names of the tensors of which this process holds a NaN or an infinity."""
    own = {n: t.to_local() if hasattr(t, "to_local") else t for n, t in named.items()}
    return [n for n, t in own.items() if not _is_finite(t.detach())]


def _is_finite(tensor: Tensor) -> bool:
    """Return whether all values are finite. If their sum is, they are, and no mask is allocated."""
    return bool(torch.isfinite(tensor.sum())) or bool(torch.isfinite(tensor).all())
