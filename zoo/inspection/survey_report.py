"""`zoo data`: survey data sets before a run, as the run's model would read them.

    zoo data data=[chat_json] data.chat_json.file=train.json data.chat_json.images=images/ model=llava15_7b workers=8

Prints a table, and writes all figures as JSON with `survey.json=FILE`. The exit status is 1 if a record is broken.
"""

import os
import re
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import DictConfig
from rich import box
from rich.console import Console
from rich.table import Table

from zoo.inspection.survey import Look, Tally, survey
from zoo.loading.build import processor_alone
from zoo.registry import ZooError
from zoo.runs.data import RunData
from zoo.runs.progress import Display
from zoo.runs.scored import chosen
from zoo.settings.stage import stages_of
from zoo.storage.atomic import write_json, writing

PERCENTILES = (50, 90, 99, 100)


def main(cfg: DictConfig) -> int:
    """Survey the data of a config; return 1 if a record is broken."""
    if not cfg.data:
        raise ZooError("There is no data to survey. Set it with data=[...].")
    data = RunData(cfg.data, skip_broken=True)
    processor, positions = processor_alone(cfg, data.texts())
    look = Look(processor, positions, cfg.survey.images == "open")
    limits = {f"max_length of stage {n}": s.max_length for n, s in stages_of(cfg).items() if s.max_length}
    if positions is not None:
        limits["the LLM's positions"] = positions
    display, console = Display(), Console()
    reports = {}
    for name, dataset in {**data.all, **{f"{n} (eval)": d for n, d in _evaluated(data).items()}}.items():
        tally, seconds, cores = _surveyed(name, dataset, look, cfg, display)
        reports[name] = report = summary(tally, seconds, cores, limits)
        title = f"{name}{_part(name, dataset, cfg.limit)}, as {cfg.model.name or 'the model'} reads it"
        _show(console, title, report, tally, cfg.survey.examples)
    if cfg.survey.json:
        with writing(repr(cfg.survey.json), "Choose another place with survey.json=<file>."):
            write_json(Path(cfg.survey.json), reports)
        console.print(f"All figures are in {cfg.survey.json}", soft_wrap=True, highlight=False, markup=False)
    return int(any(report["broken"]["records"] for report in reports.values()))


def _part(name: str, dataset: Any, limit: int | None) -> str:
    """Say which records are surveyed, where they are not all."""
    if limit is None or (not dataset.is_stream and limit >= len(dataset)):
        return ""
    if dataset.is_stream:
        return f", the first {limit:,} records"
    first = isinstance(chosen(name, dataset, limit), range)
    return f", {'the first ' * first}{limit:,} of {len(dataset):,} records{', drawn' * (not first)}"


def _evaluated(data: RunData) -> dict[str, Any]:
    """Return the splits for evaluation that belong to training data of the config."""
    return {n: d for n, d in data.evaluation.items() if data.all.get(n) is not d}


def _surveyed(name: str, dataset: Any, look: Look, cfg: Any, display: Display) -> tuple[Tally, float, float]:
    """Return the tally, wall-clock seconds, and CPU seconds including those of workers."""
    whole, began, before = Tally(), time.monotonic(), sum(os.times()[:4])
    total = None if dataset.is_stream else len(dataset)
    total = cfg.limit if total is None else min(total, cfg.limit or total)
    with display:
        display.begin(name, total or 0, what="record")
        for part in survey(name, dataset, look, limit=cfg.limit, workers=cfg.workers):
            whole.add(part)
            rate = whole.records / max(1e-9, time.monotonic() - began)
            display.update(whole.records, {}, rate, "records", 0.0)
    return whole, time.monotonic() - began, sum(os.times()[:4]) - before


def summary(tally: Tally, seconds: float, cores: float, limits: dict[str, int]) -> dict[str, Any]:
    """Return all figures as plain values.

    Args:
        tally: of a data set.
        seconds: of the survey, on the clock.
        cores: CPU seconds of the survey.
        limits: name of a limit -> positions.
    """
    lengths = np.array(tally.lengths or [0])
    quantiles = np.percentile(lengths, PERCENTILES, method="inverted_cdf")
    same, ids = tally.twice("contents"), tally.twice("ids")
    return {
        "records": tally.records,
        "usable": tally.records - len(tally.broken),
        "images": tally.images,
        "dialogs": tally.dialogs,
        "turns_learnt": tally.turns,
        "tokens_learnt": tally.learnt,
        "image_tokens": tally.image_tokens,
        "tokens": {("longest" if p == 100 else f"p{p}"): int(v) for p, v in zip(PERCENTILES, quantiles, strict=True)},
        "beyond": {what: {"limit": limit, "records": int((lengths > limit).sum())} for what, limit in limits.items()},
        "same_words_and_images": {"records": len(same), "first": same[:10]},
        "same_id": {"records": len(ids), "first": ids[:10]},
        "broken": {"records": len(tally.broken), "kinds": dict(tally.kinds()), "list": tally.broken},
        "seconds": round(seconds, 1),
        "records_per_s": round(tally.records / max(seconds, 1e-9), 1),
        "records_per_core_s": round(tally.records / max(cores, 1e-2), 1),
    }


def _show(console: Console, title: str, report: dict[str, Any], tally: Tally, examples: int) -> None:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, show_header=False)
    table.add_column()
    table.add_column(justify="right")
    for key in ("records", "usable", "images", "dialogs", "turns_learnt", "tokens_learnt", "image_tokens"):
        table.add_row(key.replace("_", " "), f"{report[key]:,}")
    table.add_row("tokens of a record", ", ".join(f"{name} {value:,}" for name, value in report["tokens"].items()))
    for what, beyond in report["beyond"].items():
        table.add_row(f"beyond {what} ({beyond['limit']:,})", f"{beyond['records']:,}")
    table.add_row("same words and images as one before", f"{report['same_words_and_images']['records']:,}")
    table.add_row("same id as one before", f"{report['same_id']['records']:,}")
    pace = f"{report['records_per_s']:,.0f}, {report['records_per_core_s']:,.0f}"
    table.add_row("records a second; of one core", pace)
    console.print(table)
    for what in ("same_words_and_images", "same_id"):
        for first, again in report[what]["first"][:examples]:
            console.print(
                f"{what.replace('_', ' ')}: {first} and {again}", soft_wrap=True, highlight=False, markup=False
            )
    groups: dict[tuple[str, str], list[dict[str, str]]] = defaultdict(list)
    for line in tally.broken:
        groups[line["kind"], _alike(line["reason"])].append(line)
    if not groups:
        return
    table = Table(title="broken", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("kind")
    table.add_column("records", justify="right")
    table.add_column("the first", overflow="fold")
    for (kind, _), lines in sorted(groups.items(), key=lambda item: -len(item[1])):
        shown = "\n".join(f"{line['where']} {line['id']}: {line['reason']}" for line in lines[:examples])
        table.add_row(kind, f"{len(lines):,}", _plain(shown))
    console.print(table)
    console.print("skip_broken=true leaves them out of a run.", highlight=False)


def _alike(reason: str) -> str:
    """Replace names and numbers in a reason, so that equal kinds of fault are counted together."""
    return re.sub(r"'[^']*'|\"[^\"]*\"|\S*/\S*|\d+", "*", reason)


def _plain(text: str) -> Any:
    from rich.text import Text

    return Text(text)
