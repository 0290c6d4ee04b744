"""Samples in tar shards, as WebDataset writes them: neighbouring members whose names are equal up to the first dot.

Where the samples of a shard are is found once, by the headers of its members, and kept beside it, 16 bytes a sample
(`record_index`). So each process reads the samples that it trains on and no other, whatever the order.
"""

import os
import re
import tarfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from glob import glob
from pathlib import Path
from typing import Any

import numpy as np

from zoo.data.absent import absent
from zoo.data.image_store import TarMember
from zoo.data.record_index import RecordIndex, entries_of
from zoo.data.tar_members import MAX_BYTES, NoFurther, tar_members
from zoo.registry import ZooError

THREADS = 8  # that look for samples, in a shard each
NAME = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]+)")  # what the members of a sample share, and the field
RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
PIECE = 1 << 16  # samples


@dataclass(frozen=True)
class ShardSample:
    """The members of a sample by field, which is what their names end in: `jpg`, `json`, `left.png`."""

    shard: Path
    key: str
    members: dict[str, TarMember]

    @property
    def where(self) -> str:
        """Its place, for messages."""
        return f"{self.shard}::{self.key}"


class Shards:
    """The samples of several shards.

    Args:
        paths: of the shards.

    Raises:
        ZooError: shards are broken, each is named.
    """

    def __init__(self, paths: list[Path]) -> None:
        self.paths = paths
        self._indexes: list[RecordIndex] = []
        found, errors = {}, []
        # Each process begins elsewhere: those of a machine share the work, since a shard is locked while it is read.
        first = os.getpid() % len(paths)
        with ThreadPoolExecutor(THREADS) as pool:
            for path, index in pool.map(_indexed, [*paths[first:], *paths[:first]]):
                if isinstance(index, ZooError):
                    errors.append(str(index))
                else:
                    found[path] = index
        if errors:
            more = f"\nand {len(errors) - 5} more" if len(errors) > 5 else ""
            raise ZooError("\n".join(sorted(errors)[:5]) + more)
        self._indexes = [found[path] for path in paths]
        self.lengths = [len(index) for index in self._indexes]

    def __getitem__(self, place: tuple[int, int]) -> ShardSample:
        """Find the members of a sample, given its shard and its number there.

        Raises:
            ZooError: the shard has changed since it was opened.
        """
        shard, row = place
        path, index = self.paths[shard], self._indexes[shard]
        start, length, _ = index.once(row)
        try:
            with path.open("rb") as file:
                about = os.fstat(file.fileno())
                if (about.st_size, about.st_mtime_ns) != index.state[:2]:
                    raise ZooError(f"{path} has changed since it was opened: start again.")
                file.seek(start)
                short: Any = NoFurther(file, start + length)
                items = list(tarfile.open(fileobj=short, mode="r:"))  # noqa: SIM115  closed with the file
        except (tarfile.TarError, OSError) as error:
            raise ZooError(f"{path}, sample {row + 1}, cannot be read: {error}") from None
        members, key = {}, ""
        for item in items:
            if item.isfile() and not item.issparse() and (named := NAME.fullmatch(item.name)):
                key, field = named[1], named[2].lower()
                members[field] = TarMember(str(path), item.name, item.offset_data, item.size)
        return ShardSample(path, key, members)


def _indexed(path: Path) -> tuple[Path, RecordIndex | ZooError]:
    try:
        return path, RecordIndex(path, lambda: _samples(path))
    except ZooError as error:
        return path, error
    except OSError as error:
        return path, ZooError(f"{path} cannot be read: {error.strerror}.")


def _samples(path: Path) -> Iterator[np.ndarray]:
    """Find the samples of a shard: arrays of `ENTRY`, with the number of members in place of the line.

    Raises:
        ZooError: the shard is broken, or members of a sample are in several places of it.
    """
    starts: list[int] = []
    ends: list[int] = []
    counts: list[int] = []
    seen: set[str] = set()
    fields: set[str] = set()
    last = None
    for item in tar_members(path):
        if (named := NAME.fullmatch(item.name)) is None:
            continue
        key, field = named[1], named[2].lower()
        if key != last:
            if key in seen:
                raise ZooError(
                    f"{path}: the members of sample {key!r} are not next to each other. Pack them in the order of "
                    "their names: tar --sort=name."
                )
            seen.add(key)
            fields, last = set(), key
            starts.append(item.offset)
            ends.append(0)
            counts.append(0)
        if field in fields:
            raise ZooError(f"{path}: the member {item.name[:200]!r} is there twice.")
        fields.add(field)
        counts[-1] += 1
        ends[-1] = item.offset_data + -(-item.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE  # they fill whole blocks
        if ends[-1] - starts[-1] > MAX_BYTES:
            raise ZooError(f"{path}: sample {key!r} has more than {MAX_BYTES:,} bytes.")
    for at in range(0, len(starts), PIECE):
        yield entries_of(*(np.array(x[at : at + PIECE], np.int64) for x in (starts, ends, counts)))


def find_shards(place: str) -> list[Path]:
    """Return the shards in a folder, or of a name, which may have `*` or a range such as `{0000..0127}`.

    Raises:
        ZooError: there are none, or one of a range is missing.
    """
    if "://" in place or place.startswith("pipe:"):
        raise ZooError(f"shards={place!r} is an address or a command; shards are files of a disk that is mounted.")
    if Path(place).is_dir():
        found = sorted(path for path in Path(place).glob("*.tar") if path.is_file())
    else:
        found = []
        for name in _of_range(place):
            matches = sorted(glob(name)) if set(name) & set("*?[") else [name]  # noqa: PTH207  may be absolute
            found += [Path(match) for match in matches]
    missing = next((path for path in found if not path.exists()), None)
    if missing is not None or not found:
        raise absent(missing or place, "It holds samples in tar shards.", what="tar shard")
    if wrong := next((path for path in found if path.suffix.lower() != ".tar"), None):
        raise ZooError(f"{wrong} is not a .tar file. Packed ones (.tar.gz) have to be unpacked: gunzip {wrong.name}.")
    return found


def _of_range(place: str) -> Iterator[str]:
    """Write out the ranges of a name, as shells do: `{08..11}` is 08, 09, 10, 11."""
    if (found := RANGE.search(place)) is None:
        yield place
        return
    first, last = found[1], found[2]
    width = len(first) if first.startswith("0") else 0
    for number in range(int(first), int(last) + 1):
        yield from _of_range(place[: found.start()] + str(number).zfill(width) + place[found.end() :])
