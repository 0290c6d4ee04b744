"""`zoo bench roundtrip`: trained, saved, loaded: how far is what a folder gives back from what was trained?

Tiny checkpoints of every source are trained for two steps by every optimiser and saved. The folder is loaded by
`zoo.load` and by `from_pretrained`, and exported to a published layout that transformers loads by itself. The first
block of encoder and decoder stays frozen, so there is something that must not be saved.
"""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from zoo.benches.measure import Value
from zoo.benches.place import chosen, torch_threads
from zoo.benches.report import Report, Row, machine
from zoo.benches.roundtrip_trial import HOW, OPTIMIZERS, SOURCES, compare, train, train_in_two, write_checkpoints


@dataclass
class Options:
    sources: str = ""  # names with commas between; empty: all
    optimizers: str = ""  # names with commas between; empty: all
    processes: str = ""  # one, two, sharded (two that share the parameters out), commas between; empty: all
    threads: int = 1  # of torch on the CPU


def run(options: Options, show: Callable[[str], None] = print) -> Report:
    """Train on every source, save, load, export."""
    sources = chosen("source", options.sources, SOURCES)
    optimizers = chosen("optimizer", options.optimizers, OPTIMIZERS)
    ways = chosen("way to train", options.processes, HOW)
    report = Report("zoo bench roundtrip", machine=machine(torch.device("cpu"), options.threads))
    report.columns = ("largest difference", "")
    report.setting = [
        "differences of the loss and the logits of a record, of the trained model and of both ways to load it, float32",
        "exported: of the logits of transformers' own class and ours",
    ]
    with torch_threads(options.threads), tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_checkpoints(root)
        cases = [(source, optimizer, how) for source in sources for optimizer in optimizers for how in ways]
        if several := [case for case in cases if case[2] != "one"]:
            show(f"{len(several)} trainings on two processes")
            train_in_two(root, several)
        for source, optimizer, how in cases:
            if how == "one":
                train(root, source, optimizer)
            report.add(*_rows(root, source, optimizer, how))
            show(f"{source}, {optimizer}, {how}")
    return report


def _rows(root: Path, source: str, optimizer: str, how: str) -> list[Row]:
    found, name = compare(root, source, optimizer, how), f"{source}, {optimizer}, {how}"
    note = f"{found.saved} of {found.weights} weights saved"
    if wrong := [f"{len(names)} {word}" for word, names in (("lost", found.lost), ("to spare", found.spare)) if names]:
        note += f", {' and '.join(wrong)}"
    far = float("inf") if wrong else max(found.loss, found.logits)
    rows = [Row(name, Value.one(far), "", bound=1e-6, at_most=True, note=note)]
    if found.exported is None:
        rows[0].note += f"; not exported: {found.refusal}"
    else:
        rows.append(Row(f"{name}, exported", Value.one(found.exported), "", bound=1e-5, at_most=True))
    return rows
