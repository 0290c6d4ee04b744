"""Records that a run leaves out because they cannot be used: counted, listed once each, and never too many."""

from collections.abc import Iterable, Mapping
from typing import Any

from zoo.registry import ZooError
from zoo.run_folder import RunFolder, read_metrics

PATIENCE = 100  # records that are seen before their share is looked at


class LeftOut:
    """What the stages of a run left out.

    Args:
        folder: whose skipped.jsonl the first process writes.
        most: share of the records of a stage that may be left out.
        seen, left_out: records of the stage so far, where a run goes on.
    """

    def __init__(self, folder: RunFolder, most: float, seen: int = 0, left_out: int = 0) -> None:
        self.folder, self.most, self.counts = folder, most, (seen, left_out)
        self._known = {_key(row) for row in read_metrics(folder.skipped)}

    def begin(self) -> None:
        """Start counting anew, for a stage."""
        self.counts = 0, 0

    def add(self, seen: int, broken: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Count the records of a step, over all processes; returns those that no step has left out before."""
        broken = list(broken)
        self.counts = self.counts[0] + seen, self.counts[1] + len(broken)
        new = []
        for line in broken:
            if _key(line) not in self._known:
                self._known.add(_key(line))
                new.append(dict(line))
        return new

    def excess(self, stage: str) -> ZooError | None:
        """The error of a stage that leaves out too many."""
        seen, left_out = self.counts
        if seen < PATIENCE or left_out <= self.most * seen:
            return None
        return too_many(left_out, seen, self.most, str(self.folder.skipped), f"Stage {stage!r}")

    def nothing_left(self, stage: str) -> ZooError | None:
        """The error of a stage that was left with nothing to learn from."""
        seen, left_out = self.counts
        if not seen or left_out < seen:
            return None
        return ZooError(
            f"Stage {stage!r} learnt nothing: each of its {seen} records is broken. {str(self.folder.skipped)!r} lists "
            "them with the reasons."
        )


def too_many(left_out: int, seen: int, most: float, listed: str, what: str) -> ZooError:
    """The error where more records are broken than may be left out."""
    return ZooError(
        f"{what} had to leave out {left_out} of {seen} records, more than max_broken={most:g} of them. {listed!r} "
        "lists them with the reasons."
    )


def _key(line: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(str(line.get(name, "")) for name in ("data", "where", "id"))
