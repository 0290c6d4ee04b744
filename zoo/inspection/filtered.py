"""What pruners answer where a smaller image would do, and where it would not: `zoo report full=... small=... runs/...`.

zoo report full=runs/plain small=runs/downsample runs/fastervlm runs/random
zoo report full=runs/plain small=runs/downsample runs/fastervlm out=filtered.json

Each is a folder of `zoo eval` on the same data. Of the answers that are right at full size, those that are wrong when
the image is made smaller need small marks or many tokens; the others do not. An answer is right where the first of its
scores is at least a half. On the two groups the smaller image has 0 and 100 per cent by construction, so no method is
compared with it there.

Paper: Liao et al., arXiv:2510.07143 (VTC-Bench); which group its own files call A and B is not consistent.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from rich import box
from rich.table import Table

from zoo.evaluation.compared import RIGHT, Key, answers_of, require_same
from zoo.registry import Score, ZooError
from zoo.storage.atomic import write_json
from zoo.tasks.estimates import mean
from zoo.text.markup import cell
from zoo.text.terminal import console

ALL = "all"
GROUPS = {
    "needs": "right at full size only",
    "easy": "right at both",
}


@dataclass
class Figure:
    """Of one run on one kind of question: shares of right answers."""

    run: str
    data: str
    kind: str
    all: Score
    needs: Score | None = None  # None for the two runs that make the groups
    easy: Score | None = None


def filtered(full: Path, small: Path, others: Sequence[Path]) -> list[Figure]:
    """Compare runs on all answers, and on the two groups that a smaller image makes of those right at full size.

    Args:
        full: folder of an evaluation without a pruner.
        small: the same with `downsample`.
        others: the same with pruners.

    Raises:
        ZooError: a folder has no predictions, or they are of other questions.
    """
    right = {folder: rights(folder) for folder in (full, small, *others)}
    require_same([str(folder) for folder in right], list(right.values()))
    kinds = list(dict.fromkeys((data, kind) for data, _, kind, *_ in right[full]))
    several = [data for data, count in Counter(data for data, _ in kinds).items() if count > 1]
    names = _names(list(right))
    figures = []
    for data, kind in [*kinds, *((data, ALL) for data in several)]:
        keys = [k for k in right[full] if k[0] == data and kind in (k[2], ALL)]
        kept = {
            "needs": [k for k in keys if right[full][k] and not right[small][k]],
            "easy": [k for k in keys if right[full][k] and right[small][k]],
        }
        for folder, found in right.items():
            of = {} if folder in (full, small) else {group: _share(found, some) for group, some in kept.items()}
            figures.append(Figure(names[folder], data, kind, _share(found, keys), **of))
    return figures


def rights(folder: Path) -> dict[Key, bool]:
    """Return which answers of an evaluation are right, by question.

    Raises:
        ZooError: there are no predictions, or a line is not one.
    """
    first = {key: next(iter(row["scores"].values())) for key, row in answers_of(folder).items()}
    return {key: float(score) >= RIGHT for key, score in first.items()}


def _share(right: Mapping[Key, bool], keys: Sequence[Key]) -> Score:
    return mean(np.array([right[key] for key in keys], dtype=float))


def _names(folders: Sequence[Path]) -> dict[Path, str]:
    """Name folders by their last part, or by all of it where two are alike."""
    last = Counter(folder.name for folder in folders)
    return {folder: folder.name if last[folder.name] == 1 else str(folder) for folder in folders}


def table_of(figures: Sequence[Figure]) -> Table:
    """Make a table with one row for each run and kind of question, shares in per cent."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, caption="per cent right ± s.e. (n)", caption_justify="left")
    for name in ("data", "kind", "run"):
        table.add_column(name)
    for name in (ALL, *GROUPS.values()):
        table.add_column(name, justify="right", no_wrap=True)
    last: tuple[str, str] | None = None
    for figure in figures:
        here = (figure.data, figure.kind)
        if last not in (None, here):
            table.add_section()
        scores = (_cell(s) for s in (figure.all, figure.needs, figure.easy))
        table.add_row(*(cell(x) if here != last else "" for x in here), cell(figure.run), *scores)
        last = here
    return table


def _cell(score: Score | None) -> str:
    if score is None or not score.n:
        return "-" if score is None else "(0)"
    return f"{100 * score.value:.1f} ± {100 * score.stderr:.1f} ({score.n})"


def show(options: Mapping[str, str], folders: Sequence[Path]) -> list[Figure]:
    """Print the table, write it as JSON where `out` names a file, and return the figures.

    Raises:
        ZooError: `full` or `small` is missing, or no run is left to compare.
    """
    if lacking := [name for name in ("full", "small") if name not in options]:
        raise ZooError(
            f"{lacking[0]}=<folder> is missing: full= is an evaluation without pruner, small= with downsample."
        )
    figures = filtered(Path(options["full"]), Path(options["small"]), folders)
    console().print(table_of(figures))
    if out := options.get("out"):
        write_json(Path(out), [asdict(figure) for figure in figures])
    return figures
