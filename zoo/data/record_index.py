"""Where the records of a large file are: found once, kept beside the file, read from the disk by every process.

16 bytes a record, `.NAME.zoo-index`: start, length and line of each. Neither the file nor the index is in memory:
both are read by position, which forked workers may do side by side. The index belongs to one state of its file, by
size, time and a checksum of both ends, and is made anew for another.
"""

import contextlib
import os
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from zoo.registry import ZooError

ENTRY = np.dtype([("start", "<i8"), ("length", "<u4"), ("line", "<u4")])  # 16 bytes
MAX_RECORD = (1 << 32) - 1  # bytes, the largest length of an entry
HEADER = 64  # bytes: magic, size, time and checksum of the file, number of records; the rest is 0
MAGIC = int.from_bytes(b"zoo-idx1", "little")
CHUNK = 8 << 20  # bytes of the file that are searched for ends of lines at a time
ENDS = 1 << 16  # bytes at either end of the file that the checksum covers


class RecordIndex:
    """The places of the records of one file.

    Args:
        path: the file.
        find: makes the places, as arrays of `ENTRY`, where the index is not there yet.
    """

    def __init__(self, path: Path, find: Callable[[], Iterator[np.ndarray]]) -> None:
        self.path = path
        self.file = path.with_name(f".{path.name}.zoo-index")
        self._entries: np.ndarray | None = None  # in memory, where the folder cannot be written
        with path.open("rb") as data, _alone(data.fileno()):
            self.state = _state(data.fileno())
            if (number := self._stored()) is None:
                number = self._make(find)
        self._number = number
        self._open: Any = None

    def __len__(self) -> int:
        return self._number

    def __getitem__(self, index: int) -> tuple[int, int, int]:
        """Return start, length and line of a record."""
        if self._entries is None and self._open is None:
            self._open = self._opened()
        return self._entry(self._open, index)

    def once(self, index: int) -> tuple[int, int, int]:
        """Return the same, and keep no file open, of which a process may have too many; threads may do so at once."""
        if self._entries is not None:
            return self._entry(None, index)
        with self._opened() as file:
            return self._entry(file, index)

    def _opened(self) -> Any:
        if self._stored() != self._number:
            raise ZooError(f"{self.path} has changed since it was opened, and so has its index: start again.")
        return self.file.open("rb")

    def _entry(self, file: Any, index: int) -> tuple[int, int, int]:
        if self._entries is not None:
            start, length, line = self._entries[index].tolist()
        else:
            piece = os.pread(file.fileno(), ENTRY.itemsize, HEADER + ENTRY.itemsize * index)
            whole = len(piece) == ENTRY.itemsize
            start, length, line = np.frombuffer(piece, ENTRY)[0].tolist() if whole else (-1, 0, 0)
        if start < 0 or start + length > self.state[0]:
            raise ZooError(f"{self.file} is broken at record {index + 1}: delete it, and it is made anew.")
        return start, length, line

    def require_same(self, file: int) -> None:
        """Refuse an open file that is not in the state that the index belongs to: its records are elsewhere.

        Raises:
            ZooError: it has changed.
        """
        if _state(file) != self.state:
            raise ZooError(f"{self.path} has changed since it was opened: start again.")

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": None}

    def _stored(self) -> int | None:
        """Return the number of records of an index that belongs to the file as it is; None: there is none."""
        with contextlib.suppress(OSError):
            head = np.fromfile(self.file, "<i8", 8)
            number = int(head[4]) if len(head) == 8 else -1
            whole = number >= 0 and self.file.stat().st_size == HEADER + ENTRY.itemsize * number
            if whole and tuple(head[:4].tolist()) == (MAGIC, *self.state):
                return number
        return None

    def _make(self, find: Callable[[], Iterator[np.ndarray]]) -> int:
        """Write the index, whole or not at all; keep it in memory where that is not possible."""
        aside = self.file.with_name(f"{self.file.name}.{os.getpid()}")
        try:
            with aside.open("wb") as out:
                number = 0
                out.write(bytes(HEADER))
                for entries in find():
                    out.write(entries.tobytes())
                    number += len(entries)
                out.seek(0)
                out.write(np.array([MAGIC, *self.state, number, 0, 0, 0], "<i8").tobytes())
                out.flush()
                os.fsync(out.fileno())
            aside.replace(self.file)
        except OSError:
            self._entries = np.concatenate([np.empty(0, ENTRY), *find()])
            number = len(self._entries)
        finally:
            with contextlib.suppress(OSError):
                aside.unlink()
        return number


@contextlib.contextmanager
def _alone(file: int) -> Iterator[None]:
    """Let one process of the machine make the index; where the file system has no locks, each makes its own."""
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX)  # released when the file is closed
    except (ImportError, OSError):
        pass
    yield


def _state(file: int) -> tuple[int, int, int]:
    """Size, time of the last change in nanoseconds, and a checksum of both ends of an open file."""
    about = os.fstat(file)
    ends = os.pread(file, ENDS, 0) + os.pread(file, ENDS, max(0, about.st_size - ENDS))
    return about.st_size, about.st_mtime_ns, zlib.crc32(ends)


def entries_of(starts: Any, ends: Any, lines: Any) -> np.ndarray:
    """Put places together: (R,) each, in bytes -> (R,) of `ENTRY`.

    Raises:
        ZooError: a record is longer than its entry can hold.
    """
    found, lengths = np.empty(len(starts), ENTRY), np.subtract(ends, starts, dtype=np.int64)
    if len(lengths) and lengths.max() > MAX_RECORD:
        at = int(lengths.argmax())
        raise ZooError(f"The record at byte {int(starts[at]):,} has {int(lengths[at]):,} bytes; 4 GiB are allowed.")
    found["start"], found["length"], found["line"] = starts, lengths, lines
    return found


def plain_lines(path: Path, begin: Callable[[bytes, int], int]) -> Iterator[np.ndarray]:
    """Find the lines of a file, which end in LF, CR or both, blank ones left out: arrays of `ENTRY`.

    Args:
        path: the file, UTF-8.
        begin: where the text of a line begins, behind blanks and byte order marks, given bytes and a position.
    """
    with path.open("rb") as file:
        size, at, line, length = path.stat().st_size, 0, 1, CHUNK
        while at < size:
            piece = os.pread(file.fileno(), length, at)
            if at + len(piece) >= size and not piece.endswith(b"\n"):
                piece += b"\n"
            cut = piece.rfind(b"\n") + 1
            if not cut:  # a line is longer than the piece
                if len(piece) < length:  # the system reads 2 GiB at a time, or the file became shorter
                    raise ZooError(
                        f"{path}:{line} is a line of more than {len(piece):,} bytes, or the file has changed."
                    )
                length *= 2
                continue
            letters = np.frombuffer(piece, np.uint8)[:cut]
            ends = np.flatnonzero((letters == 10) | (letters == 13))
            starts = np.concatenate([[0], ends[:-1] + 1])
            mark = 10 if at or b"\n" in piece[:size] else 13  # a file without LF counts its lines by CR
            below = np.cumsum(letters[ends] == mark)  # lines up to the end of each
            lines = line + np.concatenate([[0], below[:-1]])
            for odd in np.flatnonzero(
                (letters[starts] != ord("{")) & (starts < ends)
            ).tolist():  # blanks, a mark, broken
                starts[odd] = min(begin(piece, int(starts[odd])), ends[odd])
            there = starts < ends
            yield entries_of(at + starts[there], at + ends[there], lines[there])
            at, line, length = at + cut, line + int(below[-1]), CHUNK
