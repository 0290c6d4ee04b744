"""Pages of weights files that this process has read, and could read again: given back before it needs more memory."""

import bisect
import contextlib
import ctypes
import mmap
import re
import sys
from pathlib import Path

from torch import Tensor

_BEGIN = re.compile(r"([0-9a-f]+)-([0-9a-f]+) \S+ \S+ \S+ \S+ +(.*)")
_DONTNEED = 4  # MADV_DONTNEED of Linux


class CleanPages:
    """Maps of safetensors files in this process that it has not written to, as Linux lists them.

    Elsewhere there are none, and nothing is given back. A tensor may be a map of one file with many others
    (transformers' are), so that the pages of one stay until all are gone.
    """

    def __init__(self) -> None:
        self._ranges: list[tuple[int, int]] = []
        self._advise = None
        if sys.platform == "linux":
            with contextlib.suppress(OSError, AttributeError):
                listed = Path("/proc/self/smaps").read_text(encoding="utf-8", errors="replace")
                self._advise = ctypes.CDLL(None, use_errno=True).madvise
                self._advise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
                self._ranges = sorted(_clean(listed))

    def give_back(self, tensor: Tensor) -> None:
        """Give the pages of a tensor back; they are read again where it is used again. Others stay as they are."""
        # The tensor is alive, so that the map it was found in is as well: nothing else can have its addresses.
        start, end = tensor.data_ptr(), tensor.data_ptr() + tensor.untyped_storage().nbytes()
        end = min(end, tensor.data_ptr() + tensor.numel() * tensor.element_size())
        at = bisect.bisect_right(self._ranges, (start, sys.maxsize)) - 1
        if self._advise is None or at < 0 or not tensor.is_contiguous() or end > self._ranges[at][1]:
            return
        first, last = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE, end // mmap.PAGESIZE * mmap.PAGESIZE
        if first < last:
            self._advise(first, last - first, _DONTNEED)


def _clean(listed: str) -> list[tuple[int, int]]:
    """Return begin and end of the maps of safetensors files in /proc/self/smaps without a page of this process's own.

    A page that was written to is this process's own; given back, it would be the file's again.
    """
    found: list[tuple[int, int]] = []
    for line in listed.splitlines():
        if begin := _BEGIN.match(line):
            start, end, file = int(begin[1], 16), int(begin[2], 16), begin[3]
            if file.removesuffix(" (deleted)").endswith(".safetensors"):
                found.append((start, end))
        elif (
            found and line.startswith(("Anonymous:", "Swap:")) and found[-1] == (start, end) and line.split()[1] != "0"
        ):
            found.pop()
    return found
