"""The members of an uncompressed tar archive, whose headers may state anything."""

import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from zoo.registry import ZooError
from zoo.registry.foreign import require_file

MAX_BYTES = 1 << 29  # of one image as it is stored


class NoFurther:
    """A file whose reads are limited to its size: a header may state any size, which a read would allocate."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file, self._size = file, size
        self.seek: Any = file.seek
        self.tell: Any = file.tell
        self.name = getattr(file, "name", "")

    def read(self, count: int = -1) -> bytes:
        left = max(0, self._size - self._file.tell())
        return self._file.read(left if count < 0 else min(count, left))


def tar_members(path: Path) -> Iterator[tarfile.TarInfo]:
    """Yield the files of an archive in the order in which they are stored, sparse ones left out.

    Raises:
        ZooError: it is not an uncompressed tar archive, breaks off, has bytes in the middle that are not of a member,
            or a member of more than `MAX_BYTES`; the message names the member.
    """
    size, last = require_file(path), ""
    try:
        with path.open("rb") as file:
            short: Any = NoFurther(file, size)
            archive = tarfile.open(fileobj=short, mode="r:")  # noqa: SIM115  closed with the file
            while (item := archive.next()) is not None:
                archive.members = []  # type: ignore[attr-defined]  # the library keeps them all, a kilobyte each
                last = item.name[:200]
                wrong = item.size < 0 or item.offset_data + item.size > size
                if wrong and item.isfile() and not item.issparse() and 0 <= item.size <= MAX_BYTES:
                    raise ZooError(f"{path} is cut off in its member {last!r}, at byte {size:,}: fetch it again.")
                if wrong or (item.isfile() and item.size > MAX_BYTES):
                    raise ZooError(f"{path}: the member {last!r} states {item.size:,} bytes.")
                if item.isfile() and not item.issparse():  # sparse: not all bytes are there
                    yield item
            file.seek(archive.offset)
            rest = file.read(tarfile.BLOCKSIZE)
            if rest.strip(b"\0"):  # the library takes what it cannot read for the end
                reason = "is cut off" if len(rest) < tarfile.BLOCKSIZE else "has bytes that are not of a member"
                raise ZooError(f"{path} {reason} behind the member {last!r}, at byte {archive.offset:,}.")
    except (tarfile.TarError, ValueError, OSError, OverflowError, RecursionError) as error:
        if isinstance(error, ZooError):
            raise
        behind = f" behind the member {last!r}" if last else ""
        raise ZooError(
            f"{path} cannot be read as a tar archive{behind} ({error}). It must not be compressed: images are read "
            "from the middle of it."
        ) from None
