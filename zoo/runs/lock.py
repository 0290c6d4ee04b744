"""The lock of a run's folder: one process trains in it at a time. The system releases it when its holder ends.

The lock is `flock` on a small file that names its holder. Linux supports it over NFS; on file systems without locks
(Lustre without `-o flock`, say) only the process named in the file is checked, if it is of this machine, and a note
states so. With several processes the first one holds the lock. Readers, such as `zoo report`, never take it.
"""

import contextlib
import errno
import json
import os
import platform
import weakref
from datetime import datetime
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

from zoo.registry import ZooError

NAME = ".running"
CLOSED = -1  # in place of a handle
HELD = (errno.EAGAIN, errno.EWOULDBLOCK, errno.EACCES)  # errors of a lock that is held; others: no locks here


class RunLock:
    """The lock of a run's folder, held from construction until `release` or the end of the process.

    Args:
        folder: of the run.

    Raises:
        ZooError: another process holds it, or the folder cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / NAME
        self.note = ""  # for the user, if the folder cannot be locked
        self._handle = CLOSED
        try:
            self._handle = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise ZooError(
                f"The run folder {str(folder)!r} cannot be written ({error.strerror}): a run keeps its state there."
            ) from error
        try:
            self._take()
        except BaseException:
            self._close()
            raise
        # With the start time, since a later process may have the same id.
        self._write({"pid": os.getpid(), "host": platform.node(), "born": _born(os.getpid()), "since": _now()})
        _taken.add(self)

    def release(self) -> None:
        """Release the lock."""
        # The file stays: if it were removed, two processes could each lock a file of that name, one of them deleted.
        if self._handle != CLOSED:
            self._write({})
            self._close()

    def _take(self) -> None:
        if fcntl is not None:
            try:
                fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except OSError as error:
                if error.errno in HELD:
                    raise self._refusal(self._owner()) from error
        # A file system without locks: only processes of this machine can be looked up.
        owner = self._owner()
        if owner.get("host") == platform.node() and _lives(owner.get("pid"), owner.get("born")):
            raise self._refusal(owner)
        self.note = (
            f"Files in {self.path.parent} cannot be locked: only processes of this machine are checked for resuming "
            "the run twice."
        )

    def _refusal(self, owner: dict[str, Any]) -> ZooError:
        who = f"process {owner['pid']} on {owner['host']} since {owner['since']}" if owner else "another process"
        return ZooError(
            f"The run {str(self.path.parent)!r} is alive: {who} trains in it. Wait for it to end, or end it: it saves "
            f"a checkpoint on SIGTERM. (If its machine no longer exists, remove {str(self.path)!r}.)"
        )

    def _owner(self) -> dict[str, Any]:
        with contextlib.suppress(OSError, ValueError):
            found = json.loads(self.path.read_text(encoding="utf-8"))
            if isinstance(found, dict) and {"pid", "host", "since"} <= set(found):
                return found
        return {}

    def _write(self, owner: dict[str, Any]) -> None:
        with contextlib.suppress(OSError):  # the content serves messages; the lock holds on a full disk too
            os.ftruncate(self._handle, 0)
            os.pwrite(self._handle, json.dumps(owner).encode(), 0)

    def _close(self) -> None:
        if self._handle != CLOSED:
            os.close(self._handle)
        self._handle = CLOSED

    def __del__(self) -> None:
        if os is not None:  # modules are None at the end of the interpreter
            self._close()


def alive(folder: Path) -> bool:
    """Return whether a process trains in a folder, as far as this machine can tell; takes no lock."""
    with contextlib.suppress(OSError, ValueError):
        owner = json.loads((folder / NAME).read_text(encoding="utf-8"))
        if isinstance(owner, dict) and owner:
            return owner.get("host") != platform.node() or _lives(owner.get("pid"), owner.get("born"))
    return False


def _born(pid: Any) -> float | None:
    """Return the start time of a process of this machine; None if it does not exist.

    Process ids are reused; with the start time they are unique.
    """
    import psutil

    try:
        return psutil.Process(pid).create_time()
    except (psutil.Error, TypeError, ValueError):
        return None


def _lives(pid: Any, born: Any) -> bool:
    """Return whether the process that wrote the file still runs."""
    now = _born(pid)
    return now is not None and isinstance(born, float) and abs(now - born) < 2.0  # seconds: the clock may be set


def _now() -> str:
    return datetime.now().isoformat(sep=" ", timespec="seconds")


_taken: weakref.WeakSet[RunLock] = weakref.WeakSet()


def _forget() -> None:
    """Close the locks in a forked child: a loader worker that outlives a killed run would keep the run locked."""
    for lock in list(_taken):
        lock._close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
