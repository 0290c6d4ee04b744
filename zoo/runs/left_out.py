"""Broken records that a run leaves out: counted, listed once each, up to a maximum share."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from zoo.registry import RecordError, Sample, ZooError
from zoo.runs.folder import RunFolder, read_metrics

PATIENCE = 100  # records read before the share of broken ones is checked


class LeftOut:
    """Counts and lists the records that the stages of a run leave out.

    Args:
        folder: whose skipped.jsonl the first process writes.
        most: share of the records of a stage that may be left out.
        seen, left_out: records of the stage so far, in a run that is resumed.
    """

    def __init__(self, folder: RunFolder, most: float, seen: int = 0, left_out: int = 0) -> None:
        self.folder, self.most, self.counts = folder, most, (seen, left_out)
        self._known = {_key(row) for row in read_metrics(folder.skipped)}

    def begin(self) -> None:
        """Reset the counts at the beginning of a stage."""
        self.counts = 0, 0

    def add(self, seen: int, left_out: int) -> None:
        """Count the records of a step, over all processes."""
        self.counts = self.counts[0] + seen, self.counts[1] + left_out

    def new(self, broken: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Return the records that were not listed before."""
        new = []
        for line in broken:
            if _key(line) not in self._known:
                self._known.add(_key(line))
                new.append(dict(line))
        return new

    def excess(self, stage: str) -> ZooError | None:
        """Return an error if the stage leaves out too many records."""
        seen, left_out = self.counts
        return excess(left_out, seen, self.most, f"Stage {stage!r}", str(self.folder.skipped))

    def nothing_left(self, stage: str) -> ZooError | None:
        """Return an error if the stage left out all records."""
        seen, left_out = self.counts
        if not seen or left_out < seen:
            return None
        return ZooError(
            f"Stage {stage!r} learnt nothing: each of its {seen} records is broken. {str(self.folder.skipped)!r} lists "
            "them with the reasons."
        )


class Sieve:
    """Leaves out broken records outside of training steps.

    Args:
        skip: leave them out; else the first one is raised.
        most: share of the records that may be left out.
        what: name of the command, for messages.
    """

    def __init__(self, skip: bool, most: float, what: str) -> None:
        self.skip, self.most, self.what = skip, most, what
        self.seen = 0
        self.broken: dict[tuple[str, ...], dict[str, str]] = {}

    def sound(self, source: Iterable[Sample | RecordError]) -> Iterator[Sample]:
        """Yield the samples that can be read."""
        for sample in source:
            self.seen += 1
            if isinstance(sample, RecordError):
                self.leave_out(sample)
            else:
                yield sample

    def leave_out(self, error: RecordError) -> None:
        """Note a broken record.

        Raises:
            RecordError: records may not be left out.
        """
        if not self.skip:
            raise error
        self.broken.setdefault(_key(error.line()), error.line())

    def add(self, other: "Sieve") -> None:
        """Add the counts of another process."""
        self.seen += other.seen
        self.broken = other.broken | self.broken

    @property
    def lines(self) -> list[dict[str, str]]:
        """The records that were left out, with reasons."""
        return list(self.broken.values())

    def excess(self) -> ZooError | None:
        """Return an error if too many records were left out."""
        first = next(iter(self.broken.values()), {})
        example = f"{first.get('where')}, {first.get('id')}: {first.get('reason')}"
        return excess(len(self.broken), self.seen, self.most, self.what, example=example)


def excess(left_out: int, seen: int, most: float, what: str, listed: str = "", example: str = "") -> ZooError | None:
    """Return an error if more than `most` of the records are left out; None below `PATIENCE` records."""
    if seen < PATIENCE or left_out <= most * seen:
        return None
    more = f"{listed!r} lists them with the reasons." if listed else f"The first: {example}"
    share = f"{left_out} of {seen} records, more than max_broken={most:g} of them"
    return ZooError(f"{what} had to leave out {share}. {more}")


def _key(line: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(str(line.get(name, "")) for name in ("data", "where", "id"))
