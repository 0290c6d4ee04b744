"""`zoo report runs/...`: compare runs in one table and one picture.

zoo report                      every run below runs/
zoo report runs/2026-11-22      those of a day, or of a sweep
zoo report a b out=both.png     two runs; the picture goes to both.png

zoo report full=a small=b c d   evaluations c and d where a smaller image (b) answers right, and where it does not
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from zoo.inspection import filtered
from zoo.registry import ZooError, unknown
from zoo.registry.foreign import INDEX, read_json
from zoo.runs.folder import read_metrics, runs
from zoo.storage.atomic import writing
from zoo.text.markup import cell, label

SHOWN = 12  # columns of scores that a table holds; the picture has as many groups of bars
OPTIONS = ("out", "full", "small")
SMOOTH = 0.02  # share of a run's steps that its loss curve is averaged over


@dataclass
class Summary:
    """The figures of one run."""

    name: str
    path: Path
    state: str  # done, or the last step
    parameters: int | None
    steps: int
    seconds: float | None
    loss: float | None
    scores: dict[str, float]  # data/kind/metric -> value
    errors: dict[str, float]  # their standard errors
    curve: list[tuple[int, float]]


def main(words: Sequence[str]) -> int:
    """Print the table and write the picture."""
    if any(word in ("-h", "--help") for word in words):
        print(__doc__)
        return 0
    options = dict(word.split("=", 1) for word in words if "=" in word)
    for key in options:
        if key not in OPTIONS:
            raise unknown("option of zoo report", key, OPTIONS)
    folders = [Path(word) for word in words if "=" not in word]
    if options.keys() & {"full", "small"}:
        filtered.show(options, folders)
        return 0
    folders = folders or [Path("runs")]
    found = summaries(folders)
    Console().print(report_table(found))
    picture = Path(options.get("out") or (folders[0] if folders[0].is_dir() else Path()) / "report.png")
    with writing(f"the picture {str(picture)!r}", "Choose another place with out=<file>."):
        draw(found, picture)
    Console().print(f"Curves and bars are in {picture}", soft_wrap=True, highlight=False, markup=False)
    return 0


def summaries(folders: Sequence[Path]) -> list[Summary]:
    """Return a summary of every run in or below the folders, oldest first.

    Raises:
        ZooError: a folder does not exist, or there are no runs.
    """
    for folder in folders:
        if not folder.exists():
            raise ZooError(f"There is no folder {str(folder)!r}. Train a model first with `zoo train`.")
    found = list(dict.fromkeys(path for folder in folders for path in runs(folder.resolve())))
    if not found:
        raise ZooError(f"There is no run in {', '.join(map(repr, map(str, folders)))}: none has a config.yaml.")
    return [summarise(path) for path in found]


def summarise(path: Path) -> Summary:
    """Read the files of a run, finished or not."""
    rows = [r for r in read_metrics(path / "metrics.jsonl") if "loss" in r]
    done = _json(path / "summary.json") or {}
    lines = _json(path / "scores.json") or []
    scores = {f"{x['data']}/{x['kind']}/{x['metric']}": x["score"] for x in lines}
    return Summary(
        name=path.name,
        path=path,
        state="done" if done else f"step {len(rows)}" if rows else "no steps",
        parameters=done.get("parameters"),
        steps=len(rows),
        seconds=done.get("seconds"),
        loss=rows[-1]["loss"] if rows else None,
        scores={name: score["value"] for name, score in scores.items()},
        errors={name: score["stderr"] for name, score in scores.items()},
        curve=[(r["step"], r["loss"]) for r in rows],
    )


def report_table(found: Sequence[Summary]) -> Table:
    """Make a table with one row per figure and one column per run."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("", no_wrap=True)
    best = _best(found)
    for run in found:
        table.add_column(cell(run.name), justify="right", overflow="fold")
    rows: list[tuple[str, list[str]]] = [
        ("state", [r.state for r in found]),
        ("parameters", ["-" if r.parameters is None else f"{r.parameters:,}" for r in found]),
        ("steps", [f"{r.steps:,}" for r in found]),
        ("minutes", ["-" if r.seconds is None else f"{r.seconds / 60:.1f}" for r in found]),
        ("last loss", ["-" if r.loss is None else f"{r.loss:.3f}" for r in found]),
    ]
    for what, cells in rows:
        table.add_row(what, *cells)
    table.add_section()
    for name in _score_names(found):
        table.add_row(cell(name), *[_cell(run, name, best) for run in found])
    return table


def draw(found: Sequence[Summary], path: Path) -> None:
    """Draw the loss curves, and the scores as bars with their standard errors."""
    import matplotlib
    import matplotlib.ticker

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    names = _score_names(found)[:SHOWN]
    colors = plt.get_cmap("tab10").colors + plt.get_cmap("Dark2").colors  # type: ignore[attr-defined]
    figure, axes = plt.subplots(
        1, 2 if names else 1, figsize=(13 if names else 7, 4.5), squeeze=False, layout="constrained"
    )
    for run, color in zip(found, _cycled(colors, len(found)), strict=True):
        if run.curve:
            steps, values = smoothed(run.curve)
            axes[0][0].plot(steps, values, label=label(run.name), color=color, linewidth=1.5)
    axes[0][0].set(xlabel="step", ylabel="loss", title="Loss")
    if any(run.curve for run in found):
        axes[0][0].set_yscale("log")
        for which in (axes[0][0].yaxis.set_major_formatter, axes[0][0].yaxis.set_minor_formatter):
            which(matplotlib.ticker.FuncFormatter(lambda value, _: f"{value:g}"))
        axes[0][0].legend(fontsize=8, frameon=False)
    if names:
        scored = [(run, color) for run, color in zip(found, _cycled(colors, len(found)), strict=True) if run.scores]
        _bars(axes[0][1], scored, names)
    for axis in axes[0]:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", alpha=0.3, linewidth=0.5)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def smoothed(curve: Sequence[tuple[int, float]]) -> tuple[np.ndarray, np.ndarray]:
    """Average a curve over neighbours; at its ends over fewer."""
    steps, values = (np.array(column, dtype=float) for column in zip(*curve, strict=True))
    width = max(1, round(len(values) * SMOOTH))
    kernel = np.ones(width)
    return steps, np.convolve(values, kernel, "same") / np.convolve(np.ones_like(values), kernel, "same")


def _bars(axis: Any, found: Sequence[tuple[Summary, Any]], names: Sequence[str]) -> None:
    width = 0.8 / len(found)
    for i, (run, color) in enumerate(found):
        have = [(at, n) for at, n in enumerate(names) if n in run.scores]
        where = [at - 0.4 + width * (i + 0.5) for at, _ in have]
        heights, errors = [100 * run.scores[n] for _, n in have], [100 * run.errors[n] for _, n in have]
        axis.bar(where, heights, width, yerr=errors, color=color, label=label(run.name), error_kw={"linewidth": 0.8})
    data = {n.partition("/")[0] for n in names}
    labels = [n.partition("/")[2] if len(data) == 1 else n for n in names]
    axis.set_xticks(
        range(len(names)), [label(name).replace("/", "\n") for name in labels], fontsize=7, rotation=40, ha="right"
    )
    axis.set(ylim=(0, 105), ylabel="per cent", title="Scores" + (f" on {label(data.pop())}" if len(data) == 1 else ""))


def _score_names(found: Sequence[Summary]) -> list[str]:
    """Return the names of all scores, those that most runs have first."""
    count: dict[str, int] = {}
    for run in found:
        for name in run.scores:
            count[name] = count.get(name, 0) + 1
    return sorted(count, key=lambda name: -count[name])


def _best(found: Sequence[Summary]) -> dict[str, float]:
    """Return the largest value of each score; nothing for a single run."""
    names = _score_names(found) if len(found) > 1 else []
    return {n: max(r.scores[n] for r in found if n in r.scores) for n in names}


def _cell(run: Summary, name: str, best: dict[str, float]) -> str:
    if name not in run.scores:
        return "-"
    text = f"{100 * run.scores[name]:.1f} ± {100 * run.errors[name]:.1f}"
    return f"[bold]{text}[/bold]" if run.scores[name] == best.get(name) else text


def _cycled(colors: Sequence[Any], count: int) -> list[Any]:
    return [colors[i % len(colors)] for i in range(count)]


def _json(path: Path) -> Any:
    return read_json(path, INDEX) if path.is_file() else None
