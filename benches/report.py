"""Rows of a bench, and the three forms in which they are given: a table, JSON, Markdown."""

import json
import platform
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from zoo.benches.measure import Value
from zoo.text.markup import cell, in_cell

_TIMES = {" s": 1.0, " ms": 1e3, " µs": 1e6}  # unit -> how many of it are a second


@dataclass
class Row:
    """One number, and what it should be.

    Attributes:
        what: in words.
        value: median over rounds, with quartiles.
        unit: behind the number.
        bound: what must be reached; None where nothing is asked.
        at_most: whether the bound is from above.
        note: what else belongs to the number.
    """

    what: str
    value: Value
    unit: str = "x"
    bound: float | None = None
    at_most: bool = False
    note: str = ""

    @property
    def reached(self) -> bool | None:
        if self.bound is None:
            return None
        return self.value.median <= self.bound if self.at_most else self.value.median >= self.bound

    @property
    def verdict(self) -> str:
        """Say plainly whether the bound is reached."""
        if self.bound is None:
            return ""
        word = "reached" if self.reached else "MISSED"
        factor, unit = self.scale
        bound = f"{'<= ' if self.at_most else ''}{short(self.bound * factor)}{unit}"
        return f"bound {bound}: {word} {short(self.value.median * factor)}{unit}"

    @property
    def scale(self) -> tuple[float, str]:
        """What numbers of the row are multiplied by for people, and their unit then: 23.6 µs rather than 2.36e-05 s."""
        units = list(_TIMES)
        if self.unit not in units:
            return 1.0, self.unit
        value, place = abs(self.value.median), units.index(self.unit)
        while 0 < value < 1 and place + 1 < len(units):
            value, place = value * 1000, place + 1
        return _TIMES[units[place]] / _TIMES[self.unit], units[place]


@dataclass
class Report:
    """What a bench found out.

    Attributes:
        title: of the bench.
        setting: what was measured, in lines for people.
        rows: the numbers.
        machine: what it ran on.
        command: that was typed.
        columns: what the middle of a value is, and its ends.
    """

    title: str
    setting: list[str] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    machine: dict[str, Any] = field(default_factory=dict)
    command: str = ""
    columns: tuple[str, str] = ("median", "quartiles")

    def add(self, *rows: Row) -> None:
        self.rows += rows

    def print(self) -> None:
        from rich import box
        from rich.console import Console
        from rich.table import Table

        table = Table(title=cell(self.title), box=box.SIMPLE_HEAD, title_justify="left", pad_edge=False)
        for name, side in (("what", "left"), *((c, "right") for c in self.columns), ("", "left")):
            table.add_column(name, justify=side)  # type: ignore[arg-type]
        for row in self.rows:
            last = cell(row.verdict or row.note)
            last.stylize({True: "green", False: "red", None: "dim"}[row.reached])
            table.add_row(*map(cell, _cells(row)[:3]), last)
        console = Console()
        console.print(table)
        for line in [*self.setting, *(f"{k}: {v}" for k, v in self.machine.items())]:
            console.print(line, style="dim", markup=False, highlight=False)

    def write_json(self, path: Path) -> None:
        rows = [asdict(row) | {"reached": row.reached} for row in self.rows]
        whole = {
            "bench": self.title,
            "command": self.command,
            "setting": self.setting,
            "machine": self.machine,
            "rows": rows,
        }
        path.write_text(json.dumps(whole, indent=1) + "\n")

    def write_markdown(self, path: Path) -> None:
        path.write_text(self.markdown())

    def markdown(self) -> str:
        """Return the rows as a Markdown table, with command and machine above it."""
        lines = [f"## {self.title}", "", f"    {self.command}", "", *(f"- {line}" for line in self.setting)]
        lines += [f"- {key}: {value}" for key, value in self.machine.items()]
        lines += ["", f"| what | {' | '.join(self.columns)} | bound | note |", "|---|---|---|---|---|"]
        for row in self.rows:
            what, median, quartiles, note = _cells(row)
            cells = (in_cell(text) for text in (what, median, quartiles, row.verdict, note))
            lines.append(f"| {' | '.join(cells)} |")
        return "\n".join(lines) + "\n"


def _cells(row: Row) -> list[str]:
    factor, unit = row.scale
    low, high = short(row.value.low * factor), short(row.value.high * factor)
    return [row.what, short(row.value.median * factor) + unit, f"{low} to {high}" if low != high else "", row.note]


def short(number: float) -> str:
    """Write a number with the digits that mean something."""
    if number and abs(number) < 1e-3:
        return f"{number:.1e}"
    return f"{number:.0f}" if abs(number) >= 100 else f"{number:.1f}" if abs(number) >= 20 else f"{number:.3g}"


def machine(device: Any, threads: int) -> dict[str, Any]:
    """Say in words what the numbers were measured on; no names, no paths."""
    import os

    import torch
    import transformers

    if device.type == "cuda":
        kind = torch.cuda.get_device_name(device)
    else:
        kind = f"{_cpu_name()}, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}"
        kind += " with bf16" if torch.cpu._is_avx512_bf16_supported() else ""
    load = f"{os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "not known"
    versions = f"Python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}"
    return {"machine": f"{kind}; {threads} thread(s) used; load of others and ours {load}", "versions": versions}


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
