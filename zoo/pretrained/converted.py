"""The cache of converted weights: a folder for each source file, written once, whole or not at all.

The name of a folder has the hash of its source and the version of the converters, so that a file that changed and a
converter that changed are converted anew. Files are read-only; `converted.json` beside them notes where they are from.
Several processes may ask at once: the first converts, the others wait.
"""

import contextlib
import os
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

import torch

from zoo.pretrained.cache import RECORD, cache
from zoo.registry import ZooError
from zoo.registry.foreign import read_object
from zoo.storage.atomic import write_json, writing, written_beside
from zoo.storage.weights import fingerprint, library_versions

VERSION = 1  # of the converters: raised when one of them writes something else


def converted(file: Path, sha256: str, converter: str) -> Path:
    """Return the folder that a file of weights is converted to; it is written if it is not there.

    Args:
        file: the source.
        sha256: of the file.
        converter: module of `zoo.pretrained` with a function `convert(file, folder)`.

    Raises:
        ZooError: the file cannot be converted, or the cache cannot be written.
    """
    folder = cache() / f"{converter}-{sha256[:16]}-{VERSION}"
    if _is_whole(folder, sha256):
        return folder
    with writing(f"converted weights into {str(folder.parent)!r}", "ZOO_CACHE names another folder for them."):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _alone(folder):
            if not _is_whole(folder, sha256):  # another process may have written it meanwhile
                print(f"zoo: converting {file.name}, once, into {folder}", file=sys.stderr)
                _write(file, sha256, converter, folder)
    return folder


def record_of(folder: Path) -> dict[str, object]:
    """Return what is noted of a converted folder: its source, the hashes, the versions of libraries."""
    return read_object(folder / RECORD)


def _is_whole(folder: Path, sha256: str) -> bool:
    try:
        record = record_of(folder)
    except ZooError:
        return False
    return record.get("sha256") == sha256 and record.get("fingerprint") == fingerprint(folder)


def _write(file: Path, sha256: str, converter: str, folder: Path) -> None:
    convert = import_module(f"zoo.pretrained.{converter}").convert
    with written_beside(folder, folder=True) as beside:
        with _by_itself():
            convert(file, beside)
        write_json(
            beside / RECORD,
            {
                "source": file.name,
                "sha256": sha256,
                "converter": converter,
                "version": VERSION,
                "fingerprint": fingerprint(beside),
                "libraries": library_versions(),
            },
        )
        for path in beside.iterdir():
            path.chmod(0o444)


@contextlib.contextmanager
def _by_itself() -> Iterator[None]:
    """Undo what the caller has set for its own model (the meta device, a data type), and keep its random state."""
    usual = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.device("cpu"), torch.random.fork_rng(devices=[]), torch.inference_mode(False):
            yield
    finally:
        torch.set_default_dtype(usual)


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Wait until no other process writes a folder; where files cannot be locked, go on."""
    handle = os.open(folder.with_name(f".{folder.name}.lock"), os.O_RDWR | os.O_CREAT, 0o644)
    try:
        if fcntl is not None:
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)  # and with it the lock
