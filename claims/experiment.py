"""A claim as an experiment: what is trained and scored for one seed, what must come out, and rows kept as they come.

A run that was killed goes on behind the last arm whose rows are in its file. Numbers are those of an unbroken run: an
arm is trained from its own seed, and where arms draw from one stream the state of the stream is kept with the rows.
"""

import ast
import base64
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from shutil import rmtree
from typing import Any, TypeVar

import torch

from zoo.benches.measure import Value
from zoo.benches.report import Row, short

Numbers = Mapping[str, float]  # name of a row -> its number
T = TypeVar("T")
_PACKAGE = "zoo.claims"


@dataclass(frozen=True)
class Bound:
    """A number made of the rows, and what it must reach; without a bound it is only shown.

    Attributes:
        what: in words.
        number: of the rows of one seed, or of their means.
        at_least: bound from below.
        at_most: bound from above.
        over: `seeds`: the mean of a number for each seed, with its range; `least`: the lowest of these; `means`: the
            number of the means of the rows.
        unit: behind the number.
        note: what else belongs to it.
    """

    what: str
    number: Callable[[Numbers], float]
    at_least: float | None = None
    at_most: float | None = None
    over: str = "means"
    unit: str = ""
    note: str = ""

    def row(self, claim: str, runs: Sequence[Numbers]) -> Row:
        """Return the row of a report, from the rows of every seed."""
        if self.over == "means":
            each = [self.number({name: mean([run[name] for run in runs]) for name in runs[0]})]
        else:
            each = [self.number(run) for run in runs]
        value = Value(min(each) if self.over == "least" else mean(each), min(each), max(each))
        bound = self.at_least if self.at_most is None else self.at_most
        end = ", least of the seeds" if self.over == "least" else ""
        return Row(f"{claim}: {self.what}{end}", value, self.unit, bound, self.at_most is not None, self.note)


in_seeds = partial(Bound, over="seeds")
least_of_seeds = partial(Bound, over="least")


def gap(above: str, below: str) -> Callable[[Numbers], float]:
    """How far one row is above another."""
    return lambda found: found[above] - found[below]


def ratio(above: str, below: str) -> Callable[[Numbers], float]:
    """One row over another."""
    return lambda found: found[above] / found[below]


def row(name: str) -> Callable[[Numbers], float]:
    """A row as it is."""
    return lambda found: found[name]


def mean(numbers: Sequence[Any]) -> float:
    """The mean; 0 of nothing."""
    return sum(map(float, numbers)) / max(1, len(numbers))


@dataclass(frozen=True)
class Experiment:
    """What a paper says, made small enough for two cores.

    Attributes:
        setting: what is done, in lines for the report.
        measure: trains and scores every arm with one seed; the rows go into the run that it is given.
        bounds: what must come out.
        data: folders below $ZOO_DATA that it needs.
        draw: makes a picture of the rows of all seeds, at a path; None: there is none to make.
    """

    setting: Sequence[str]
    measure: Callable[["Run"], None]
    bounds: Sequence[Bound]
    data: Sequence[str] = ()
    draw: Callable[[Mapping[str, list[float]], Path], None] | None = None


class RowFile:
    """The rows of one seed in a file of JSON lines: first what they depend on, then a line for each arm.

    Args:
        path: of the file; None: nothing is kept.
        head: what the rows depend on; a file with another head is put aside.
        show: is told what becomes of a file that is there.

    Attributes:
        folder: beside the file, for what an arm keeps while it trains; None: nothing is kept.
    """

    def __init__(self, path: Path | None, head: Mapping[str, Any], show: Callable[[str], None]) -> None:
        self.path, self.lines = path, []
        self.folder = None if path is None else path.with_suffix("")
        if path is None:
            return
        found = _lines_of(path)
        if found and found[0] == head:
            self.lines = found[1:]
            arms = f"{sum(line['arm'] is not None for line in self.lines)} arms are kept"
            show(f"{path}: {'all its rows are kept; remove it to measure anew' if self.whole else arms}")
        elif path.exists():
            aside = path.with_suffix(".other.jsonl")
            path.replace(aside)
            self.remove_folder()
            show(f"{path}: of other options, another torch or other code of the claim; begins anew, it is now {aside}")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(line) + "\n" for line in (head, *self.lines)), encoding="utf-8")

    @property
    def whole(self) -> bool:
        """Whether all arms are there."""
        return bool(self.lines) and "whole" in self.lines[-1]

    def append(self, line: dict[str, Any]) -> None:
        self.lines.append(line)
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")

    def remove_folder(self) -> None:
        """Remove what arms have kept while they trained."""
        if self.folder is not None and self.folder.is_dir():
            rmtree(self.folder)


class Run:
    """One seed of an experiment, and the rows that it has measured.

    Args:
        seed: of everything that is drawn.
        share: of the steps; below 1 for tests, where test sets are small as well.
        show: is told each row as it comes.
        file: of rows that are there already, and that others are added to.
    """

    def __init__(
        self, seed: int, share: float = 1.0, show: Callable[[str], None] = print, file: RowFile | None = None
    ) -> None:
        self.seed, self.share, self.show = seed, share, show
        self._file = file or RowFile(None, {}, show)
        self._arm: dict[str, float] | None = None  # rows of the arm that is being measured
        self.found: dict[str, float] = {}
        for line in self._file.lines:
            self.found |= line["rows"]

    def steps(self, whole: int, least: int = 2) -> int:
        """Return the share of `whole` steps."""
        return max(least, round(whole * self.share))

    def size(self, whole: int, small: int) -> int:
        """Return how large a test set is: `small` with a share of the steps."""
        return whole if self.share == 1 else small

    @property
    def folder(self) -> Path | None:
        """Where an arm may keep what it has trained so far; it goes when all seeds are measured."""
        return self._file.folder

    def generator(self, offset: int = 0) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed + offset)

    def add(self, rows: Mapping[str, float]) -> None:
        """Add rows; one that an earlier run has measured stays as it is."""
        new = {name: float(number) for name, number in rows.items() if name not in self.found}
        self.found |= new
        if self._arm is not None:
            self._arm |= new
        elif new:
            self._file.append({"arm": None, "rows": new})

    def arms(self, arms: Mapping[str, T], stream: torch.Generator | None = None) -> Iterator[tuple[str, T]]:
        """Go through the arms that are not measured yet; what is added meanwhile are the rows of an arm.

        Args:
            arms: name -> whatever an arm is.
            stream: of random numbers that one arm after the other draws from.
        """
        done = {line["arm"]: line for line in self._file.lines}
        for name, arm in arms.items():
            if name in done:
                if stream is not None:
                    stream.set_state(_state(done[name]["stream"]))
                continue
            self._arm = {}
            yield name, arm
            rows, self._arm = self._arm, None
            self.show(f"  {name}: " + ", ".join(f"{_rest(key, name)}{short(value)}" for key, value in rows.items()))
            state = None if stream is None else base64.b64encode(stream.get_state().numpy().tobytes()).decode()
            self._file.append({"arm": name, "rows": rows, "stream": state})


def over_seeds(runs: Sequence[Run]) -> dict[str, list[float]]:
    """Name of a row -> its number for each seed."""
    return {name: [run.found[name] for run in runs] for name in runs[0].found}


def source_hash(claim: str) -> str:
    """What the code of a claim is, and of the files of this folder that it imports: rows of two states do not mix."""
    wanted, found = {claim, Path(__file__).stem}, dict[str, bytes]()
    while wanted:
        name = wanted.pop()
        found[name] = Path(__file__).with_name(f"{name}.py").read_bytes()
        wanted |= _imported(found[name]) - found.keys()
    return hashlib.sha256(b"".join(found[name] for name in sorted(found))).hexdigest()[:16]


def _imported(code: bytes) -> set[str]:
    """Names of the files of this folder that code imports."""
    names = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom) and node.module:
            package, _, name = node.module.rpartition(".")
            if package == _PACKAGE:
                names.add(name)
            elif node.module == _PACKAGE:
                names |= {alias.name for alias in node.names}
    return names


def _rest(key: str, arm: str) -> str:
    """What a row says beside the name of its arm, with a space behind it."""
    rest = key.removeprefix(arm).lstrip(",: ")
    return f"{rest} " if rest else ""


def _state(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)


def _lines_of(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a file; the last one may have been cut off when the run was killed."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]
