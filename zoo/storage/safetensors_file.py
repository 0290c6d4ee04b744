"""Load safetensors directly into parameters, one tensor at a time.

On the CPU and in the dtype of the file, a parameter is a private memory map of the file: pages are read on first use,
and writes stay in this process. Otherwise each tensor is read through one buffer. A shard is never in memory beside the
parameters.
"""

import json
import math
import mmap
import sys
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from zoo.registry import ZooError
from zoo.registry.foreign import require_file

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
_LONGEST_HEADER = 32 << 20  # bytes: 100 000 tensors take 15 MB; the limit of the safetensors library is 100 MB
_MOST_DIMENSIONS = 64  # as in torch; the product of a million sizes would take hours
_MAPPED = 1 << 20  # smallest tensor to map, in bytes; smaller ones are read
_COMPARED = 1 << 24  # numbers compared at a time
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes of a number


@dataclass(frozen=True)
class Stored:
    """A tensor in a safetensors file."""

    file: Path
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int  # byte in the file
    bytes: int


@dataclass(frozen=True)
class Joined:
    """A tensor stored in pieces of one dtype, such as a matrix per expert."""

    shape: tuple[int, ...]
    pieces: tuple[tuple[Stored, tuple[int | slice, ...]], ...]  # each with its index in the whole tensor
    turned: bool = False  # the last two sides of each piece are exchanged in the file

    @property
    def dtype(self) -> torch.dtype:
        return self.pieces[0][0].dtype

    @property
    def bytes(self) -> int:
        return sum(stored.bytes for stored, _ in self.pieces)


def listing(files: Iterable[Path]) -> dict[str, Stored]:
    """Read the headers of safetensors files: name -> location of the tensor.

    Raises:
        ZooError: a file is not in this format, is truncated, or a tensor is out of its bounds.
    """
    # Headers only: a few kilobytes per file, whatever the size of its tensors.
    found: dict[str, Stored] = {}
    for file in files:
        for stored in tensors_in(file, *header_of(file)):
            found[stored.name] = stored
    return found


def header_of(file: Path) -> tuple[dict[str, Any], int, int]:
    """Read the header of a safetensors file: its JSON object, the byte behind it, and the size of the file.

    Raises:
        ZooError: the file is missing, or has no header of this format.
    """
    try:
        if not file.exists():
            raise ZooError(f"The weights file {str(file)!r} is missing.")
        size = require_file(file)
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            # Checked before the header is read: a file of 8 bytes could state a header of any size.
            if not 0 < length <= min(_LONGEST_HEADER, size - 8):
                raise ZooError(f"{str(file)!r} is not a whole safetensors file: its header would take {length} bytes.")
            content = json.loads(stream.read(length))
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, ZooError):
            raise
        raise ZooError(f"{str(file)!r} is not a safetensors file: {error}") from error
    if not isinstance(content, dict):
        raise ZooError(f"{str(file)!r} is not a safetensors file: its header is not an object.")
    return content, 8 + length, size


def tensors_in(file: Path, content: Mapping[str, Any], begin: int, size: int) -> list[Stored]:
    """Return the tensors that a header (of `header_of`) states, each within the file and apart from the others.

    Raises:
        ZooError: an entry cannot be read, is out of bounds, or shares bytes with another.
    """
    tensors = []
    for name, entry in content.items():
        if name == "__metadata__":
            continue
        try:
            dtype, shape = DTYPES[entry["dtype"]], tuple(int(n) for n in entry["shape"][:_MOST_DIMENSIONS])
            first, last = (int(n) for n in entry["data_offsets"])
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise ZooError(f"{str(file)!r}: the entry of {name!r} cannot be read: {entry!r:.80}.") from error
        stored = Stored(file, name, dtype, shape, begin + first, last - first)
        # Offsets come from the file: without this check, a map or a read could leave the file or misread a neighbour.
        if (
            first < 0
            or any(n < 0 for n in shape)
            or stored.start + stored.bytes > size
            or stored.bytes != math.prod(shape) * dtype.itemsize
        ):
            raise ZooError(f"{str(file)!r} is truncated or wrong: {name!r} is at bytes {first} to {last} of {size}.")
        tensors.append(stored)
    _refuse_overlap(file, tensors)
    return tensors


def _refuse_overlap(file: Path, tensors: Iterable[Stored]) -> None:
    """Refuse tensors that share bytes: a small file could state any number of large tensors."""
    last = None
    for stored in sorted((t for t in tensors if t.bytes), key=lambda t: t.start):
        if last is not None and stored.start < last.start + last.bytes:
            raise ZooError(f"{str(file)!r} is wrong: {stored.name!r} and {last.name!r} share bytes.")
        last = stored


def read(stored: Stored | Joined, target: Tensor) -> None:
    """Read a tensor into `target` of the same shape; another dtype or device goes through one buffer."""
    # Pieces are read into views of the target, without a buffer of the whole.
    if isinstance(stored, Joined):
        for piece, at in stored.pieces:
            part = target.detach()[at]
            read(piece, part.transpose(-1, -2) if stored.turned else part)
        return
    # Into the target itself if it has the layout of the file, else through a buffer that lives for this one tensor.
    straight = target.dtype == stored.dtype and target.device.type == "cpu" and target.is_contiguous()
    place = target.detach() if straight else torch.empty(stored.shape, dtype=stored.dtype, device="cpu")
    if stored.bytes:
        flat: Any = place.view(-1).view(torch.uint8).numpy()
        view = memoryview(flat)
        with stored.file.open("rb", buffering=0) as stream:
            stream.seek(stored.start)
            while len(view):
                count = stream.readinto(view)  # Linux reads at most 2 GB per call
                if not count:
                    raise ZooError(f"{str(stored.file)!r} ends in the middle of {stored.name!r}.")
                view = view[count:]
    if not straight:
        with torch.no_grad():
            target.copy_(place)


def mapped(stored: Stored | Joined) -> Tensor | None:
    """Map a tensor as private pages of its file; None if it is small or not aligned to its dtype.

    ACCESS_COPY: writes to the parameter copy a page and never reach the file.
    """
    if (
        isinstance(stored, Joined)
        or stored.bytes < _MAPPED
        or stored.start % stored.dtype.itemsize
        or sys.platform == "win32"
    ):
        return None
    first = stored.start // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY  # maps must begin at a page
    end = stored.start + stored.bytes
    with stored.file.open("rb") as stream:
        pages = mmap.mmap(stream.fileno(), end - first, access=mmap.ACCESS_COPY, offset=first)
    flat = torch.frombuffer(pages, dtype=stored.dtype, count=math.prod(stored.shape), offset=stored.start - first)
    return flat.view(stored.shape)


def holds(tensor: Tensor, stored: Stored | Joined) -> bool:
    """Whether `tensor` is bit for bit what reading `stored` into it would give."""
    if isinstance(stored, Joined):
        parts = ((tensor[at].transpose(-1, -2) if stored.turned else tensor[at], piece) for piece, at in stored.pieces)
        return tuple(tensor.shape) == stored.shape and all(holds(part, piece) for part, piece in parts)
    return same(tensor, value_of(stored))


def value_of(stored: Stored | Joined) -> Tensor:
    """Return a tensor as stored in its file, on the CPU, mapped if possible."""
    value = mapped(stored)
    if value is None:
        value = torch.empty(stored.shape, dtype=stored.dtype, device="cpu")
        read(stored, value)
    return value


@torch.no_grad()
def same(tensor: Tensor, base: Tensor) -> bool:
    """Whether `tensor`, on any device, is bit for bit what loading `base` in the tensor's dtype gives."""
    if tensor.shape != base.shape or tensor.is_floating_point() != base.is_floating_point():
        return False
    mine, theirs = tensor.detach().reshape(-1), base.detach().reshape(-1)
    # In pieces: a whole tensor of another device or dtype would be copied beside both.
    for start in range(0, mine.numel(), _COMPARED):
        piece = mine[start : start + _COMPARED].cpu()
        other = theirs[start : start + _COMPARED].to(device="cpu", dtype=piece.dtype)
        if not _same_bits(piece, other):
            return False
    return True


def _same_bits(a: Tensor, b: Tensor) -> bool:
    """Compare contiguous tensors of one dtype as integers: NaN equals itself, and 0 differs from -0."""
    size = a.element_size()
    if all(t.numel() * size % 8 == 0 and t.storage_offset() * size % 8 == 0 for t in (a, b)):
        size = 8  # as int64, four times as fast as int16
    return torch.equal(a.view(_INTEGERS.get(size, torch.uint8)), b.view(_INTEGERS.get(size, torch.uint8)))


@dataclass
class Filled:
    """Result of filling modules from files."""

    missing: list[str] = field(default_factory=list)  # names of parameters that no file has
    other_shape: list[str] = field(default_factory=list)  # descriptions of mismatches
    used: set[str] = field(default_factory=set)  # names of the files' tensors that were used
    tensors: dict[int, Tensor] = field(default_factory=dict)  # id -> loaded tensor


def fill(
    modules: Mapping[str, nn.Module],
    tensors: Mapping[str, Stored | Joined],
    *,
    place: Callable[[str], torch.device],
    dtype: torch.dtype | None,
    wide: Collection[int] = (),
) -> Filled:
    """Replace parameters and buffers of modules, on the meta device or not, by the values in `tensors`.

    Args:
        modules: name of a part -> module; the part's name is a prefix of the names of its parameters.
        tensors: full name -> location in a file.
        place: full name -> device.
        dtype: of floating point parameters; None keeps that of the file.
        wide: ids of parameters and buffers that become float32 whatever `dtype` is.
    """
    done = Filled()
    made: dict[int, Tensor] = {}
    for part, module in modules.items():
        _compute_buffers(module, place(part))
        # All names of a tied tensor: a file may have it under any of them. It is loaded once and assigned to each slot.
        aliases: dict[int, list[str]] = {}
        slots = [s for owner in _owners(module, part) for s in owner]
        for table, key, name in slots:
            aliases.setdefault(id(table[key]), []).append(name)
        for table, key, _ in slots:
            old = table[key]
            if id(old) not in made:  # a tied tensor is made once, for the first of its slots
                names = aliases[id(old)]
                wanted = torch.float32 if id(old) in wide else dtype
                made[id(old)] = _filled(old, names, tensors, place(names[0]), wanted, done)
                made[id(made[id(old)])] = made[id(old)]
            table[key] = made[id(old)]
    return done


def _owners(module: nn.Module, part: str) -> Iterable[list[tuple[Any, str, str]]]:
    """Yield, for each submodule, its parameters and saved buffers: table, key, full name."""
    for path, owner in module.named_modules(remove_duplicate=False):
        prefix = ".".join(p for p in (part, path) if p)
        yield [(owner._parameters, k, f"{prefix}.{k}") for k, v in owner._parameters.items() if v is not None] + [
            (owner._buffers, k, f"{prefix}.{k}")
            for k, v in owner._buffers.items()
            if v is not None and k not in owner._non_persistent_buffers_set
        ]


def _filled(
    old: Tensor,
    names: list[str],
    tensors: Mapping[str, Stored | Joined],
    device: torch.device,
    dtype: torch.dtype | None,
    done: Filled,
) -> Tensor:
    stored = next((tensors[n] for n in names if n in tensors), None)
    done.used.update(n for n in names if n in tensors)
    if stored is None or tuple(stored.shape) != tuple(old.shape):
        if stored is None:
            done.missing.append(names[0])
        else:
            done.other_shape.append(f"{names[0]}: {stored.shape} in the file, {tuple(old.shape)} in the model")
        return old
    wanted = dtype if dtype is not None and stored.dtype.is_floating_point else stored.dtype
    # Without a cast or a transfer the file's pages are the parameter; nothing is read until it is used.
    value = mapped(stored) if device.type == "cpu" and wanted == stored.dtype else None
    if value is None:
        value = torch.empty(stored.shape, dtype=wanted, device=device)
        read(stored, value)
    new = nn.Parameter(value, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else value
    done.tensors[id(new)] = new
    return new


def _compute_buffers(module: nn.Module, device: torch.device) -> None:
    """Compute buffers that are not saved (rotary frequencies, position ids) in modules built on the meta device.

    transformers computes them in `_init_weights`, which skips parameters on the meta device.
    """
    from transformers import PreTrainedModel

    for model in module.modules():
        if not isinstance(model, PreTrainedModel):
            continue
        for owner in model.modules():
            # Allocated first: `_init_weights` writes into buffers, and cannot move them off the meta device.
            unsaved = {k: owner._buffers.get(k) for k in owner._non_persistent_buffers_set}
            empty = {k: b for k, b in unsaved.items() if b is not None and b.is_meta}
            for key, buffer in empty.items():
                owner._buffers[key] = torch.empty_like(buffer, device=device)
            if empty:
                model._init_weights(owner)
