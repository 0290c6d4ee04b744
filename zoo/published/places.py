"""Models on several devices: weights are placed by name, and a module's inputs are moved to its device.

Parts on the CPU are computed there; weights are never moved during a pass, so a device map costs one copy of the hidden
states at each border between devices.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from zoo.registry import SINGLE_SLOTS, ImageFeatures, UnlikeRows, ZooError, unknown
from zoo.storage.precision import cast_parameters, dtype_of

_UNIT = re.compile(r"^(llm\..*?\blayers?\.\d+|llm\.lm\.lm_head|\w+)\b")  # units that `balance` keeps on one device


@dataclass(frozen=True)
class Placement:
    """Devices and dtype of weights.

    Attributes:
        fresh: parts that may start without weights.
        device, places: devices of weights; `places` maps prefixes of names and has precedence.
        dtype: of the parameters; None keeps that of the files.
        bits: 8 or 4 of the language model's layers (see `zoo.published.bits`); 0: all of them.
    """

    fresh: frozenset[str] = frozenset()
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    places: Mapping[str, torch.device] = field(default_factory=dict)
    dtype: torch.dtype | None = None
    bits: int = 0

    def of(self, name: str) -> torch.device:
        """The device of a weight."""
        if self.bits and name.partition(".")[0] == "llm":
            return torch.device("cpu")  # quantised when it is moved to the device
        return place_of(name, self.places, self.device)


def places_of(device_map: Mapping[str, Any]) -> dict[str, torch.device]:
    """Convert a map from prefixes of names to devices, written as `0`, `cuda:1` or `cpu`.

    Raises:
        ZooError: a value is not a device that can hold weights.
    """
    found = {}
    for prefix, place in device_map.items():
        if str(place) in ("disk", "meta"):
            raise ZooError(f"device_map[{prefix!r}] is {place!r}: weights are held by devices, such as 0 and 'cpu'.")
        try:
            found[str(prefix)] = torch.device(place)
        except (RuntimeError, TypeError) as error:
            raise ZooError(f"device_map[{prefix!r}] must be a device, got {place!r}.") from error
    if not found:
        raise ZooError("device_map is empty; the key '' means the whole model.")
    return found


def place_of(name: str, places: Mapping[str, torch.device], default: torch.device) -> torch.device:
    """The device of a weight: that of the longest prefix of its name."""
    known = [p for p in places if p == "" or name == p or name.startswith(f"{p}.")]
    return places[max(known, key=len)] if known else default


def balance(sizes: Mapping[str, int], devices: Sequence[torch.device]) -> dict[str, torch.device]:
    """Distribute weights over devices, about equally many bytes to each, in the order of use.

    Args:
        sizes: name of a weight -> bytes.
        devices: at least one.
    """
    units: dict[str, int] = {}
    for name, size in sizes.items():
        known = _UNIT.match(name)
        key = known[0] if known else name
        units[key] = units.get(key, 0) + size
    total, before, found = max(sum(units.values()), 1), 0, {}
    for unit in sorted(units, key=_order):
        found[unit] = devices[min(before * len(devices) // total, len(devices) - 1)]
        before += units[unit]
    return found


def _order(unit: str) -> tuple[int, int]:
    number = re.search(r"\.(\d+)$", unit)
    # `llm` alone: embeddings and final norm
    rank = SINGLE_SLOTS.index(unit) if unit in SINGLE_SLOTS else len(SINGLE_SLOTS)
    return rank, int(number[1]) if number else 10**9


def require_names(places: Mapping[str, Any], model: nn.Module) -> None:
    """Refuse a prefix that matches no weight of the model."""
    names = [n for n, _ in [*model.named_parameters(), *model.named_buffers()]]
    for prefix in places:
        if prefix and not any(n == prefix or n.startswith(f"{prefix}.") for n in names):
            modules = {n for n, _ in model.named_modules() if n and n.count(".") <= prefix.count(".")}
            raise unknown("part of the model in device_map", prefix, modules)


def dispatch_to_devices(model: nn.Module, places: Mapping[str, torch.device], default: torch.device) -> None:
    """Move every weight to its device, and register hooks that move inputs."""
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        tensor.data = tensor.data.to(place_of(name, places, default))
    move_inputs(model)


def move_inputs(model: nn.Module) -> None:
    """Register hooks that move the inputs of each module to the device of its weights."""
    for module in model.modules():
        devices = {t.device for t in [*module.parameters(), *module.buffers()]}
        if len(devices) == 1:
            module.register_forward_pre_hook(partial(_arrive, device=devices.pop()), with_kwargs=True)


def _arrive(module: nn.Module, args: Any, kwargs: Any, device: torch.device) -> tuple[Any, Any]:
    return _moved(args, device), _moved(kwargs, device)


def _moved(value: Any, device: torch.device) -> Any:
    """Move tensors to a device, also inside tuples, lists, dicts and image features; other values are unchanged."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, (tuple, list)) and type(value) in (tuple, list):
        return type(value)(_moved(v, device) for v in value)
    if type(value) is dict:
        return {k: _moved(v, device) for k, v in value.items()}
    if isinstance(value, UnlikeRows):
        return value.mapped(lambda group: _moved(group, device))
    if isinstance(value, ImageFeatures):
        known = {f.name: getattr(value, f.name) for f in fields(value)}
        moved: dict[str, Any] = {name: v.to(device) for name, v in known.items() if isinstance(v, Tensor)}
        moved |= {name: _moved(getattr(value, name), device) for name in ("block_attention", "deep")}
        return replace(value, **moved)
    return value


def devices_of(device_map: Any, sizes: Mapping[str, int] | None = None) -> tuple[torch.device, dict[str, torch.device]]:
    """Resolve a device map to a default device and a map of prefixes; `auto` uses all accelerators.

    Args:
        device_map: a device, `auto`, or a dict from prefixes of names to devices; None: the CPU.
        sizes: bytes of each weight, for `auto` on several accelerators.
    """
    if isinstance(device_map, Mapping):
        places = places_of(device_map)
        rest = [d for d in places.values() if d.type != "cpu"] or list(places.values())
        return places.get("", rest[0]), places
    if device_map == "auto":
        count = torch.cuda.device_count()
        if count > 1 and sizes:
            places = balance(sizes, [torch.device("cuda", i) for i in range(count)])
            return torch.device("cuda", 0), places
        return torch.device("cuda" if count else "cpu"), {}
    try:
        return torch.device("cpu" if device_map is None else device_map), {}
    except (RuntimeError, TypeError) as error:
        raise ZooError(f"device_map must be auto, a device or a dict, got {device_map!r}.") from error


def placed(model: Any, device_map: Any, dtype: Any, placement: Placement | None = None) -> Any:
    """Move a model to its devices and cast it; on several devices, hooks move the inputs of modules.

    Args:
        model: composed; weights already on their device stay.
        device_map: see `devices_of`; None leaves the model on its device.
        dtype: of the parameters; None or `auto` keeps theirs.
        placement: that a checkpoint was loaded by, with the device map resolved already.
    """
    wanted = dtype_of(dtype)
    if wanted is not None:
        cast_parameters(model, wanted)
    if device_map is None:
        return model
    device, places = (placement.device, placement.places) if placement is not None else devices_of(device_map)
    if isinstance(device_map, Mapping):
        require_names(device_map, model)
    if len({device, *places.values()}) > 1:
        dispatch_to_devices(model, places, device)
    elif any(tensor.device != device for tensors in (model.parameters(), model.buffers()) for tensor in tensors):
        torch.nn.Module.to(model, device=device)
    return model
