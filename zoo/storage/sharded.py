"""Tensors that several processes hold in parts: written by each as a file of its own, read by any number of them.

A part is written as safetensors with its place in the whole tensor, in the header entries that torch's
`HuggingFaceStorageReader` reads, so that `torch.distributed.checkpoint.load` can open the files without this package.
"""

import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zoo.registry import ZooError
from zoo.storage.safetensors_file import DTYPES, Joined, Stored, header_of, read, tensors_in, value_of

PLACES, OFFSETS = "DCP_SHARDING_INFO", "saved_offsets"  # as torch/distributed/checkpoint/_hf_utils.py names them
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_WRITTEN = 8 << 20  # bytes that are hashed while they are written


@dataclass(frozen=True)
class Part:
    """A part of a tensor, as a file names it: what is where in the whole tensor."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offsets: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def write_parts(file: Path, parts: Sequence[Part], values: Iterator[Tensor]) -> str:
    """Write a safetensors file, flush it to the disk, and return its SHA-256.

    Tensors go to the file one at a time, from their own memory where they are contiguous and on the CPU.

    Args:
        file: to write; it must not exist.
        parts: in the order of `in_order`.
        values: of the parts, one at a time.
    """
    entries: dict[str, Any] = {"__metadata__": _metadata(parts)}
    end = 0
    for part in parts:
        start, end = end, end + part.bytes
        entries[part.name] = {"dtype": _NAMES[part.dtype], "shape": part.shape, "data_offsets": [start, end]}
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)  # the numbers begin at a multiple of their size
    digest = hashlib.sha256()
    with file.open("xb") as stream, ThreadPoolExecutor(1) as other:

        def put(data: Any) -> None:
            # Large pieces are hashed by another thread: both hashing and writing release Python's lock.
            if len(data) <= _WRITTEN // 8:
                digest.update(data)
                stream.write(data)
                return
            hashed = other.submit(digest.update, data)
            stream.write(data)
            hashed.result()

        put(len(header).to_bytes(8, "little") + header)
        for part, value in zip(parts, values, strict=True):
            flat: Any = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
            assert flat.nbytes == part.bytes, f"{part.name!r} has {flat.nbytes} bytes, {part.bytes} were planned"
            for start in range(0, flat.nbytes, _WRITTEN):
                put(memoryview(flat[start : start + _WRITTEN]))
        stream.flush()
        os.fsync(stream.fileno())
    return digest.hexdigest()


def in_order(parts: Iterable[Part]) -> list[Part]:
    """Sort parts as safetensors does: wide numbers first, so that each begins at a multiple of its size."""
    return sorted(parts, key=lambda part: (-part.dtype.itemsize, part.name))


def _metadata(parts: Iterable[Part]) -> dict[str, str]:
    places = {part.name: {OFFSETS: part.offsets} for part in parts}
    return {"format": "pt", "DCP_VERSION": "1.0", PLACES: json.dumps(places, separators=(",", ":"))}


def listing_of_parts(files: Iterable[Path]) -> dict[str, Stored | Joined]:
    """Read the headers of files by `write_parts`, or of plain safetensors: name -> location of the whole tensor.

    Raises:
        ZooError: a file is none of these, or the parts of a tensor do not make up a whole one.
    """
    found: dict[str, list[tuple[Stored, tuple[int, ...]]]] = {}
    for file in files:
        content, begin, size = header_of(file)
        places = _places(file, content)
        for stored in tensors_in(file, content, begin, size):
            found.setdefault(stored.name, []).append((stored, _offsets(stored, places)))
    return {name: _whole(name, parts) for name, parts in found.items()}


def _places(file: Path, content: dict[str, Any]) -> dict[str, Any]:
    metadata = content.get("__metadata__")
    text = metadata.get(PLACES) if isinstance(metadata, dict) else None
    try:
        places = json.loads(text) if text else {}
    except (TypeError, ValueError, RecursionError) as error:
        raise ZooError(f"{str(file)!r}: the places of its tensors cannot be read: {error}") from error
    if not isinstance(places, dict):
        raise ZooError(f"{str(file)!r}: the places of its tensors are not an object.")
    return places


def _offsets(stored: Stored, places: dict[str, Any]) -> tuple[int, ...]:
    if stored.name not in places:
        return (0,) * len(stored.shape)
    given = places[stored.name].get(OFFSETS) if isinstance(places[stored.name], dict) else None
    if (
        not isinstance(given, list)
        or len(given) != len(stored.shape)
        or not all(type(n) is int and 0 <= n < 1 << 62 for n in given)
    ):
        raise ZooError(f"{str(stored.file)!r}: the place of {stored.name!r} cannot be read: {given!r:.80}.")
    return tuple(given)


def _whole(name: str, parts: Sequence[tuple[Stored, tuple[int, ...]]]) -> Stored | Joined:
    first = parts[0][0]
    if len({(p.dtype, len(p.shape)) for p, _ in parts}) == 1:
        ends = [tuple(o + n for o, n in zip(at, p.shape, strict=True)) for p, at in parts]
        shape = tuple(map(max, zip(*ends, strict=True)))
        # The numbers in the files bound the size, so that no file can state a tensor that fills memory.
        if sum(math.prod(p.shape) for p, _ in parts) == math.prod(shape) and not _overlap(parts):
            pieces = [
                (p, tuple(slice(o, o + n) for o, n in zip(at, p.shape, strict=True)))
                for p, at in parts
                if math.prod(p.shape)
            ]
            return first if len(parts) == 1 else Joined(shape, tuple(pieces) or ((first, ()),))
    raise ZooError(f"The parts of {name!r} in {str(first.file.parent)!r} do not make up one tensor.")


def _overlap(parts: Sequence[tuple[Stored, tuple[int, ...]]]) -> bool:
    """Whether two parts have numbers in common: then others are in none, although their count is right."""
    boxes = sorted((at, p.shape) for p, at in parts if math.prod(p.shape))
    if all(a[0] + n[0] <= b[0] for (a, n), (b, _) in pairwise(boxes)):  # of rows, as shards are
        return False
    return any(
        all(x < y + m and y < x + n for x, n, y, m in zip(*one, *other, strict=True))
        for one, other in combinations(boxes, 2)
    )


# ---- reading what a process holds --------------------------------------------------------------------------------


def read_own(stored: Stored | Joined, target: Tensor) -> None:
    """Read a stored tensor into one of the same shape: of a sharded one, the part that this process holds.

    Bytes of other parts are not read. Another data type or device goes through a buffer of the size of the part.
    """
    if not hasattr(target, "to_local"):
        read(stored, target)
        return
    sharded: Any = target
    local, offsets = sharded.to_local(), offsets_of(sharded)
    if local.numel():
        read_box(stored, local.detach(), offsets)


def offsets_of(tensor: Any) -> tuple[int, ...]:
    """Return where the part that this process holds begins in a sharded tensor."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset  # as torch's checkpoints do

    return tuple(compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)[1])


@torch.no_grad()
def read_box(stored: Stored | Joined, target: Tensor, offsets: Sequence[int]) -> None:
    """Read a box of a stored tensor.

    Args:
        stored: the whole tensor.
        target: of the box's shape.
        offsets: of the box in the whole tensor.

    Raises:
        ZooError: the pieces of the stored tensor do not fill the box.
    """
    pieces = stored.pieces if isinstance(stored, Joined) else ((stored, ()),)
    turned = isinstance(stored, Joined) and stored.turned
    filled = 0
    for piece, at in pieces:
        if (cut := _cut(at, stored.shape, target.shape, offsets)) is not None:
            inner, outer = cut
            part, value = target[outer], value_of(piece)  # a map of the file: pages that are not copied are not read
            part.copy_((value.transpose(-1, -2) if turned else value)[inner])
            filled += part.numel()
    if filled != target.numel():
        raise ZooError(f"The files hold {filled:,} of the {target.numel():,} numbers of a part of a tensor.")


def _cut(
    at: Sequence[int | slice], whole: Sequence[int], box: Sequence[int], offsets: Sequence[int]
) -> tuple[tuple[slice, ...], tuple[int | slice, ...]] | None:
    """Return what a piece and a box have in common, as indices in the piece and in the box; None: nothing.

    Args:
        at: index of the piece in the whole tensor, for its first sides.
        whole, box: shapes.
        offsets: of the box.
    """
    inner: list[slice] = []
    outer: list[int | slice] = []
    for side, index in enumerate([*at, *[slice(None)] * (len(whole) - len(at))]):
        first, last = offsets[side], offsets[side] + box[side]
        if isinstance(index, int):
            if not first <= index < last:
                return None
            outer.append(index - first)
            continue
        start, stop, _ = index.indices(whole[side])
        low, high = max(start, first), min(stop, last)
        if low >= high:
            return None
        inner.append(slice(low - start, high - start))
        outer.append(slice(low - first, high - first))
    return tuple(inner), tuple(outer)
