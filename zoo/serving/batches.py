"""Rows that wait for their answers, and the threads that take them in batches."""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from zoo.registry import ZooError
from zoo.serving.answers import Row, generate, may_share

log = logging.getLogger("zoo.serve")

# Seconds that the first row of a batch waits for others: requests that are sent at once arrive a few milliseconds
# apart, and a batch that began without them makes them wait for a whole answer.
GATHER = 0.01


class ClosedError(ZooError):
    """The server ends, and takes nothing more."""


class Batcher:
    """Generates waiting rows together, in `threads` batches at once.

    A row that comes while all threads generate waits until one of the batches ends. Threads share a model, so that a
    long answer does not keep later ones waiting.

    Args:
        size: rows of a batch.
        threads: batches at once.
        run: generates the answers of a batch.
    """

    def __init__(self, size: int, threads: int = 1, run: Callable[[Sequence[Row]], Any] = generate) -> None:
        self.size, self.run = size, run
        self.waiting: deque[Row] = deque()
        self.running: set[Row] = set()
        self.batches = 0  # generated so far
        self.rows = 0  # in them
        self._change = threading.Condition()
        self._closed = False
        self._threads = [threading.Thread(target=self._work, name=f"zoo-serve-{i}") for i in range(threads)]
        for thread in self._threads:
            thread.daemon = True  # a batch that hangs must not keep the process from ending
            thread.start()

    def add(self, rows: Sequence[Row]) -> None:
        """Let rows wait for their answers.

        Raises:
            ClosedError: nothing more is taken.
        """
        with self._change:
            if self._closed:
                raise ClosedError("The server is shutting down.")
            self.waiting.extend(rows)
            self._change.notify_all()

    def close(self, seconds: float = 10.0) -> None:
        """Take nothing more, cancel what waits and what runs, and wait for the threads."""
        with self._change:
            self._closed = True
            left = [*self.waiting]
            self.waiting.clear()
            for row in self.running:
                row.cancelled = True
            self._change.notify_all()
        for row in left:
            row.fail(ClosedError("The server is shutting down."))
        end = time.monotonic() + seconds
        for thread in self._threads:
            thread.join(max(0.0, end - time.monotonic()))

    @property
    def closed(self) -> bool:
        """Whether nothing more is taken."""
        return self._closed

    def _work(self) -> None:
        while (rows := self._next()) is not None:
            if not rows:
                continue
            try:
                self.run(rows)
            except Exception as error:  # the thread goes on with the next batch
                log.exception("a batch of %d failed", len(rows))
                for row in rows:
                    row.fail(error)
            finally:
                with self._change:
                    self.running.difference_update(rows)

    def _next(self) -> list[Row] | None:
        """Wait for the next batch; None: closed."""
        with self._change:
            while not self.waiting and not self._closed:
                self._change.wait()
            end = time.monotonic() + GATHER
            while 0 < len(self.waiting) < self.size and not self._closed and (left := end - time.monotonic()) > 0:
                self._change.wait(left)
            if self._closed:
                return None
            taken: list[Row] = []
            kept: deque[Row] = deque()
            for row in self.waiting:
                if row.cancelled:
                    continue
                fits = len(taken) < self.size and all(may_share(other, row) for other in taken)
                (taken if fits else kept).append(row)
            self.waiting = kept
            self.running.update(taken)
            if taken:
                self.batches += 1
                self.rows += len(taken)
            return taken
