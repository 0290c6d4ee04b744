"""Save and load one adapter in a folder: `adapter.safetensors`, and `adapter.json` with its name and options."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from zoo.registry import ZooError
from zoo.registry.foreign import read_object

WEIGHTS, OPTIONS = "adapter.safetensors", "adapter.json"


def write(
    folder: str | Path, name: str, config: Any, state: Mapping[str, Tensor], facts: Mapping[str, Any] | None = None
) -> None:
    """Write weights and options of the adapter `name`, and further plain values to compare when it is loaded."""
    from safetensors.torch import save_file

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file({k: v.contiguous() for k, v in state.items()}, folder / WEIGHTS, metadata={"format": "pt"})
    text = {"adapter": name, "options": dataclasses.asdict(config), **(facts or {})}
    (folder / OPTIONS).write_text(json.dumps(text, indent=2) + "\n", encoding="utf-8")


def facts(folder: str | Path, name: str) -> dict[str, Any]:
    """Return the options and plain values that `write` stored for the adapter `name`.

    Raises:
        ZooError: the folder holds no adapter, or another one.
    """
    file = Path(folder) / OPTIONS
    if not file.is_file():
        raise ZooError(f"{str(folder)!r} has no {OPTIONS}: it does not hold a saved adapter.")
    found = read_object(file)
    if found.get("adapter") != name:
        raise ZooError(f"{str(folder)!r} holds the adapter {found.get('adapter')!r}, and {name!r} was asked for.")
    return found


def read(
    folder: str | Path, name: str, config: Any, same: Sequence[str], state: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Read the weights of the adapter `name`.

    Args:
        config: of the adapter that loads them.
        same: options that must be equal to the saved ones.
        state: expected names and shapes.

    Raises:
        ZooError: another adapter, other options, or weights of another model.
    """
    from safetensors.torch import load_file

    options = facts(folder, name)["options"]
    for option in same:
        if (saved := options.get(option)) != (now := getattr(config, option)):
            raise ZooError(f"adapter {name!r} in {str(folder)!r} has {option}={saved}, this one has {option}={now}.")
    found = load_file(Path(folder) / WEIGHTS)
    odd = sorted(found.keys() ^ state.keys()) or sorted(k for k in found if found[k].shape != state[k].shape)
    if odd:
        raise ZooError(
            f"The weights in {str(folder)!r} are of another model: {odd[0]!r} does not fit ({len(odd)} such tensors)."
        )
    return found
