"""Streams whose records are found by number, so that each process reads those that it trains on and no other."""

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from zoo.data.stream_order import Lanes, StreamRow
from zoo.registry import RecordError, Sample, StreamingDataset, sample_or_error

LANES = 16  # shards that a shuffled stream reads side by side, where its config names no number
Place = tuple[int, int]  # shard, and the record's number there


class OrderFields(Protocol):
    """The options of a config that are about a stream's order."""

    shuffle_buffer: int
    lanes: int
    seed: int


def lanes_of(config: OrderFields, shards: int) -> int:
    """Return how many shards are read at once, at most."""
    return min(config.lanes or (LANES if config.shuffle_buffer else 1), shards)


class NumberedStream(StreamingDataset):
    """An order of numbers; a record is read in `sample`, by the process or loader worker that needs it."""

    config: Any  # with the options of `OrderFields`

    @property
    @abstractmethod
    def lengths(self) -> Sequence[int]:
        """Records of each shard."""

    @abstractmethod
    def sample(self, row: Place, number: Any = None) -> Sample:
        """Make a sample of the record at `row`; `number` is `shard:number`, for messages."""

    def stream(self, epoch: int = 0, start: int = 0) -> Iterator[Sample | RecordError]:
        """Yield the samples of an epoch from number `start` on; their order depends on (seed, epoch)."""
        order = self.order("", 1, {"epoch": epoch, "drawn": 0, "lanes": []})
        for number in range(sum(self.lengths)):
            if (row := order.next(number, number >= start)) is not None:
                yield self._taken(row)

    def _taken(self, row: StreamRow) -> Sample | RecordError:
        return sample_or_error("", self.place(row.number), lambda: self.sample(row.value, row.number))  # type: ignore[arg-type]

    def order(self, name: str, size: int, place: Mapping[str, Any]) -> Lanes:
        """Return the order of the records: as they are stored or shuffled, shard by shard or several side by side.

        Args:
            name: of the data, for errors.
            size: samples of an optimiser step.
            place: where to begin.
        """
        config, lengths = self.config, self.lengths
        seed = config.seed if config.shuffle_buffer else None
        lanes = lanes_of(config, len(lengths))
        return Lanes(name, lengths, self._rows, size=size, lanes=lanes, seed=seed, place=place)

    def _rows(self, epoch: int, shard: int, start: int) -> Iterator[StreamRow]:
        """Yield the places of a shard's records from the `start`-th of the epoch on."""
        config, length = self.config, self.lengths[shard]
        if config.shuffle_buffer:
            random = np.random.default_rng([config.seed & 0xFFFFFFFF, epoch, shard + 1])
            size = max(1, config.shuffle_buffer // lanes_of(config, len(self.lengths)))
            numbers = _shuffled(length, size, random)
            for _ in range(start):
                next(numbers, None)
        else:
            numbers = iter(range(start, length))
        for row in numbers:
            yield StreamRow((shard, row), f"{shard}:{row}")


def _shuffled(length: int, size: int, random: np.random.Generator) -> Iterator[int]:
    """Draw each number from a buffer of `size`, which the next ones fill; 8 bytes a place, whatever a sample holds."""
    buffer: list[int] = []
    for number in range(length):
        if len(buffer) < size:
            buffer.append(number)
            continue
        at = int(random.integers(size))
        yield buffer[at]
        buffer[at] = number
    yield from (buffer[at] for at in random.permutation(len(buffer)).tolist())
