"""`zoo bench positions`: what models score with fewer image tokens, by whether the tokens keep their places.

Each model of the zoo with trained weights, with each pruner and share of tokens, is scored twice on the same questions:
positions counted over what is left (`dense`), and as they were without a pruner (`kept`). Nothing is trained. A figure
is the mean over the kinds of questions of the first metric of each, in per cent.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from zoo.benches.measure import Value
from zoo.benches.place import at_least_one, torch_threads
from zoo.benches.report import Report, Row, machine
from zoo.registry import ZooError, names, unknown

MODELS = (
    "fashion_tiny=fashion_mnist,llava_kd_fashion=fashion_mnist,llava_mod_fashion=fashion_mnist,"
    "scenes_tiny=scenes_basics,llava_kd_tiny=scenes_basics,llava_mod_tiny=scenes_basics"
)
# What pruners need that score by [CLS], which no shipped encoder has; and what asks about the layers of the LLM.
GIVEN = {
    "fastervlm": ["score=column_mean"],
    "holov": ["score=column_mean"],
    "prumerge": ["score=column_mean"],
    "vispruner": ["score=column_mean"],
    "visionzip": ["score=column_mean"],
    "aim": ["prune=false"],
}
SHARE = {"aim": "merge_ratio"}  # option for the share of tokens that stay; else keep_ratio


@dataclass
class Options:
    models: str = MODELS  # name=data, with commas between; the data is what `zoo eval` takes
    pruner: str = "fastervlm,visionzip,divprune,random,aim"  # with commas between
    keep: str = "0.5,0.25"  # shares of the tokens that stay
    limit: int = 500  # samples of the evaluation split
    threads: int = 1  # of torch

    def __post_init__(self) -> None:
        at_least_one(self, "limit", "threads")
        for name in self.pruner.split(","):
            if name not in names("pruner"):
                raise unknown("pruner", name, names("pruner"))
        if wrong := [pair for pair in self.models.split(",") if len(pair.split("=")) != 2]:
            raise ZooError(f"models are written name=data, got {wrong[0]!r}.")


class PositionsReport(Report):
    """A row for each model and pruner, a column for each share and way of counting."""

    columns_of: list[str]
    table: list[tuple[str, str, list[str]]]

    def markdown(self) -> str:
        """Return the scores as a Markdown table, with command and machine above it."""
        lines = [f"## {self.title}", "", f"    {self.command}", "", *(f"- {line}" for line in self.setting)]
        lines += [f"- {key}: {value}" for key, value in self.machine.items()]
        lines += [
            "",
            f"| model | pruner | {' | '.join(self.columns_of)} |",
            "|---|---|" + "---|" * len(self.columns_of),
        ]
        return "\n".join([*lines, *(f"| {m} | {p} | {' | '.join(c)} |" for m, p, c in self.table)]) + "\n"


def run(options: Options, show: Callable[[str], None] = print) -> PositionsReport:
    """Score every model with every pruner, both ways."""
    shares = options.keep.split(",")
    report = PositionsReport("zoo bench positions", machine=machine(torch.device("cpu"), options.threads))
    report.columns_of = [f"keep {share}: dense -> kept" for share in shares]
    report.table, report.columns = [], ("per cent", "within a standard error")
    report.setting = [
        f"{options.limit} samples of the evaluation split, answered greedily; the mean over kinds of questions"
    ]
    with torch_threads(options.threads):
        for model, data in (pair.split("=") for pair in options.models.split(",")):
            score, error = _score(model, data, [], options.limit)
            report.table.append((f"`{model}`", "all tokens", [f"{score:.1f} +- {error:.1f}"] * len(shares)))
            report.add(_row(f"{model}: all tokens", score, error))
            for pruner in options.pruner.split(","):
                cells = []
                for share in shares:
                    words = [f"pruner=[{pruner}]", f"pruner.{pruner}.{SHARE.get(pruner, 'keep_ratio')}={share}"]
                    words += [f"pruner.{pruner}.{option}" for option in GIVEN.get(pruner, ())]
                    found = {
                        way: _score(model, data, [*words, f"positions={way}"], options.limit)
                        for way in ("dense", "kept")
                    }
                    cells.append(" -> ".join(f"{value:.1f}" for value, _ in found.values()))
                    report.add(*(_row(f"{model}, {pruner} at {share}: {way}", *x) for way, x in found.items()))
                report.table.append((f"`{model}`", f"`{pruner}`", cells))
                show(f"{model}, {pruner}: {', '.join(cells)}")
    return report


def _row(what: str, score: float, error: float) -> Row:
    return Row(what, Value(score, score - error, score + error), " %")


def _score(name: str, data: str, words: list[str], limit: int) -> tuple[float, float]:
    """The mean over kinds of questions, and its standard error as of independent kinds; in per cent."""
    from zoo.evaluation.evaluate import evaluate
    from zoo.loading.build import build
    from zoo.registry import build as build_component
    from zoo.runs.data import RunData
    from zoo.settings.config import compose
    from zoo.settings.source import source_of

    config: Any = compose("eval", [f"model={name}", f"data=[{data}]", "recipe=null", *words])
    model, processor = build(source_of(config), device="cpu")
    datasets = RunData(config.data)
    tasks = {str(key): build_component("task", node) for key, node in config.task.items()}
    result = evaluate(model, processor, datasets.evaluation or datasets.all, tasks, limit=limit, baselines=False)
    first = {(line.data, line.kind, line.held_out): line.score for line in reversed(result.lines)}
    values = list(first.values())
    error = sum(score.stderr**2 for score in values) ** 0.5 / len(values)
    return 100 * sum(score.value for score in values) / len(values), 100 * error
