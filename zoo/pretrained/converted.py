"""The cache of converted weights: a folder for each source file, written once, whole or not at all.

The name of a folder has the hash of its source and the version of the converters, so that a file that changed and a
converter that changed are converted anew. Files are read-only; `converted.json` beside them notes where they are from.
Several processes may ask at once: the first converts, the others wait.
"""

import contextlib
import os
import shutil
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
from zoo.storage.safetensors_file import header_of
from zoo.storage.weights import fingerprint, library_versions

VERSION = 3  # of the converters and of what is done behind them: raised when something else is written
_LINE = 64  # bytes of a cache line


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
        for weights in beside.glob("*.safetensors"):
            align(weights)
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


def align(file: Path) -> None:
    """Let the data of a safetensors file begin at a multiple of 64 bytes, by spaces behind its header.

    The library aligns to 8. Parameters are maps of the file, and products with a matrix that begins within a line of
    the processor's cache take longer: a decoded token of SmolLM2-135M in float32 by 3 to 4 %.
    """
    _, begin, _ = header_of(file)
    if not (spaces := -begin % _LINE):
        return
    beside = file.with_name(f"{file.name}.aligned")
    with file.open("rb") as source, beside.open("wb") as target:
        source.seek(8)
        target.write((begin - 8 + spaces).to_bytes(8, "little") + source.read(begin - 8) + b" " * spaces)
        shutil.copyfileobj(source, target, 1 << 24)
    beside.replace(file)


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
