"""The picture of a report: loss curves, and scores as bars with their standard errors."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from zoo.inspection.run_summary import Summary
from zoo.text.markup import label

SHOWN = 12  # groups of bars
SMOOTH = 0.02  # share of a run's steps that its loss curve is averaged over


def draw(found: Sequence[Summary], path: Path) -> None:
    """Draw the loss curves, and the scores as bars with their standard errors."""
    import matplotlib
    import matplotlib.ticker

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    names = score_names(found)[:SHOWN]
    colors = plt.get_cmap("tab10").colors + plt.get_cmap("Dark2").colors  # type: ignore[attr-defined]
    figure, axes = plt.subplots(
        1, 2 if names else 1, figsize=(13 if names else 7, 4.5), squeeze=False, layout="constrained"
    )
    for run, color in zip(found, _cycled(colors, len(found)), strict=True):
        if run.curve:
            steps, values = smoothed(run.curve)
            axes[0][0].plot(steps, values, label=label(run.label), color=color, linewidth=1.5)
    axes[0][0].set(xlabel="step", ylabel="loss", title="Loss")
    if any(run.curve for run in found):
        axes[0][0].set_yscale("log")
        axis = axes[0][0].yaxis
        axis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 5), numticks=20))
        axis.set_major_formatter(matplotlib.ticker.FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_formatter(matplotlib.ticker.NullFormatter())
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
        heights, errors = (
            [100 * run.scores[n]["value"] for _, n in have],
            [100 * run.scores[n]["stderr"] for _, n in have],
        )
        axis.bar(where, heights, width, yerr=errors, color=color, label=label(run.label), error_kw={"linewidth": 0.8})
    data = {n.partition("/")[0] for n in names}
    labels = [n.partition("/")[2] if len(data) == 1 else n for n in names]
    axis.set_xticks(
        range(len(names)), [label(name).replace("/", "\n") for name in labels], fontsize=7, rotation=40, ha="right"
    )
    axis.set(ylim=(0, 105), ylabel="per cent", title="Scores" + (f" on {label(data.pop())}" if len(data) == 1 else ""))


def score_names(found: Sequence[Summary]) -> list[str]:
    """Return the names of all scores, those that most runs have first."""
    count: dict[str, int] = {}
    for run in found:
        for name in run.scores:
            count[name] = count.get(name, 0) + 1
    return sorted(count, key=lambda name: -count[name])


def _cycled(colors: Sequence[Any], count: int) -> list[Any]:
    return [colors[i % len(colors)] for i in range(count)]
