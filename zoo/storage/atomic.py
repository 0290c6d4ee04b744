"""Write files and folders atomically, and hash them.

Data is written beside its final name, flushed to the disk, and renamed in one step, so that an interrupted writer
leaves the old file or none. A full disk or a read-only folder becomes a `WriteError`, in whichever library it occurs.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from zoo.registry import ZooError

BESIDE, ASIDE = ".writing", ".removing"  # suffixes of temporary names, which a killed process may leave


class WriteError(ZooError):
    """The disk is full, or the folder cannot be written."""


@contextlib.contextmanager
def writing(what: str, hint: str = "") -> Iterator[None]:
    """Turn errors of the disk, in any library, into a `WriteError`.

    Args:
        what: object of the message "Cannot write ...".
        hint: further sentences of the message.
    """
    try:
        yield
    except ZooError:
        raise
    except Exception as error:
        if (reason := disk_trouble(error)) is None:
            raise
        raise WriteError(f"Cannot write {what}: {reason}.{' ' if hint else ''}{hint}") from error


def disk_trouble(error: BaseException | None) -> str | None:
    """Return the operating system's reason behind an error; None for errors of other causes.

    safetensors puts the error number into its message; torch raises its own error while handling the system's.
    """
    while error is not None:
        if isinstance(error, OSError) and error.errno is not None:
            return f"{os.strerror(error.errno)}{f' ({error.filename})' if error.filename else ''}"
        if stated := re.search(r"\(os error (\d+)\)", str(error)):
            return os.strerror(int(stated[1]))
        error = error.__cause__ or error.__context__
    return None


@contextlib.contextmanager
def written_beside(final: Path, *, folder: bool = False) -> Iterator[Path]:
    """Yield a temporary path to write to; when the block ends, it is flushed and renamed to `final`."""
    beside = final.with_name(f".{final.name}{BESIDE}")
    remove(beside)
    beside.parent.mkdir(parents=True, exist_ok=True)
    if folder:
        beside.mkdir()
    try:
        yield beside
        for path in [*(beside.rglob("*") if beside.is_dir() else []), beside]:
            flush(path)
        with moved_aside(final) if folder else contextlib.nullcontext():
            beside.replace(final)
        flush(final.parent)
    except BaseException:
        with contextlib.suppress(OSError):  # report the first error
            remove(beside)
        raise


@contextlib.contextmanager
def made_folder(folder: Path) -> Iterator[None]:
    """Make a folder, and remove it again where the block fails; one that was there stays."""
    new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        if new:
            remove(folder)
        raise


@contextlib.contextmanager
def moved_aside(path: Path) -> Iterator[None]:
    """Rename an old folder while the block creates a new one of its name, then remove it."""
    aside = path.with_name(f".{path.name}{ASIDE}")
    remove(aside)
    with contextlib.suppress(FileNotFoundError):
        path.rename(aside)
    yield
    remove(aside)


def flush(path: Path) -> None:
    """Wait until a file or folder is on the disk."""
    if path.is_dir():
        with contextlib.suppress(OSError):  # folders cannot be opened, or not be flushed, on every system
            _fsync(path, os.O_RDONLY)
    else:
        # Network file systems may report a full disk only here. Windows needs a writable handle.
        _fsync(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)


def _fsync(path: Path, flags: int) -> None:
    handle = os.open(path, flags)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove(path: Path) -> None:
    """Remove a file or folder if it exists. A folder is renamed first, so that a partial one is never used."""
    if path.is_dir() and not path.is_symlink():
        if not path.name.startswith("."):
            path = path.rename(path.with_name(f".{path.name}{ASIDE}"))
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def remove_leftovers(folder: Path) -> None:
    """Remove temporary files that a killed writer left in a folder."""
    for path in folder.glob(".*"):
        if path.name.endswith((BESIDE, ASIDE)):
            remove(path)


def write_text(path: Path, text: str) -> None:
    """Write text so that the file is either the old one or the new one."""
    with written_beside(path) as beside:
        beside.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that the file is either the old one or the new one."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def hashes(paths: Iterable[Path]) -> dict[str, str]:
    """Return the SHA-256 of files by name; several are read at once."""
    files = sorted(paths)
    with ThreadPoolExecutor() as pool:
        return dict(zip((f.name for f in files), pool.map(_sha256, files), strict=True))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
