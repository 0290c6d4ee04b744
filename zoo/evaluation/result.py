"""Scores of a model, and its predictions."""

import json
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
    def name(self) -> str:
        kind = f"{self.kind}_held_out" if self.held_out else self.kind
        return f"{self.data}/{kind}/{self.metric}"


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
        """Return the value of every figure, by `data/kind/metric`."""
        return {line.name: line.score.value for line in self.lines}

    def save(self, folder: Path) -> None:
        """Write scores.json and predictions.jsonl."""
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "scores.json", [asdict(line) for line in self.lines])
        # A lone surrogate cannot be encoded in UTF-8; backslashreplace gives JSON's own escape, \udc00.
        options: dict[str, Any] = {"mode": "w", "encoding": "utf-8", "errors": "backslashreplace"}
        with written_beside(folder / "predictions.jsonl") as beside, beside.open(**options) as file:
            for row in self.predictions:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
