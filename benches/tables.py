"""Tables of a bench that fit a screen."""

import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from zoo.text.markup import in_cell, printable

WIDTH = 100  # columns of a screen


@dataclass
class Table:
    """A table of texts whose first column names its rows."""

    title: str
    head: list[str]
    rows: list[list[str]] = field(default_factory=list)

    def add(self, *cells: str) -> None:
        self.rows.append([printable(cell) for cell in cells])

    def lines(self) -> list[str]:
        """Write it for a screen: in several parts below each other where it is wider than `WIDTH`."""
        heads = [_broken(head) for head in self.head]
        sizes = [max(map(len, [*heads[i], *(row[i] for row in self.rows)])) for i in range(len(self.head))]
        parts: list[list[int]] = []
        used = WIDTH
        for i in range(1, len(self.head)):
            if used + 2 + sizes[i] > WIDTH or not parts:
                parts.append([])
                used = sizes[0]
            parts[-1].append(i)
            used += 2 + sizes[i]
        found: list[str] = []
        for part in parts:
            depth = max(len(heads[i]) for i in [0, *part])
            rows = [[_line(h, at, depth) for h in heads] for at in range(depth)]
            for row in [*rows, ["-" * size for size in sizes], *self.rows]:
                cells = [row[0].ljust(sizes[0]), *(row[i].rjust(sizes[i]) for i in part)]
                found.append("  ".join(cells).rstrip())
            found.append("")
        return found[:-1]

    def markdown(self) -> list[str]:
        lines = [f"| {' | '.join(map(in_cell, self.head))} |", "|" + "---|" * len(self.head)]
        return lines + [f"| {' | '.join(map(in_cell, row))} |" for row in self.rows]


def _line(head: Sequence[str], at: int, depth: int) -> str:
    """A line of a head that is set at the bottom."""
    index = at - (depth - len(head))
    return head[index] if index >= 0 else ""


def _broken(head: str) -> list[str]:
    """A head in lines of a word each, where a word is short the next joins it."""
    lines: list[str] = []
    for word in head.split():
        if lines and len(lines[-1]) + len(word) < 8:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines or [""]


def wrapped(lines: Iterable[str]) -> list[str]:
    """Break lines that are wider than a screen."""
    return [part for line in lines for part in textwrap.wrap(printable(line), WIDTH, subsequent_indent="    ")]


def giga(flops: int | None) -> str:
    """Write FLOPs in GFLOP; nothing for None."""
    return "" if flops is None else f"{flops / 1e9:.2f}" if flops >= 1e8 else f"{flops / 1e9:.4f}"
