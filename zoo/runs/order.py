"""The order of samples, as a function of (seed, position).

Nothing here has state to restore: position p of a stage's order is a data set, an epoch and an index, in every process
and at any time. A run can resume at any step with any number of loader workers, and a run with two processes has the
samples of a run with one.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from zoo.registry import RecordError, Sample, ZooError, read_sample, unknown
from zoo.runs.permutation import Permutation, shuffled

GOLDEN = 0.6180339887498949  # golden ratio: its multiples modulo 1 are evenly spread over [0, 1), however many
Where = tuple[int, int, int]  # which data set of the mix, epoch, index


def keyed(*key: int) -> np.random.Generator:
    """Return a generator that depends on `key` alone."""
    return np.random.default_rng([k & 0xFFFFFFFF for k in key])


class Mix:
    """The order of the samples of several data sets.

    Args:
        datasets: data name -> data set.
        weights: data name -> share of the samples; empty: every sample equally often.
        seed: of the order.
    """

    def __init__(self, datasets: Mapping[str, Any], weights: Mapping[str, float], seed: int) -> None:
        for name in weights:
            if name not in datasets:
                raise unknown("data in this run", name, datasets)
        self.names = [n for n in datasets if weights.get(n, 0.0 if weights else 1.0) > 0]
        self.datasets = [datasets[n] for n in self.names]
        self.lengths = [None if d.is_stream else len(d) for d in self.datasets]
        for name, length in zip(self.names, self.lengths, strict=True):
            if length == 0:
                raise ZooError(f"data {name!r} has no samples.")
        if not weights and None in self.lengths and len(self.names) > 1:
            raise ZooError(
                f"A streaming data set has no length: give the mix weights, data: {{{self.names[0]}: 1.0, ...}}."
            )
        # Without weights the data sets are joined; these are the ends of each in the joined index.
        known = [n for n in self.lengths if n is not None]
        self.joined: np.ndarray | None = None if weights or len(known) < len(self.lengths) else np.cumsum(known)
        # With weights, position p belongs to the data set in whose share of [0, 1) the p-th multiple of GOLDEN falls:
        # shares are met within a sample or two at every position, where random draws would fluctuate.
        shares = np.array([weights.get(n, 1.0) for n in self.names])
        self.bounds = np.cumsum(shares / shares.sum())[:-1]
        self.seed = seed
        # A position, and the number of samples of each data set before it: where the last call ended.
        self._counted = (0, np.zeros(len(self.names), dtype=np.int64))
        self._orders: dict[tuple[int, int], np.ndarray | Permutation] = {}

    def samples_in(self, epochs: float) -> int:
        """Return the number of positions of `epochs` epochs, 1 at least; one epoch is all samples of the data sets."""
        if None in self.lengths:
            name = self.names[self.lengths.index(None)]
            raise ZooError(f"data {name!r} is a stream without a length: give the stage steps, not epochs.")
        return max(1, round(epochs * sum(n for n in self.lengths if n is not None)))

    def require_lengths(self, stage: Any) -> None:
        """Refuse a stage that asks for the lengths of streams.

        Raises:
            ZooError: it has epochs instead of steps, or sorts samples, and data of the mix is a stream.
        """
        if stage.steps is None:
            self.samples_in(stage.epochs or 1)
        for option in ("length_buckets", "balance"):
            if getattr(stage, option) and None in self.lengths:
                name = self.names[self.lengths.index(None)]
                raise ZooError(f"{option} needs data of known length, and data {name!r} is a stream.")

    def read(self, member: int, epoch: int, index: int) -> Sample | RecordError:
        """Read a sample; return the error if it is broken."""
        return read_sample(self.names[member], self.datasets[member], index, epoch)

    def members(self, start: int, stop: int) -> np.ndarray:
        """Return the data set of each position in [start, stop)."""
        return np.searchsorted(self.bounds, np.arange(start, stop) * GOLDEN % 1.0, side="right")

    def places(self, start: int, stop: int) -> list[Where]:
        """Return (data set, epoch, index) of each position in [start, stop); for streams only the first is defined."""
        if self.joined is not None:
            return self._in_joined(self.joined, np.arange(start, stop))
        at, counts = self._counted
        if at > start:  # count again from the beginning
            at, counts = 0, np.zeros_like(counts)
        counts = counts.copy()
        while at < start:  # in pieces, so that a resumed long run needs little memory
            until = min(start, at + 1_000_000)
            counts += np.bincount(self.members(at, until), minlength=len(counts))
            at = until
        self._counted = (start, counts.copy())
        members = self.members(start, stop)
        found = np.zeros((stop - start, 3), dtype=np.int64)  # data set, epoch, index
        found[:, 0] = members
        for member in np.unique(members).tolist():
            at_member = np.flatnonzero(members == member)
            taken, length = counts[member] + np.arange(len(at_member)), self.lengths[member]
            if length is None:
                found[at_member, 2] = taken
            else:
                found[at_member, 1], found[at_member, 2] = self._shuffled(member, taken, length)
        return [(member, epoch, index) for member, epoch, index in found.tolist()]

    def _in_joined(self, ends: np.ndarray, positions: np.ndarray) -> list[Where]:
        """Return the samples at positions without weights: an epoch has each sample once, in one order over all."""
        epochs, at = self._shuffled(-1, positions, int(ends[-1]))
        members = np.searchsorted(ends, at, side="right")
        before = np.concatenate([[0], ends[:-1]])[members]
        return list(zip(members.tolist(), epochs.tolist(), (at - before).tolist(), strict=True))

    def _shuffled(self, member: int, positions: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the epoch and the index of each position among the samples of a data set; -1: of all, joined."""
        epochs, offsets = np.divmod(positions, length)
        index = np.empty_like(offsets)
        for epoch in np.unique(epochs).tolist():
            here = epochs == epoch
            index[here] = self._order(member, epoch, length)[offsets[here]]
        return epochs, index

    def _order(self, member: int, epoch: int, length: int) -> np.ndarray | Permutation:
        if (member, epoch) not in self._orders:
            self._orders = {k: v for k, v in self._orders.items() if k[0] != member}  # keep one epoch of each data set
            self._orders[member, epoch] = shuffled(length, keyed(self.seed, 1, member, epoch))
        return self._orders[member, epoch]


@dataclass
class ShardPosition:
    """This process's share of each optimiser step, and the step to start at."""

    rank: int = 0
    world: int = 1
    step: int = 0  # optimiser step of the stage to start at
    streams: dict[str, Any] = field(default_factory=dict)  # data name -> state of the stream at `step`, plain values
