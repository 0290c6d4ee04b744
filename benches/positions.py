"""`zoo bench positions`: what models score with fewer image tokens, by whether the tokens keep their places.

Each model of the zoo with trained weights, with each pruner and share of tokens, is scored twice on the same questions:
positions counted over what is left (`dense`), and as they were without a pruner (`kept`). Nothing is trained. A figure
is the mean over the kinds of questions of the first metric of each, in per cent.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from zoo.benches.abilities import Ability, Draws, mean_of, scores
from zoo.benches.measure import Value
from zoo.benches.place import at_least_one, torch_threads
from zoo.benches.prune_models import Arms
from zoo.benches.prune_options import NONE, share_option
from zoo.benches.report import Report, Row, machine
from zoo.registry import ZooError, names, unknown

MODELS = (
    "fashion_tiny=fashion_mnist,llava_kd_fashion=fashion_mnist,llava_mod_fashion=fashion_mnist,"
    "scenes_tiny=scenes_basics,llava_kd_tiny=scenes_basics,llava_mod_tiny=scenes_basics"
)
GIVEN: dict[str, dict[str, Any]] = {
    "aim": {"prune": False},
    "vscan": {"llm_ratio": 1.0},
}  # what asks about the layers of the LLM is left out


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
            whole = _score(Arms(model, data), NONE, None, options.limit)
            report.table.append((f"`{model}`", "all tokens", [f"{whole.mean:.1f} +- {whole.stderr:.1f}"] * len(shares)))
            report.add(_row(f"{model}: all tokens", whole))
            for pruner in options.pruner.split(","):
                cells = []
                for share in shares:
                    node: dict[str, Any] = {share_option(pruner): share} | GIVEN.get(pruner, {})
                    found = {
                        way: _score(Arms(model, data, way), pruner, node, options.limit) for way in ("dense", "kept")
                    }
                    cells.append(" -> ".join(f"{ability.mean:.1f}" for ability in found.values()))
                    report.add(*(_row(f"{model}, {pruner} at {share}: {way}", x) for way, x in found.items()))
                report.table.append((f"`{model}`", f"`{pruner}`", cells))
                show(f"{model}, {pruner}: {', '.join(cells)}")
    return report


def _row(what: str, score: Ability) -> Row:
    return Row(what, Value(score.mean, score.mean - score.stderr, score.mean + score.stderr), " %")


def _score(arms: Arms, pruner: str, node: dict[str, Any] | None, limit: int) -> Ability:
    """The mean over kinds of questions."""
    model, draws = arms.model(pruner, node), Draws()
    draws.add(scores(model, arms.processor, arms.config, limit)["model"])
    return mean_of(draws.abilities())
