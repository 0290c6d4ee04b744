"""Tensors of a file that `torch.save` wrote before version 1.6, read without running its pickles.

Such a file is a row of pickles (a magic number, a protocol, sizes of types, the tensors' places, the keys of storages)
and the numbers of each storage behind them. A pickle is a program, and unpickling runs it. Here its instructions are
read as a list; the handful of which a dict of tensors is made get a meaning, in this file, and any other is refused.
"""

import math
import os
import pickletools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from zoo.registry import ZooError

_MAGIC, _PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
_STORAGES = {"torch FloatStorage": "<f4", "torch LongStorage": "<i8"}  # names in a pickle -> numpy's type
_DICT, _TENSOR = "collections OrderedDict", "torch._utils _rebuild_tensor_v2"
_NAMES = {*_STORAGES, _DICT, _TENSOR}  # words in this file: nothing is looked up or called by them
_VALUES = {"BINUNICODE", "BININT", "BININT1", "BININT2", "LONG1"}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}


@dataclass(frozen=True)
class _Name:
    """A class or function that a pickle names."""

    text: str


@dataclass(frozen=True)
class _Storage:
    kind: str
    key: str
    numbers: int


@dataclass(frozen=True)
class _Place:
    """Where the numbers of a tensor are."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


_MARK = object()
REPEATED = 1 << 20  # numbers of a tensor that repeats those of a shorter storage, at most


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a file by name.

    Raises:
        ZooError: the file is not of this form, or has an instruction that tensors do not need.
    """
    try:
        with path.open("rb") as file:
            return _tensors(file)
    except ZooError as error:
        raise ZooError(f"{str(path)!r} is not read: {error}") from error
    except (ValueError, IndexError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise ZooError(f"{str(path)!r} is not a file of tensors: {' '.join(str(error).split())}") from error


def _tensors(file: BinaryIO) -> dict[str, Tensor]:
    if _value(file) != _MAGIC or _value(file) != _PROTOCOL:
        raise ZooError("it does not begin as files of tensors do.")
    if _value(file).get("little_endian") is not True:
        raise ZooError("its numbers are not little-endian.")
    places, keys = _value(file), _value(file)
    if not isinstance(places, dict) or not all(isinstance(place, _Place) for place in places.values()):
        raise ZooError("it holds something else than a dict of tensors.")
    storages = {place.storage.key: place.storage for place in places.values()}
    if sorted(storages) != sorted(keys):
        raise ZooError("its list of storages is not that of its tensors.")
    numbers = {key: _numbers(file, storages[key]) for key in keys}
    return {name: _tensor(numbers[place.storage.key], place, name) for name, place in places.items()}


def _numbers(file: BinaryIO, storage: _Storage) -> np.ndarray:
    if int.from_bytes(file.read(8), "little") != storage.numbers:
        raise ZooError("a storage has another size than its tensors state.")
    dtype = np.dtype(_STORAGES[storage.kind])
    left = os.fstat(file.fileno()).st_size - file.tell()
    if storage.numbers * dtype.itemsize > left:  # before as much memory is taken
        raise ZooError(f"a storage states {storage.numbers:,} numbers, and the file has {left:,} bytes more.")
    return np.frombuffer(file.read(storage.numbers * dtype.itemsize), dtype, storage.numbers)


def _tensor(numbers: np.ndarray, place: _Place, name: str) -> Tensor:
    sizes = [*place.shape, *place.stride, place.offset]
    last = place.offset + sum((n - 1) * step for n, step in zip(place.shape, place.stride, strict=True))
    if min(sizes, default=0) < 0 or (0 not in place.shape and last >= len(numbers)):
        raise ZooError(f"{name!r} lies outside of its storage.")
    if math.prod(place.shape) > max(len(numbers), REPEATED):  # a stride of 0 makes any size of a few numbers
        raise ZooError(f"{name!r} states {math.prod(place.shape):,} numbers, and its storage has {len(numbers):,}.")
    view = torch.as_strided(torch.from_numpy(numbers.copy()), place.shape, place.stride, place.offset)
    return view.clone(memory_format=torch.contiguous_format)


# ---- the instructions of a pickle ------------------------------------------------------------------------------------


def _value(file: BinaryIO) -> Any:
    """Return the value that the next pickle of a file describes."""
    stack: list[Any] = []
    memo: dict[int, Any] = {}
    argument: Any
    for instruction, argument, _ in pickletools.genops(file):
        name = instruction.name
        if name == "STOP":
            break
        if name in _VALUES:
            stack.append(argument)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in ("BINPUT", "LONG_BINPUT"):
            memo[argument] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif name in _BUILDERS:
            _BUILDERS[name](stack, argument)
        elif name != "PROTO":
            raise ZooError(f"it has the instruction {name}, which tensors do not need.")
    (value,) = stack
    return value


def _marked(stack: list[Any]) -> list[Any]:
    """Take what lies above the last mark."""
    at = max(i for i, item in enumerate(stack) if item is _MARK)
    items = stack[at + 1 :]
    del stack[at:]
    return items


def _last(stack: list[Any], count: int) -> tuple[Any, ...]:
    """Take the last items, the earliest first."""
    return tuple(reversed([stack.pop() for _ in range(count)]))


def _set(stack: list[Any], pairs: Sequence[Any]) -> None:
    if not isinstance(stack[-1], dict):
        raise ZooError("it sets items of something else than a dict.")
    stack[-1].update(zip(pairs[::2], pairs[1::2], strict=True))


def _append(stack: list[Any], items: Sequence[Any]) -> None:
    if not isinstance(stack[-1], list):
        raise ZooError("it appends to something else than a list.")
    stack[-1].extend(items)


def _named(stack: list[Any], argument: Any) -> None:
    if argument not in _NAMES:
        raise ZooError(f"it names {argument!r}, which tensors do not need.")
    stack.append(_Name(argument))


def _stored(stack: list[Any], _: Any) -> None:
    word, kind, key, _place, numbers, _view = stack.pop()
    if word != "storage" or kind.text not in _STORAGES or not isinstance(numbers, int) or not isinstance(key, str):
        raise ZooError("it refers to something else than a storage of numbers.")
    stack.append(_Storage(kind.text, key, numbers))


def _made(stack: list[Any], _: Any) -> None:
    arguments, made = stack.pop(), stack.pop()
    if made == _Name(_DICT) and arguments == ():
        stack.append({})
    elif made == _Name(_TENSOR) and isinstance(arguments[0], _Storage):
        storage, offset, shape, stride, *_rest = arguments
        stack.append(_Place(storage, offset, shape, stride))
    else:
        raise ZooError(f"it makes something else than a dict or a tensor: {made!r:.60}.")


def _with_state(stack: list[Any], _: Any) -> None:
    stack.pop()  # versions of modules, as attributes of the dict
    if not isinstance(stack[-1], dict):
        raise ZooError("it sets attributes of something else than a dict.")


_BUILDERS: dict[str, Callable[[list[Any], Any], None]] = {
    "MARK": lambda stack, _: stack.append(_MARK),
    "EMPTY_DICT": lambda stack, _: stack.append({}),
    "EMPTY_LIST": lambda stack, _: stack.append([]),
    "EMPTY_TUPLE": lambda stack, _: stack.append(()),
    "TUPLE": lambda stack, _: stack.append(tuple(_marked(stack))),
    "TUPLE1": lambda stack, _: stack.append((stack.pop(),)),
    "TUPLE2": lambda stack, _: stack.append(_last(stack, 2)),
    "TUPLE3": lambda stack, _: stack.append(_last(stack, 3)),
    "SETITEM": lambda stack, _: _set(stack, _last(stack, 2)),
    "SETITEMS": lambda stack, _: _set(stack, pairs) if (pairs := _marked(stack)) else None,
    "APPEND": lambda stack, _: _append(stack, _last(stack, 1)),
    "APPENDS": lambda stack, _: _append(stack, items) if (items := _marked(stack)) else None,
    "GLOBAL": _named,
    "BINPERSID": _stored,
    "REDUCE": _made,
    "BUILD": _with_state,
}
