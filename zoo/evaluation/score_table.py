"""The printed table of scores: per cent with standard errors, beside the baselines without images."""

from collections.abc import Sequence

from rich import box
from rich.table import Table

from zoo.evaluation.result import Line, metrics_of
from zoo.registry import Score
from zoo.text.markup import cell
from zoo.text.terminal import wrapped


def score_table(lines: Sequence[Line], title: str = "") -> Table:
    """Make the table of an evaluation; held-out combinations come last, below a rule."""
    table = Table(title=cell(title) if title else None, box=box.SIMPLE_HEAD, title_justify="left", pad_edge=False)
    with_blind, with_majority = (any(getattr(x, w) for x in lines) for w in ("blind", "majority"))
    for name in ("data", "kind", "metric"):
        table.add_column(name)
    for name in ("score", "± s.e.", "n", *["majority"] * with_majority, *["blind"] * with_blind):
        table.add_column(name, justify="right")
    metrics = metrics_of([(line.data, line.group, line.task, line.metric) for line in lines])
    named = {id(line): metric for line, metric in zip(lines, metrics, strict=True)}
    for held_out in (False, True):
        some = [line for line in lines if line.held_out == held_out]
        if held_out and some and len(some) < len(lines):
            table.add_section()
            table.add_row("[dim]never seen[/dim]")
            table.caption, table.caption_justify = "never seen: combinations that training does not show", "left"
        last = ""
        for line in some:
            names = [cell(name) for name in (line.data if line.data != last else "", line.kind, named[id(line)])]
            row = [per_cent(line.score), f"{100 * line.score.stderr:.1f}", str(line.score.n)]
            row += [per_cent(line.majority)] * with_majority + [per_cent(line.blind)] * with_blind
            table.add_row(*names, *row)
            last = line.data
    return table


def in_words(lines: Sequence[Line], step: int) -> str:
    """Write the first score of each kind in a few lines, for the progress of a run."""
    groups: dict[str, dict[str, str]] = {}
    for line in lines:
        name = f"{line.data}, never seen" if line.held_out else line.data
        groups.setdefault(name, {}).setdefault(line.kind, f"{line.kind} {100 * line.score.value:.0f}")
    texts = (f"{name}: {', '.join(scores.values())}" for name, scores in groups.items())
    return "\n".join(wrapped(text, subsequent="  ") for text in (f"scores at step {step}, in per cent", *texts))


def per_cent(score: Score | None) -> str:
    """Write a score in per cent, and None as a dash."""
    return "-" if score is None else f"{100 * score.value:.1f}"
