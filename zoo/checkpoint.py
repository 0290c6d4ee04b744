"""The state of a run between two steps: weights that were ever trained, optimisers, and how far it is.

Everything else is a function of the config and of the step (see `zoo.loader` and `zoo.engine`). Frozen weights are not
written again: they come from where the model was composed from. Works for whole and for sharded parameters.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from zoo.registry import ZooError

WEIGHTS, OPTIMIZERS, STATE = "weights.safetensors", "optimizers.pt", "state.json"


def save(folder: Path | None, named: Mapping[str, Tensor], optimizers: list[Any], state: Mapping[str, Any]) -> None:
    """Write a checkpoint; every process calls this, those without a folder only hand in their shards."""
    weights = {name: whole(tensor) for name, tensor in named.items()}
    states = [_map(o.state_dict(), whole) for o in optimizers]
    if folder is None:
        return
    from safetensors.torch import save_file

    save_file({k: v.contiguous() for k, v in weights.items()}, folder / WEIGHTS)
    torch.save(states, folder / OPTIMIZERS)
    (folder / STATE).write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")


def read_state(folder: Path) -> dict[str, Any]:
    """Return how far the run was."""
    return json.loads((folder / STATE).read_text(encoding="utf-8"))


@torch.no_grad()
def load_weights(folder: Path, named: Mapping[str, Tensor], new: tuple[str, ...] = ()) -> None:
    """Put the checkpoint's weights into `named`; names that it does not hold stay as they are.

    Args:
        folder: of the checkpoint.
        named: parameters and buffers by the names that checkpoints use.
        new: beginnings of names to leave out.

    Raises:
        ZooError: the checkpoint holds a weight that the model does not have, or of another shape.
    """
    from safetensors.torch import load_file

    for name, tensor in load_file(folder / WEIGHTS).items():
        if new and name.startswith(new):
            continue
        if name not in named:
            raise ZooError(f"The checkpoint {str(folder)!r} holds {name!r}, which the model does not have.")
        if tensor.shape != named[name].shape:
            raise ZooError(
                f"The checkpoint {str(folder)!r} holds {name!r} as {tuple(tensor.shape)}, "
                f"the model has {tuple(named[name].shape)}."
            )
        named[name].copy_(shared_as(tensor.to(named[name].device), named[name]))


def load_optimizers(folder: Path, optimizers: list[Any]) -> None:
    """Put the checkpoint's optimiser states back."""
    states = torch.load(folder / OPTIMIZERS, weights_only=True, map_location="cpu")
    if len(states) != len(optimizers):
        raise ZooError(
            f"The checkpoint {str(folder)!r} is of {len(states)} optimisers, the stage has {len(optimizers)}."
        )
    for optimizer, saved in zip(optimizers, states, strict=True):
        params = [p for g in optimizer.param_groups for p in g["params"]]
        for index, values in saved["state"].items():
            saved["state"][index] = {k: _placed(v, params[index]) for k, v in values.items()}
        optimizer.load_state_dict(saved)


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers, each once, by the names they are saved under.

    Those of a wrapped layer (LoRA's) are the names it has without, so that they are the same while an adapter is
    detached. Buffers are running statistics and the like, which train without being parameters.
    """
    named = {n: t for n, t in module.state_dict(keep_vars=True).items() if isinstance(t, Tensor)}
    first = {id(t): n for n, t in reversed(named.items())}  # of tied ones
    return {n: t for n, t in named.items() if first[id(t)] == n}


def whole(tensor: Any) -> Any:
    """The whole tensor on the CPU, gathered where it is sharded."""
    if not isinstance(tensor, Tensor):
        return tensor
    tensor = tensor.detach()
    if not hasattr(tensor, "full_tensor"):
        return tensor.cpu()
    full = tensor.full_tensor().cpu()
    return full.clone() if full.untyped_storage().nbytes() > full.nbytes else full  # uneven shards are padded


def shared_as(tensor: Tensor, like: Any) -> Tensor:
    """`tensor` sharded as `like` is."""
    if not hasattr(like, "full_tensor"):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor, like.device_mesh, like.placements)


def _placed(value: Any, param: Tensor) -> Any:
    same = isinstance(value, Tensor) and value.shape == param.shape
    return shared_as(value.to(param.device), param) if same else value


def _map(value: Any, function: Any) -> Any:
    if isinstance(value, dict):
        return {k: _map(v, function) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_map(v, function) for v in value)
    return function(value)
