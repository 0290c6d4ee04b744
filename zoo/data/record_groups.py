"""Which records make up each sample: one each, or all about the same images; as arrays, for millions of them."""

import contextlib
import glob
import hashlib
import os
from array import array
from collections.abc import Callable
from pathlib import Path

import numpy as np


class Groups:
    """Record numbers of each sample, samples in the order of their first record.

    Args:
        number: samples.
        members: record numbers, sample by sample; None: sample n is record n.
        ends: where in `members` each sample ends.
    """

    def __init__(self, number: int, members: np.ndarray | None = None, ends: np.ndarray | None = None) -> None:
        self._number, self._members, self._ends = number, members, ends

    def __len__(self) -> int:
        return self._number

    def __getitem__(self, index: int) -> list[int]:
        if self._members is None or self._ends is None:
            return [range(self._number)[index]]
        index = range(self._number)[index]
        start = int(self._ends[index - 1]) if index else 0
        found: list[int] = self._members[start : int(self._ends[index])].tolist()
        return found


class Grouping:
    """Collects records, and what they share, and groups them: 24 bytes a record, whatever they share."""

    def __init__(self) -> None:
        self._members, self._high, self._low = array("q"), array("Q"), array("Q")

    def add(self, record: int, shared: str | None) -> None:
        """Add a record; those of equal `shared` are one sample, None: a sample of its own."""
        if shared is None:
            high, low = 2**64 - 1, record
        else:
            digest = hashlib.blake2b(shared.encode(errors="surrogatepass"), digest_size=16).digest()
            high, low = int.from_bytes(digest[:8], "little") >> 1, int.from_bytes(digest[8:], "little")
        self._members.append(record)
        self._high.append(high)
        self._low.append(low)

    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the members, sample by sample, and the ends of the samples: (R,) and (S,) int64."""
        if not self._members:
            return np.empty(0, np.int64), np.empty(0, np.int64)
        members = np.frombuffer(self._members, np.int64)
        high, low = np.frombuffer(self._high, np.uint64), np.frombuffer(self._low, np.uint64)
        order = np.lexsort((members, low, high))
        high, low, members = high[order], low[order], members[order]
        starts = np.flatnonzero(np.concatenate([[True], (high[1:] != high[:-1]) | (low[1:] != low[:-1])]))
        sizes = np.diff(starts, append=len(members))
        by_first = np.argsort(members[starts])
        starts, sizes = starts[by_first], sizes[by_first]
        ends = np.cumsum(sizes)
        return members[np.repeat(starts - (ends - sizes), sizes) + np.arange(len(members))], ends


def kept_groups(file: Path | None, make: Callable[[], Grouping]) -> Groups:
    """Return groups that are kept in a file, mapped into memory; made, and kept if possible, where it is not there.

    Args:
        file: `RecordFile.beside`; those of earlier states of the records are deleted. None: they are not kept.
        make: reads the records.
    """
    with contextlib.suppress(OSError, ValueError, EOFError, IndexError):  # absent, or emptied by a crash
        if file is not None:
            stored = np.load(file, mmap_mode="r", allow_pickle=False)  # members, ends, the number of ends
            number = int(stored[-1])
            members, ends = stored[: -1 - number], stored[-1 - number : -1]
            if stored.dtype == np.int64 and number >= 0 and len(members) == (int(ends[-1]) if number else 0):
                return Groups(number, members, ends)
    members, ends = make().arrays()
    if file is not None:
        aside = file.with_name(f"{file.name}.{os.getpid()}")
        with contextlib.suppress(OSError):
            with aside.open("wb") as out:
                np.save(out, np.concatenate([members, ends, [len(ends)]]))
            aside.replace(file)
            present = file.name.rpartition("-")[0]
            stem = present.rpartition("-")[0]
            for other in file.parent.glob(f"{glob.escape(stem)}-*") if stem else ():
                if not other.name.startswith(f"{present}-"):  # of the records before they changed
                    other.unlink()
        with contextlib.suppress(OSError):
            aside.unlink()
    return Groups(len(ends), members, ends)
