"""End the processes of a run when one of them is gone, within a minute and with a message.

Without it, those that are left wait for the one that is gone: over NCCL for ten minutes and more, over gloo until their
next exchange, which then fails with an error of the network. torchrun and mpirun end what is left, `srun` does so only
with `--kill-on-bad-exit`, and none of them notices a process that hangs or a machine that lost its power.

Each process counts up a number of its own in the store by which the group was made, on a connection of its own, and
looks at the numbers of the others.
"""

import atexit
import contextlib
import os
import sys
import threading
from collections.abc import Iterator
from typing import Any

import torch

from zoo.registry import ZooError

GONE = 2  # exit code, as of any error that a person can do something about
_OF_THE_NETWORK = ("connection closed by peer", "connection reset by peer", "broken pipe", "connection refused")
_LEFT = "left"


class Watch:
    """Beats and watches, from construction until `stop`.

    Args:
        accelerator: of the run.
        go_on: the command that continues the run, for the message.
        every: seconds between two beats.
        patience: beats that another process may miss. A thread of Python beats, so a process that trains is not late.
    """

    def __init__(self, accelerator: Any, go_on: str, *, every: float = 3.0, patience: int = 14) -> None:
        self.rank, self.world = accelerator.process_index, accelerator.num_processes
        self.go_on, self.every, self.patience = go_on, every, patience
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None
        if self.world > 1 and torch.distributed.is_initialized():
            from torch.distributed.distributed_c10d import _get_default_store

            self._store: Any = _get_default_store().clone()  # commands of one connection wait for each other
            self._store.set(self._key(self.rank), "0")
            self._thread = threading.Thread(target=self._look, name="zoo-watch", daemon=True)
            self._thread.start()
            # A thread within the store while the interpreter ends aborts the process ("terminate called").
            atexit.register(self.stop, failed=True)

    def stop(self, *, failed: bool = False) -> None:
        """Leave: the others no longer expect a beat of this process.

        Args:
            failed: by an error of this process, for which the others would wait: they miss its beats, and leave too.
        """
        if self._thread is not None and not self._stopped.is_set():
            self._stopped.set()
            atexit.unregister(self.stop)
            if threading.current_thread() is not self._thread:
                self._thread.join(self.every)  # at once, unless the store does not answer
            if failed:
                return
            with contextlib.suppress(RuntimeError):  # the first process, whose store it is, may have left
                self._store.set(self._key(self.rank), _LEFT)

    def _key(self, rank: int) -> str:
        return f"zoo/watch/{rank}"

    def _look(self) -> None:
        seen: dict[int, str] = {}
        missed = dict.fromkeys(range(self.world), 0)  # beats of this process, so that a pause of all is none
        beat = lost = 0
        while not self._stopped.wait(self.every):
            beat += 1
            try:
                self._store.set(self._key(self.rank), str(beat))
                found = {rank: self._read(rank) for rank in range(self.world)}
                lost = 0
            except RuntimeError:  # DistNetworkError, DistStoreError
                lost += 1
                if lost > min(3, self.patience):
                    self._leave("The store of the first process cannot be reached any more: its process is gone")
                continue
            for rank, number in found.items():
                still = number is None or (number == seen.get(rank) and number != _LEFT)
                missed[rank] = missed[rank] + 1 if still else 0
                seen[rank] = number or ""
                if missed[rank] > self.patience and rank != self.rank:
                    self._leave(f"Process {rank} of {self.world} (counted from 0) is gone, or hangs")

    def _read(self, rank: int) -> str | None:
        key = self._key(rank)
        return self._store.get(key).decode() if self._store.check([key]) else None

    def _leave(self, what: str) -> None:
        if self._stopped.is_set():
            return
        # Without cleaning up: the main thread waits in an exchange that never ends. Locks end with the process.
        print(f"zoo: {what}. Process {self.rank} leaves. To go on: {self.go_on}", file=sys.stderr, flush=True)
        os._exit(GONE)


@contextlib.contextmanager
def watched(accelerator: Any, go_on: str) -> Iterator[None]:
    """Watch the other processes while a command runs that has one group of them.

    Args:
        accelerator: of the command.
        go_on: what a person does where one is gone, for the message.

    Raises:
        ZooError: an exchange failed, since another process is gone.
    """
    watch = Watch(accelerator, go_on)
    try:
        yield
    except BaseException as error:
        watch.stop(failed=not isinstance(error, SystemExit))  # all agreed on that
        if (gone := as_gone(error, accelerator, go_on)) is not None:
            raise gone from error
        raise
    watch.stop()


def as_gone(error: BaseException, accelerator: Any, go_on: str) -> ZooError | None:
    """Return what to say of an error of the network, behind which another process is gone; None for other errors."""
    if accelerator.num_processes == 1 or not isinstance(error, RuntimeError):
        return None
    text = " ".join(str(error).split())
    if not any(word in text.lower() for word in _OF_THE_NETWORK):
        return None
    return ZooError(
        f"Another process of the run is gone, so process {accelerator.process_index} of {accelerator.num_processes} "
        f"leaves ({text[:200]}). What it wrote before it went has the reason. To go on: {go_on}"
    )
