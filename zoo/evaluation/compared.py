"""Two evaluations on the same samples: paired differences, and the answers that changed from right to wrong or back.

The difference of two scores on the same questions has a smaller error than that of two samples: what makes a question
hard for both models cancels. For each score it is the mean over the questions of `second - first`, with the standard
error of that mean.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from zoo.evaluation.result import metrics_of
from zoo.registry import Score, ZooError
from zoo.tasks.estimates import mean
from zoo.text.markup import cell, printable
from zoo.text.terminal import console, say, width

if TYPE_CHECKING:
    from rich.table import Table

PREDICTIONS = "predictions.jsonl"
ALL = "all"
RIGHT = 0.5  # of the first score of an answer; below it is wrong
Key = tuple[Any, ...]


@dataclass(frozen=True)
class Difference:
    """A score of both models on the same questions, and the paired difference `second - first`."""

    data: str
    kind: str
    task: str
    metric: str
    first: Score
    second: Score
    difference: Score


@dataclass(frozen=True)
class Flip:
    """An answer that is right for one model and wrong for the other."""

    data: str
    id: str
    kind: str
    task: str
    question: str
    first: str
    second: str
    references: list[str]
    better: str  # first | second: the model whose answer is right


@dataclass(frozen=True)
class Compared:
    """Two evaluations, question by question."""

    names: tuple[str, str]
    differences: list[Difference]
    flips: list[Flip]
    questions: int

    def as_json(self) -> dict[str, Any]:
        """Return everything as plain values."""
        first, second = self.names
        lines = [asdict(line) for line in self.differences]
        return {
            "first": first,
            "second": second,
            "questions": self.questions,
            "differences": lines,
            "flips": [asdict(flip) for flip in self.flips],
        }


def answers_of(folder: Path) -> dict[Key, dict[str, Any]]:
    """Return the answers of an evaluation, by data, sample, kind, prompt, task, and how often these came before.

    Raises:
        ZooError: there are no predictions, or a line is not one.
    """
    path = folder / PREDICTIONS if folder.is_dir() else folder
    if not path.is_file():
        raise ZooError(f"{str(folder)!r} has no {PREDICTIONS}: it is not a folder of `zoo eval`.")
    rows = []
    with path.open("rb") as lines:  # of any size: those of the 214,354 questions of VQA v2 take 100 MB
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                for score in row["scores"].values():
                    float(score)
                next(iter(row["scores"]))
                rows.append({**row, **{name: str(row[name]) for name in ("data", "id", "kind", "prompt")}})
            except (ValueError, TypeError, KeyError, AttributeError, StopIteration, RecursionError) as error:
                reason = f"{type(error).__name__}: {error}"
                raise ZooError(f"{path}, line {number} is not a scored answer: {reason}.") from error
    if not rows:
        raise ZooError(f"{str(path)!r} is empty.")
    return by_question(rows)


def by_question(rows: Sequence[Mapping[str, Any]]) -> dict[Key, dict[str, Any]]:
    """Return rows of predictions by data, sample, kind, prompt, task, and how often these came before."""
    found: dict[Key, dict[str, Any]] = {}
    seen: Counter[Key] = Counter()
    for row in rows:
        key = (row["data"], str(row["id"]), row["kind"], row["prompt"], str(row.get("task", "")))
        found[*key, seen[key]] = dict(row)
        seen[key] += 1
    return found


def require_same(names: Sequence[str], answers: Sequence[Mapping[Key, Any]]) -> None:
    """Refuse evaluations of other questions.

    Raises:
        ZooError: with the first question that one of them lacks.
    """
    first, *others = answers
    for name, found in zip(names[1:], others, strict=True):
        if missing := [key for key in first if key not in found] or [key for key in found if key not in first]:
            data, sample, _, prompt = missing[0][:4]
            raise ZooError(
                f"The evaluations in {names[0]!r} and {name!r} are of other questions: {len(missing)} are in "
                f"one of them, the first is {prompt!r} of {data}/{sample}. Run both with the same data and limit."
            )


def compared(names: tuple[str, str], first: Mapping[Key, Any], second: Mapping[Key, Any]) -> Compared:
    """Compare the answers of two models.

    Args:
        names: of the models.
        first: answers of the first one, from `answers_of` or `by_question`.
        second: of the second one, to the same questions.

    Raises:
        ZooError: they answered other questions.
    """
    require_same(names, [first, second])
    groups: dict[tuple[str, str, str, str], list[tuple[float, float]]] = {}
    flips = []
    for key, row in first.items():
        other = second[key]
        kind = f"{row['kind']}_held_out" if (row.get("meta") or {}).get("held_out") else row["kind"]
        for metric, value in row["scores"].items():
            if metric.startswith("_") or metric not in other["scores"]:
                continue
            groups.setdefault((row["data"], kind, row.get("task", ""), metric), []).append(
                (value, other["scores"][metric])
            )
        right = [next(iter(r["scores"].values())) >= RIGHT for r in (row, other)]
        if right[0] != right[1]:
            texts = (str(row["prediction"]), str(other["prediction"]))
            better = "first" if right[0] else "second"
            said = [str(text) for text in row.get("answers") or []]
            about = (row["data"], str(row["id"]), kind, str(row.get("task", "")), row["prompt"])
            flips.append(Flip(*about, *texts, said, better))
    lines = [_difference(*group, pairs) for group, pairs in groups.items()]
    return Compared(names, [*_overall(groups), *lines], flips, len(first))


def _overall(groups: Mapping[tuple[str, str, str, str], list[tuple[float, float]]]) -> list[Difference]:
    """Return a line over all kinds of question, for each data set and score that has several."""
    joined: dict[tuple[str, str, str], list[list[tuple[float, float]]]] = {}
    for (data, kind, task, metric), pairs in groups.items():
        if not kind.endswith("_held_out"):
            joined.setdefault((data, task, metric), []).append(pairs)
    several = {key: some for key, some in joined.items() if len(some) > 1}
    return [
        _difference(d, ALL, t, m, [pair for pairs in some for pair in pairs]) for (d, t, m), some in several.items()
    ]


def _difference(data: str, kind: str, task: str, metric: str, pairs: Sequence[tuple[float, float]]) -> Difference:
    both = np.array(pairs, np.float64)  # (n, 2)
    return Difference(data, kind, task, metric, mean(both[:, 0]), mean(both[:, 1]), mean(both[:, 1] - both[:, 0]))


# ---- text --------------------------------------------------------------------------------------------------------


def difference_table(found: Compared) -> "Table":
    """Make the table; a difference beyond two standard errors is bold."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), caption_justify="left")
    table.caption = "per cent; difference: second - first ± its paired standard error, bold beyond two"
    for name in ("data", "kind", "metric"):
        table.add_column(name, overflow="fold")
    for name in ("first", "second", "difference", "n"):
        table.add_column(name, justify="right", no_wrap=True)
    last = ""
    metrics = metrics_of([(line.data, line.kind, line.task, line.metric) for line in found.differences])
    for line, metric in zip(found.differences, metrics, strict=True):
        d = line.difference
        text = f"{100 * d.value:+.1f} ± {100 * d.stderr:.1f}"
        text = f"[bold]{text}[/bold]" if abs(d.value) > 2 * d.stderr and d.n > 1 else text
        cells = (f"{100 * line.first.value:.1f}", f"{100 * line.second.value:.1f}", text, str(d.n))
        table.add_row(cell(line.data if line.data != last else ""), cell(line.kind), cell(metric), *cells)
        last = line.data
    return table


def show(found: Compared, flips: int) -> None:
    """Print the table and the first flips of each direction."""
    say(f"first   {found.names[0]}\nsecond  {found.names[1]}", subsequent="        ")
    console().print(difference_table(found))
    right = {which: [flip for flip in found.flips if flip.better == which] for which in ("first", "second")}
    say(
        f"{len(found.flips)} of {found.questions} answers flip: {len(right['first'])} are right of the first alone, "
        f"{len(right['second'])} of the second alone."
    )
    for which, some in right.items():
        if some[:flips]:
            say(f"\nright of the {which} alone:")
        for flip in some[:flips]:
            say(f"  {flip.data}/{flip.kind} {printable(flip.id)}: {_cut(flip.question)}", subsequent="    ")
            say(f"    first {_cut(flip.first)!r}, second {_cut(flip.second)!r}, reference {_references(flip)}", "    ")
        if 0 < flips < len(some):
            say(f"  and {len(some) - flips} more: --flips {len(some)} or --json shows them")


def _references(flip: Flip) -> str:
    shown = [repr(_cut(text)) for text in dict.fromkeys(flip.references)]
    return " or ".join(shown[:3]) + (f" and {len(shown) - 3} more" if len(shown) > 3 else "")


def _cut(text: str) -> str:
    plain = printable(text.replace("\n", " "))
    return plain if len(plain) <= 2 * width() else plain[: 2 * width()] + "..."
