"""Find images by their names in records: files below a folder, or members of tar or zip archives.

Names cannot reach files outside: absolute names, `..` and links that lead out are refused.
"""

import zipfile
import zlib
from dataclasses import dataclass
from glob import glob
from pathlib import Path, PurePosixPath
from typing import Protocol

from zoo.data.absent import absent
from zoo.data.tar_members import MAX_BYTES, tar_members
from zoo.registry import ImageError, ZooError, nearest
from zoo.registry.foreign import require_file

ENDINGS = (
    ".jpg",
    ".jpeg",
    ".png",
    ".webp",
    ".JPG",
    ".JPEG",
    ".PNG",
)  # that a missing image may have in place of its own
_LOCAL = 30  # bytes of a zip member's local header, ahead of its name and extra fields


@dataclass(frozen=True)
class TarMember:
    """The bytes of one image inside an archive, read when called.

    The archive is opened for each read: a handle open across a fork shares its position with the other process.
    """

    archive: str
    name: str
    offset: int
    size: int

    def __call__(self) -> bytes:
        with Path(self.archive).open("rb") as file:
            file.seek(self.offset)
            return file.read(self.size)

    def __str__(self) -> str:
        return f"{self.archive}::{self.name}"


@dataclass(frozen=True)
class ZipMember(TarMember):
    """The bytes of one image inside a zip archive; `offset` is that of its local header, `packed` its size there."""

    packed: int
    deflated: bool
    checksum: int  # CRC-32 of the bytes, as the archive's list states it

    def __call__(self) -> bytes:
        if not self.size:  # zlib takes 0 for no limit, and a stated size may be wrong
            return b""
        with Path(self.archive).open("rb") as file:
            file.seek(self.offset)
            head = file.read(_LOCAL)
            file.seek(int.from_bytes(head[26:28], "little") + int.from_bytes(head[28:30], "little"), 1)
            data = file.read(self.packed)
        try:
            found = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, self.size) if self.deflated else data
        except zlib.error as error:
            raise OSError(f"{self} cannot be unpacked: {error}") from None
        if zlib.crc32(found) != self.checksum:
            raise OSError(f"{self} has other bytes than its archive states (CRC-32): fetch the archive again.")
        return found


class ImageStore(Protocol):
    """Maps a name to a source of `open_image`."""

    def find(self, name: str, where: str) -> Path | TarMember: ...

    def names(self) -> list[str]:
        """Return the names of all files, sorted."""
        ...


class Folder:
    """Files below a root."""

    def __init__(self, root: Path) -> None:
        self.root = root.resolve()

    def find(self, name: str, where: str) -> Path:
        """Return the path of an image.

        Raises:
            ZooError: the name leads out of the folder, or there is no such file; the message begins with `where`.
        """
        refuse_escape(name, where)
        try:
            path = (self.root / name).resolve()
            found = path.is_file()
        except (OSError, ValueError, RuntimeError) as error:  # too long, no text, links in a circle
            reason = getattr(error, "strerror", None) or error
            raise ImageError(f"{where}: the image {name[:80]!r} cannot be found in {self.root}: {reason}.") from None
        if not path.is_relative_to(self.root):
            raise ZooError(f"{where}: image {name!r} is a link that leads out of {self.root}.")
        if not found:
            near = self._near(name)
            raise ImageError(
                f"{where}: there is no image {name!r} in {self.root}." + (f" Did you mean {near!r}?" if near else "")
            )
        return path

    def _near(self, name: str) -> str:
        """Return the name that was meant if it is one of few: without the first folders, of another ending or case."""
        plain = PurePosixPath(name.replace("\\", "/"))
        tails = [PurePosixPath(*plain.parts[first:]) for first in range(len(plain.parts))]
        ended = [plain.with_suffix(ending) for ending in ENDINGS] if 0 < len(plain.name) < 200 else []  # of 255 allowed
        tried = [*tails, *ended, PurePosixPath(str(plain).lower())]
        return next((str(path) for path in tried if str(path) != name and (self.root / path).is_file()), "")

    def names(self) -> list[str]:
        """Return the names of all files below the root, sorted."""
        return sorted(p.relative_to(self.root).as_posix() for p in self.root.rglob("*") if p.is_file())


class Archives:
    """Members of zip or uncompressed tar archives, indexed once; the bytes are read later, by offset."""

    def __init__(self, paths: list[Path]) -> None:
        self._members: dict[str, TarMember] = {}
        self.paths = paths
        for path in paths:
            size = require_file(path)
            if path.suffix.lower() == ".zip":
                self._add_zip(path, size)
                continue
            for item in tar_members(path):
                self._add(TarMember(str(path), _plain(item.name), item.offset_data, item.size))

    def _add_zip(self, path: Path, size: int) -> None:
        try:
            with zipfile.ZipFile(path) as archive:
                for item in archive.infolist():
                    if item.is_dir():
                        continue
                    short = item.header_offset + item.compress_size > size
                    if short or item.file_size > MAX_BYTES or item.compress_size > MAX_BYTES:
                        stated = f"{item.compress_size:,} bytes, unpacked {item.file_size:,}"
                        raise ZooError(f"{path}: the member {item.filename[:200]!r} states {stated}.")
                    kinds = {zipfile.ZIP_STORED: False, zipfile.ZIP_DEFLATED: True}
                    if item.compress_type not in kinds or item.flag_bits & 1:
                        raise ZooError(f"{path}: {item.filename[:200]!r} is encrypted, or packed by another method.")
                    place = item.header_offset, item.file_size, item.compress_size
                    self._add(ZipMember(str(path), _plain(item.filename), *place, kinds[item.compress_type], item.CRC))
        except (zipfile.BadZipFile, ValueError, OSError, OverflowError) as error:
            if isinstance(error, ZooError):
                raise
            raise ZooError(f"{path} cannot be read as a zip archive: {error}") from None

    def _add(self, member: TarMember) -> None:
        if other := self._members.get(member.name):
            raise ZooError(f"Image {member.name!r} is in {other.archive} and again in {member.archive}.")
        self._members[member.name] = member

    def find(self, name: str, where: str) -> TarMember:
        """Return a member.

        Raises:
            ZooError: no archive has it; the message begins with `where`.
        """
        refuse_escape(name, where)
        member = self._members.get(_plain(name))
        if member is None:
            near = nearest(name, self._members) if len(self._members) < 10_000 else []
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ImageError(f"{where}: there is no image {name!r} in {', '.join(map(str, self.paths))}.{hint}")
        return member

    def names(self) -> list[str]:
        """Return the names of all members, sorted."""
        return sorted(self._members)


def open_store(place: str) -> ImageStore:
    """Open a folder, a tar or zip archive, or all archives that a pattern such as `shards/*.tar` matches.

    Raises:
        ZooError: there is nothing of that name.
    """
    path = Path(place)
    if path.is_dir():
        return Folder(path)
    if path.is_file():
        return Archives([path])
    found = sorted(Path(p) for p in glob(place)) if set(place) & set("*?[") else []  # noqa: PTH207  may be absolute
    if not found:
        raise absent(place, "It holds the images.", what="folder or tar archive")
    return Archives(found)


def refuse_escape(name: str, where: str) -> None:
    """Refuse a name that is absolute, climbs with `..`, or is an address.

    Raises:
        ZooError: with `where`, the record that gave the name.
    """
    if "://" in name:
        raise ZooError(f"{where}: image {name!r} is an address. Nothing is downloaded: save it and name the file.")
    path = PurePosixPath(name.replace("\\", "/"))
    if path.is_absolute() or ".." in path.parts or (path.parts[:1] and path.parts[0].endswith(":")) or "\0" in name:
        raise ZooError(f"{where}: image {name!r} leads out of the folder of images.")


def _plain(name: str) -> str:
    return str(PurePosixPath(name))
