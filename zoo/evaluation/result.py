"""Scores of a model, and its predictions."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from zoo.registry import Score
from zoo.storage.atomic import write_json, written_beside


@dataclass
class Line:
    """One figure of the table."""

    data: str
    kind: str
    task: str
    metric: str
    held_out: bool
    score: Score
    blind: Score | None = None
    majority: Score | None = None

    @property
    def group(self) -> str:
        """The kind, also by whether training shows it."""
        return f"{self.kind}_held_out" if self.held_out else self.kind


def metrics_of(figures: Sequence[tuple[str, str, str, str]]) -> list[str]:
    """Name the metric of each (data, kind, task, metric), with the task in front where several tasks give the same."""
    same = Counter((data, kind, metric) for data, kind, _, metric in figures)
    return [metric if same[data, kind, metric] < 2 else f"{task}.{metric}" for data, kind, task, metric in figures]


def names_of(figures: Sequence[tuple[str, str, str, str]]) -> list[str]:
    """Name each (data, kind, task, metric): `data/kind/metric`, the metric as in `metrics_of`."""
    named = zip(figures, metrics_of(figures), strict=True)
    return [f"{data}/{kind}/{metric}" for (data, kind, *_), metric in named]


def plain(value: Any) -> Any:
    """Return what JSON holds of a value that it does not take: numbers of numpy and torch, or the text of others."""
    return value.tolist() if hasattr(value, "tolist") else str(value)


@dataclass
class EvalResult:
    """Scores, and the predictions that they are computed from."""

    lines: list[Line]
    predictions: list[dict[str, Any]] = field(default_factory=list)
    skipped: list[dict[str, str]] = field(default_factory=list)  # records that were left out, with reasons
    model: str = ""  # set by `zoo eval`, as are folder and seconds
    folder: str = ""
    seconds: float | None = None

    def as_json(self) -> dict[str, Any]:
        """Return the scores; each answer is in predictions.jsonl of the folder."""
        head = {"model": self.model, "folder": self.folder, "seconds": self.seconds, "answers": len(self.predictions)}
        return {**head, "skipped": self.skipped, "scores": [asdict(line) for line in self.lines]}

    def summary(self) -> dict[str, float]:
        """Return the value of every figure, by `data/kind/metric`; `task.metric` where several tasks give the same."""
        names = names_of([(line.data, line.group, line.task, line.metric) for line in self.lines])
        return {name: line.score.value for name, line in zip(names, self.lines, strict=True)}

    def save(self, folder: Path) -> None:
        """Write scores.json and predictions.jsonl."""
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "scores.json", [asdict(line) for line in self.lines])
        # A lone surrogate cannot be encoded in UTF-8; backslashreplace gives JSON's own escape, \udc00.
        options: dict[str, Any] = {"mode": "w", "encoding": "utf-8", "errors": "backslashreplace"}
        with written_beside(folder / "predictions.jsonl") as beside, beside.open(**options) as file:
            for row in self.predictions:
                file.write(json.dumps(row, ensure_ascii=False, default=plain) + "\n")
