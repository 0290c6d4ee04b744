"""`zoo report runs/...`: compare runs in a table, a picture and a page, a row for each run.

A run is named by its options that differ from those of another; figures that are equal in all are stated once, above
the table. Runs that are under way, failed or were stopped are in it with the figures that they have.
"""

import csv
import io
import math
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zoo.inspection.run_summary import Summary, Value, summaries, written
from zoo.registry import ZooError, unknown
from zoo.storage.atomic import write_text, writing
from zoo.text.command_line import Parser
from zoo.text.markup import cell, printable
from zoo.text.sizes import count_text
from zoo.text.terminal import Answer, console, is_json, say, width

if TYPE_CHECKING:
    from rich.table import Table

OPTIONS = ("out", "full", "small")
LABEL = 34  # columns of a run's name, at most
GAP = 2  # columns between two of a table
EXAMPLES = """zoo report                       every run below runs/
zoo report runs/sweeps/2026-11-30/1
zoo report a b out=both.png      two runs; also both.html
zoo report runs --csv > runs.csv
zoo report full=a small=b c d"""
MORE = (
    "full=<folder> and small=<folder> compare evaluations of pruners where a smaller image answers right, and where it "
    "does not.\n\n"
    "States: done; running; failed, with the error below the table; stopped: killed, or ended before its last step; "
    "waiting: without a step; scored: by zoo eval."
)
LESS_IS_BETTER = ("unparsed",)
NO_MEANS = ("f1", "bleu")  # the mean over kinds is not the score of all answers


def main(words: Sequence[str]) -> Answer:
    """Print the table; write the picture and the page."""
    parser = Parser(
        "report",
        "Compare runs: a row for each, named by what was changed; curves in a picture and a page.",
        EXAMPLES,
        json=True,
        usage="[folder ...] [out=FILE] [flags]",
        more=MORE,
    )
    parser.add_argument("folder", nargs="*", help="runs, folders of runs, folders of zoo eval; without any: runs")
    parser.add_argument("--csv", action="store_true", help="print a line for each run, with every figure")
    args = parser.read(words)
    options = dict(word.split("=", 1) for word in args.folder if "=" in word)
    for key in options:
        if key not in OPTIONS:
            raise unknown("option of zoo report", key, OPTIONS)
    folders = [Path(word) for word in args.folder if "=" not in word]
    if options.keys() & {"full", "small"}:
        from zoo.inspection import filtered

        return Answer({"figures": filtered.show(options, folders)})
    folders = folders or [Path("runs")]
    found = summaries(folders)
    if args.csv:
        print(as_csv(found), end="")
    elif not is_json():
        for table in report_tables(found):
            console().print(table)
        _remarks(found)
    if options.get("out") or not (args.csv or is_json()):
        _write(
            found, Path(options.get("out") or (folders[0] if folders[0].is_dir() else Path()) / "report.png"), args.csv
        )
    return Answer({"equal": equal_of(found), "runs": [run.as_json() for run in found]})


def _write(found: Sequence[Summary], out: Path, quiet: bool) -> None:
    """Write the picture, and the page beside it."""
    from zoo.inspection.report_page import page
    from zoo.inspection.report_picture import draw

    picture, web = (out.with_suffix(suffix) if out.suffix in (".png", ".html") else out for suffix in (".png", ".html"))
    if picture == web:
        raise ZooError(f"out={str(out)!r}: the picture is a .png, the page beside it a .html.")
    with writing(f"the picture {str(picture)!r}", "Choose another place with out=<file>."):
        draw(found, picture)
        write_text(web, page(found, figures(found), _stated(found)))
    if not quiet:
        say(f"picture  {_near(picture)}\npage     {_near(web)}", None)


def _remarks(found: Sequence[Summary]) -> None:
    """Print why runs failed, and how unfinished ones go on."""
    for number, run in enumerate(found, 1):
        if run.state == "failed":
            say(f"{number} failed: {printable(run.error)}", subsequent="  ")
        if run.state in ("failed", "stopped"):
            say(f"  to go on: zoo train resume={shlex.quote(_near(run.path))}", None)
    say()


def _near(path: Path) -> str:
    here = Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)


# ---- figures -----------------------------------------------------------------------------------------------------

Figure = tuple[str, str, Callable[[Summary], Any], Callable[[Any], str]]  # name, heading, value, as people read it
FIGURES: tuple[Figure, ...] = (
    ("state", "state", lambda r: r.state, str),
    ("steps", "steps", lambda r: (r.steps, r.planned), lambda v: _progress(*v)),
    ("parameters", "params", lambda r: r.parameters, count_text),
    ("image_tokens", "tokens", lambda r: r.image_tokens, lambda v: f"{v:,}"),
    ("ms_per_sample", "ms/sample", lambda r: r.ms_per_sample, lambda v: f"{v:.3g}"),
    ("seconds", "minutes", lambda r: r.seconds, lambda v: f"{v / 60:.1f}"),
    ("loss", "loss", lambda r: r.loss, lambda v: f"{v:.3f}"),
)
STATED = {"state": "{}", "steps": "{} steps", "parameters": "{} parameters", "image_tokens": "{} image tokens"}


def _progress(steps: int, planned: int | None) -> str:
    return f"{steps:,}" if planned in (None, steps) else f"{steps:,}/{planned:,}"


def equal_of(found: Sequence[Summary]) -> dict[str, Any]:
    """Return the options and figures that all runs share, of those that a report states."""
    options = ("model", "pruner", "adapter", "data", "seed")
    first = found[0].options
    same: dict[str, Any] = {
        key: first[key]
        for key in options
        if first.get(key) not in (None, "") and all(r.options.get(key) == first[key] for r in found)
    }
    for name in STATED:
        values = [getattr(run, name) for run in found]
        whole = name != "steps" or all(run.planned in (None, run.steps) for run in found)
        if values[0] is not None and whole and all(v == values[0] for v in values):
            same[name] = values[0]
    return same


def figures(found: Sequence[Summary]) -> list[tuple[str, list[str], list[bool]]]:
    """Return the columns of a report: heading, a cell for each run, and which of them are best."""
    same = equal_of(found) if len(found) > 1 else {}
    columns = []
    for name, heading, value, text in FIGURES:
        values = [value(run) for run in found]
        if name not in same and any(v not in (None, (0, None)) for v in values):
            columns.append((heading, ["-" if v is None else text(v) for v in values], [False] * len(found)))
    for name, heading in _headings(found).items():
        scores = [run.scores.get(name) or pooled(run, name) for run in found]
        better = min if _metric(name) in LESS_IS_BETTER else max
        best = better((s["value"] for s in scores if s), default=0.0) if len(found) > 1 else math.inf
        cells = [f"{100 * s['value']:.1f}±{100 * s['stderr']:.1f}" if s else "-" for s in scores]
        columns.append((heading, cells, [s is not None and s["value"] == best for s in scores]))
    return columns


def _headings(found: Sequence[Summary]) -> dict[str, str]:
    """Return the scores and their headings, without the words that all of them have; `all` first, of several kinds."""
    names = [tuple(name.split("/")) for name in dict.fromkeys(n for run in found for n in run.scores)]
    groups = dict.fromkeys((n[0], n[-1]) for n in names)
    groups = {g: None for g in groups if _metric(g[1]) not in NO_MEANS}
    several = [g for g in groups if sum((n[0], n[-1]) == g and not n[1].endswith("_held_out") for n in names) > 1]
    every = [*((data, "all", metric) for data, metric in several), *names]
    varied = [len({n[i] for n in names}) > 1 for i in (0, -1)]
    return {
        "/".join(n): "\n".join(
            word for word, shown in ((n[0], varied[0]), ("/".join(n[1:-1]), True), (n[-1], varied[1])) if shown
        )
        for n in every
    }


def _metric(name: str) -> str:
    """The metric of a score, without the task that gives it."""
    return name.rpartition("/")[2].rpartition(".")[2]


def pooled(run: Summary, name: str) -> Value | None:
    """Return the mean over the answers of all kinds of question, for a name such as `scenes/all/accuracy`."""
    data, kind, metric = name.split("/")[0], name.split("/")[1], name.split("/")[-1]
    if kind != "all":
        return None
    some = [
        score
        for key, score in run.scores.items()
        if key.split("/")[0] == data and key.split("/")[-1] == metric and not key.split("/")[1].endswith("_held_out")
    ]
    n = sum(score["n"] for score in some)
    if not n:
        return None
    value = sum(score["value"] * score["n"] for score in some) / n
    return {"value": value, "stderr": math.sqrt(sum((s["stderr"] * s["n"]) ** 2 for s in some)) / n, "n": n}


# ---- tables ------------------------------------------------------------------------------------------------------


def report_tables(found: Sequence[Summary]) -> list["Table"]:
    """Make the tables: a row for each run, its columns in as many tables as the width needs."""
    labels = [printable(run.label) for run in found]
    wide = min(LABEL, max(map(len, ["run", *labels])))
    numbers = len(str(len(found))) if len(found) > 1 else 0
    room = width() - wide - numbers - 2 * GAP - 1
    blocks: list[list[Any]] = [[]]
    used = 0
    for column in figures(found):
        size = GAP + max(len(line) for text in (column[0], *column[1]) for line in text.split("\n"))
        if used + size > room and blocks[-1]:
            blocks.append([])
            used = 0
        blocks[-1].append(column)
        used += size
    tables = [_table(labels, block, wide, number=bool(numbers)) for block in blocks]
    if stated := _stated(found):
        tables[0].title, tables[0].title_justify = cell(stated), "left"
    scored = dict.fromkeys((n.split("/")[0], n.split("/")[-1]) for run in found for n in run.scores)
    if scored:
        what = "; ".join(f"{metric} on {data}" for data, metric in scored)
        tables[-1].caption = cell(f"{what}: per cent ± standard error; all: over the answers of all kinds")
        tables[-1].caption_justify = "left"
    return tables


def _table(labels: Sequence[str], columns: Sequence[Any], wide: int, number: bool) -> "Table":
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), title_style="", caption_style="dim")
    if number:
        table.add_column("", justify="right", style="dim", no_wrap=True)
    table.add_column("run", min_width=wide, max_width=wide, overflow="fold")
    for heading, _, _ in columns:
        table.add_column(cell_of_lines(heading), justify="right", no_wrap=True)
    for at, name in enumerate(labels):
        cells = [f"[bold]{cells[at]}[/bold]" if best[at] else cells[at] for _, cells, best in columns]
        table.add_row(*([str(at + 1)] if number else []), cell(name), *cells)
    return table


def cell_of_lines(text: str) -> Any:
    """Return a heading of several lines, without markup."""
    from rich.text import Text

    return Text("\n".join(printable(line) for line in text.split("\n")))


def _stated(found: Sequence[Summary]) -> str:
    if len(found) < 2:
        return ""
    texts = {name: text for name, _, _, text in FIGURES} | {"steps": lambda v: f"{v:,}"}
    words = [
        STATED[key].format(texts[key](value)) if key in STATED else f"{key} {written(value)}"
        for key, value in equal_of(found).items()
        if key not in ("state",) or value != "done"
    ]
    return f"equal in all: {', '.join(words)}" if words else ""


def as_csv(found: Sequence[Summary]) -> str:
    """Return a line for each run: changed options, figures, and value, standard error and count of each score."""
    changed = list(dict.fromkeys(key for run in found for key in run.changed))
    names = list(dict.fromkeys(name for run in found for name in run.scores))
    plain = ("state", "error", "parameters", "image_tokens", "steps", "planned", "seconds", "ms_per_sample", "loss")
    parts = ("value", "stderr", "n")
    file = io.StringIO()
    out = csv.writer(file, lineterminator="\n")
    out.writerow(["run", "path", *changed, *plain, *(f"{name} {part}" for name in names for part in parts)])
    for run in found:
        scores = [run.scores.get(name, {}).get(part, "") for name in names for part in parts]
        options = [written(run.changed[key]) if key in run.changed else "" for key in changed]
        out.writerow([run.name, run.path, *options, *(getattr(run, key) for key in plain), *scores])
    return file.getvalue()
