"""The order of a streaming data set's rows, from which each process reads those that it needs.

An order is advanced by every row of every optimiser step and has a place that can be saved. Whether a row is read or
skipped does not change later rows, so the order is the same for any number of processes, and a run resumes from a saved
place.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from zoo.registry import StreamingDataset, ZooError, naming, placed


@dataclass(frozen=True)
class StreamRow:
    """A stored row with its number, for the data set's `sample`; or a sample with None."""

    value: Any
    number: int | str | None = None


class StreamOrder(Protocol):
    """`place` is plain values: what a new order of the same data set needs to go on."""

    @property
    def place(self) -> dict[str, Any]: ...

    def next(self, position: int, wanted: bool) -> StreamRow | None:
        """Return the next row, which is at `position` of the stage's rows; None if it is not wanted."""


class InOrder:
    """One row after the other from a single iterator, epoch after epoch; those not wanted are dropped.

    Args:
        name: of the data, for errors.
        start: (epoch, rows already read, what `state` gave then) -> the rest of that epoch.
        place: where to begin.
        state: gives plain values with which `start` finds its way faster than by passing over rows.
    """

    def __init__(
        self,
        name: str,
        start: Callable[[int, int, Any], Iterator[StreamRow]],
        place: Mapping[str, Any],
        state: Callable[[], Any] | None = None,
    ) -> None:
        self.name, self.start, self.state = name, start, state
        self.epoch, self.read = place.get("epoch", 0), place.get("read", 0)
        self._state = place.get("state")
        self._rows: Iterator[StreamRow] | None = None
        self._failed: Exception | None = None

    @property
    def place(self) -> dict[str, Any]:
        if self._rows is not None and self.state is not None:
            self._state = self.state()
        return {"epoch": self.epoch, "read": self.read, "state": self._state}

    def next(self, position: int, wanted: bool) -> StreamRow | None:
        """Return the next row.

        Raises:
            ZooError: a whole epoch has none.
        """
        if self._failed is not None:  # an iterator that raised is at its end, which is not that of the epoch
            raise self._failed
        if self._rows is None:
            self._rows = self.start(self.epoch, self.read, self._state)
        for again in (False, True):
            try:
                with naming(self.name, f"record {self.read} of the stream"):
                    row = next(self._rows, None)
            except Exception as error:
                self._failed = error
                raise
            if row is not None:
                self.read += 1
                return row if wanted else None
            if not again:
                self.epoch, self.read = self.epoch + 1, 0
                self._rows = self.start(self.epoch, 0, None)
        raise empty(self.name)


class Lanes:
    """An order that reads several shards in parallel, so that each process reads only a few of them.

    Shards come in the stored order, or shuffled by epoch. Up to `lanes` are open, each serves an equal part of the
    slots of a step, and a shard that ends is replaced by the next. Processes take neighbouring slots: with as many
    lanes as processes, or a multiple, each shard is read by one process. Since the lengths of all shards are known,
    the rows of each process follow without reading.

    Args:
        name: of the data, for errors.
        lengths: rows of each shard.
        start: (epoch, shard, rows to skip) -> the remaining rows of the shard, in the epoch's order.
        size: slots of a step.
        lanes: largest number of shards that are read in parallel.
        seed: of the order of shards, with the epoch; None: the stored order.
        place: saved place to continue from.
    """

    def __init__(
        self,
        name: str,
        lengths: Sequence[int],
        start: Callable[[int, int, int], Iterator[StreamRow]],
        *,
        size: int,
        lanes: int,
        seed: int | None,
        place: Mapping[str, Any],
    ) -> None:
        if not sum(lengths):
            raise empty(name)
        if place and "lanes" not in place:
            raise ZooError(f"The order in which data {name!r} is read has changed since this run was stopped.")
        self.name, self.lengths, self.start, self.size, self.seed = name, lengths, start, size, seed
        self.most = min(lanes, size)
        self.epoch, self.drawn = place.get("epoch", 0), place.get("drawn", 0)
        self.lanes = [list(lane) for lane in place.get("lanes", [])]  # of each: shard, and rows of it that were taken
        if any(shard >= len(lengths) or taken > lengths[shard] for shard, taken in self.lanes):
            raise ZooError(f"Data {name!r} has fewer shards or rows than when this run was stopped: it cannot go on.")
        self._order = self._shards(self.epoch)
        self._step = -1
        self._open: dict[int, tuple[Iterator[StreamRow], int]] = {}  # shard -> its rows, how many were read here

    @property
    def place(self) -> dict[str, Any]:
        """Where it is, at the end of a step."""
        return {"epoch": self.epoch, "drawn": self.drawn, "lanes": [list(lane) for lane in self._left()]}

    def next(self, position: int, wanted: bool) -> StreamRow | None:
        """Return the next row of the lane that serves this slot of the step."""
        step, slot = divmod(position, self.size)
        if step != self._step:  # within a step, what a lane serves stays
            self._step, self.lanes = step, self._left()
        if not self._left():
            if self.drawn == len(self._order):
                self.epoch, self.drawn, self._order = self.epoch + 1, 0, self._shards(self.epoch + 1)
            count = min(self.most, len(self._order) - self.drawn)
            self.lanes = [[self._draw(), 0] for _ in range(count)]
        at = slot * len(self.lanes) // self.size
        lane = next(lane for lane in [*self.lanes[at:], *self.lanes[:at]] if self._rows_left(lane))
        shard, taken = lane
        row = self._row(shard, taken) if wanted else None
        lane[1] += 1
        if not self._rows_left(lane):
            self._open.pop(shard, None)
            if self.drawn < len(self._order):
                lane[:] = [self._draw(), 0]
        return row

    def _rows_left(self, lane: list[int]) -> bool:
        return lane[1] < self.lengths[lane[0]]

    def _left(self) -> list[list[int]]:
        return [lane for lane in self.lanes if self._rows_left(lane)]

    def _draw(self) -> int:
        self.drawn += 1
        return self._order[self.drawn - 1]

    def _shards(self, epoch: int) -> list[int]:
        order = np.arange(len(self.lengths))
        if self.seed is not None:
            order = np.random.default_rng([self.seed & 0xFFFFFFFF, epoch]).permutation(order)
        return [shard for shard in order.tolist() if self.lengths[shard]]

    def _row(self, shard: int, number: int) -> StreamRow:
        rows, at = self._open.pop(shard, (None, 0))
        if rows is None:
            rows, at = self.start(self.epoch, shard, number), number
        for _ in range(number - at):
            next(rows, None)
        if (row := next(rows, None)) is None:
            raise ZooError(f"Data {self.name!r}: shard {shard} ends before its row {number} of {self.lengths[shard]}.")
        self._open[shard] = (rows, number + 1)
        return row


def empty(name: str) -> ZooError:
    """Return the error for a stream without rows."""
    return ZooError(f"data {name!r} is a stream without a single sample.")


def order_of(name: str, dataset: StreamingDataset, size: int, place: Any) -> StreamOrder:
    """Return the order of a streaming data set: its own where it has one, else that of `stream`."""
    place = {"epoch": place[0], "read": place[1]} if isinstance(place, (list, tuple)) else dict(place or {})
    order: StreamOrder | None = dataset.order(name, size, place)
    if order is not None:
        return order

    def start(epoch: int, read: int, state: Any) -> Iterator[StreamRow]:
        for number, sample in enumerate(dataset.stream(epoch, read), read):
            yield StreamRow(placed(sample, name, f"record {number} of the stream"))

    return InOrder(name, start, place)
