"""Rows of an evaluation on several processes: each writes its own to a file, and the first one reads all.

A file ends with what its process left out; one without that line is of a process that was killed. Nothing of a killed
evaluation is used: files of an earlier one are removed at the start.
"""

import json
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from zoo.evaluation.result import plain
from zoo.registry import ZooError
from zoo.runs.left_out import Sieve
from zoo.runs.processes import broadcast, by_first
from zoo.storage.atomic import BESIDE, remove, writing

NAME = f".answers{BESIDE}"  # a resumed run removes names that end so
Row = dict[str, Any]


@contextmanager
def shares_in(accelerator: Any, folder: Path | None) -> Iterator[Path]:
    """Make a folder for the files of all processes; it is removed at the end.

    Args:
        accelerator: of the processes.
        folder: that all processes see; None: a temporary one, of processes on one machine.
    """

    def make() -> str:
        if folder is None:
            return tempfile.mkdtemp(prefix="zoo-answers-")
        remove(folder / NAME)
        (folder / NAME).mkdir(parents=True)
        return str(folder / NAME)

    with writing("answers", "Choose another place with run.dir=<folder>."):
        place = Path(by_first(accelerator, make))
    try:
        yield place
    finally:
        if accelerator.is_main_process:
            remove(place)


def write_share(file: Path, groups: Iterable[tuple[str, Iterable[Row]]], sieve: Sieve) -> None:
    """Write this process's rows as they come, a line each, and then what was left out.

    Args:
        file: of this process.
        groups: name -> rows; each group is read to its end before the next one begins.
        sieve: of all groups.
    """
    with writing("answers"), file.open("w", encoding="ascii") as out:
        for name, rows in groups:
            for row in rows:
                out.write(json.dumps([name, row], default=plain) + "\n")
        out.write(json.dumps(["left out", {"seen": sieve.seen, "broken": list(sieve.broken.items())}]) + "\n")


def read_shares(files: Iterable[Path], sieve: Sieve) -> dict[str, list[Row]]:
    """Read the rows of all processes, by group, and add what they left out to `sieve`.

    Raises:
        ZooError: a file is not complete.
    """
    found: dict[str, list[Row]] = {}
    for file in files:
        name = ""
        with file.open(encoding="ascii") as lines:
            for line in lines:
                name, row = json.loads(line)
                if name != "left out":
                    found.setdefault(name, []).append(row)
        if name != "left out":
            raise ZooError(f"{str(file)!r} is not complete: the process that wrote it ended early.")
        other = Sieve(sieve.skip, sieve.most, sieve.what)
        other.seen, other.broken = row["seen"], {tuple(key): reason for key, reason in row["broken"]}
        sieve.add(other)
    return found


def join(
    accelerator: Any,
    folder: Path | None,
    groups: Iterable[tuple[str, Iterable[Row]]],
    sieve: Sieve,
    then: Callable[[dict[str, list[Row]], Sieve], Any],
    *,
    shares: int,
) -> Any:
    """Call `then` with the rows of all processes, in the first one; return its result, in the others None.

    Args:
        accelerator: of the processes.
        folder: as in `shares_in`.
        groups: the rows of this process, by group.
        sieve: what it leaves out while they are made.
        then: takes the rows by group, and what all processes left out.
        shares: number of processes, from the first on, whose rows count; the others have the same.
    """
    with shares_in(accelerator, folder) as place:
        write_share(place / f"{accelerator.process_index}.jsonl", groups, sieve)
        accelerator.wait_for_everyone()
        result = None

        def read() -> None:
            nonlocal result
            files = [place / f"{rank}.jsonl" for rank in range(shares)]
            everything = Sieve(sieve.skip, sieve.most, sieve.what)
            result = then(read_shares(files, everything), everything)

        by_first(accelerator, read)
        return result


def everywhere(accelerator: Any, value: Any) -> Any:
    """Return the first process's value in all of them."""
    return broadcast(accelerator, value)
