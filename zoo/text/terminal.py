"""What commands print: tables and texts as wide as the terminal, or one JSON object with `--json`.

A command prints through `console` and `say`, and returns its figures as an `Answer` (or an object with `as_json`).
With `--json` both print nothing, and `zoo.cli.entry` writes the returned figures as the only text on stdout:

    {"command": "list", "version": "0.1.0", "status": 0, ...}        and with "error" (and "fixes") where it failed

Keys are in snake_case and name their unit where they have one (`seconds`, `bytes`, `parameters`); a score is
`{"value": 0.9, "n": 100, "stderr": 0.03}` with the value as a share; what is not known is null.
"""

import json
import math
import os
import shutil
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from contextvars import ContextVar
from dataclasses import asdict, dataclass, field, is_dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

NARROW = 30  # columns that a wrapped text needs at least
WIDTH = 80  # columns where there is no terminal and COLUMNS is not set
_as_json: ContextVar[bool] = ContextVar("as_json", default=False)


@dataclass
class Answer:
    """What a command found: its figures for `--json`, and the exit status."""

    data: dict[str, Any] = field(default_factory=dict)
    status: int = 0

    def as_json(self) -> dict[str, Any]:
        """Return the figures."""
        return self.data


def width() -> int:
    """Return the columns of the terminal: COLUMNS where it is set, 80 in a pipe."""
    return max(20, shutil.get_terminal_size((WIDTH, 24)).columns)


def console(stderr: bool = False) -> "Console":
    """Return a console of rich: without colours in a pipe and with NO_COLOR; silent on stdout with `--json`."""
    from rich.console import Console

    plain: Any = {"color_system": None} if os.environ.get("NO_COLOR") else {}
    file = sys.stderr if stderr else sys.stdout
    return Console(file=file, width=width(), highlight=False, quiet=_as_json.get() and not stderr, **plain)


def say(text: object = "", subsequent: str | None = "") -> None:
    """Print lines on stdout, each wrapped to the terminal; nothing with `--json`.

    Args:
        text: with line breaks, which stay.
        subsequent: begins the further lines of a wrapped one; None: lines are printed as they are, such as those of a
            file.
    """
    if not _as_json.get():
        lines = str(text).split("\n")
        print("\n".join(lines if subsequent is None else [wrapped(line, subsequent=subsequent) for line in lines]))


def wrapped(text: str, first: str = "", subsequent: str = "", most: int | None = None) -> str:
    """Wrap a line to the terminal. Words are never broken, so that a path or an override can be copied."""
    options: dict[str, Any] = {"break_long_words": False, "break_on_hyphens": False, "drop_whitespace": True}
    indent = first + text[: len(text) - len(text.lstrip())]
    return textwrap.fill(
        text.lstrip(), most or width(), initial_indent=indent, subsequent_indent=subsequent or indent, **options
    )


def columns(rows: Sequence[Sequence[str]], indent: int = 2, widest: int = 24, right: Sequence[int] = ()) -> str:
    """Return rows in columns, the last one wrapped to the terminal beside the others.

    Args:
        rows: cells, as many in each row.
        indent: spaces before each line.
        widest: cells with more characters do not widen their column.
        right: columns that are aligned to the right.
    """
    if not rows:
        return ""
    fixed = range(len(rows[0]) - 1)
    sizes = [max((len(r[i]) for r in rows if len(r[i]) <= widest), default=0) for i in fixed]
    edge = indent + sum(size + 2 for size in sizes)  # where the last column begins
    lines = []
    for row in rows:
        cells = [f"{c:>{s}}" if i in right else f"{c:<{s}}" for i, (c, s) in enumerate(zip(row, sizes, strict=False))]
        head = " " * indent + "".join(f"{c}  " for c in cells)
        if len(head + row[-1]) <= width():
            lines.append((head + row[-1]).rstrip())
        elif len(head) <= edge <= width() - NARROW:
            lines.append(wrapped(row[-1], head, " " * edge))
        else:  # below the others
            below = " " * (edge if edge <= width() - NARROW else indent + 4)
            lines += [head.rstrip(), wrapped(row[-1], below, below)]
    return "\n".join(lines)


@contextmanager
def only_json() -> Iterator[None]:
    """Keep stdout free for the one JSON object: what libraries print there goes to stderr."""
    token = _as_json.set(True)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        _as_json.reset(token)


def is_json() -> bool:
    """Return whether the command answers with JSON."""
    return _as_json.get()


def write_answer(command: str, status: int, figures: Mapping[str, Any]) -> None:
    """Write the JSON object of a command to stdout."""
    import zoo

    head = {"command": command, "version": zoo.__version__, "status": status}
    print(json.dumps(plain({**head, **figures}), indent=2, allow_nan=False))


def plain(value: Any) -> Any:
    """Return a value as JSON has them: sets in order, NaN and infinity as null, what JSON has no form for as text."""
    if is_dataclass(value) and not isinstance(value, type):
        return plain(asdict(value))
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, set | frozenset):
        return [plain(item) for item in sorted(value)]
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if value is None or isinstance(value, str | bool | int | float):
        return value
    return value.item() if hasattr(value, "item") else str(value)  # a number of numpy or torch
