"""`zoo bench processes`: training on several processes against training on one, for each adapter and each distiller.

Processes of this machine train tiny models on the same batches, with DDP, FSDP2 and FSDP2 in two groups (HSDP). Losses
and weights are compared, and what a step moves and holds is counted.
"""

import multiprocessing
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from zoo.benches.measure import Value
from zoo.benches.place import at_least_one, chosen, torch_threads
from zoo.benches.processes_balance import balance_rows
from zoo.benches.processes_work import COMPOSITIONS, DIVISIBLE, Trained, differences, file_name, start, train
from zoo.benches.report import Report, Row, machine
from zoo.registry import ZooError
from zoo.settings.parallel import ParallelConfig

LOSS, WEIGHT = 1e-6, 1e-5  # of a step's loss, and of a weight behind ten steps
# Muon iterates in bfloat16, where the last bit of a gradient may turn one in 256 of a step of 0.02; bf16 gathers round.
ROUNDED = {"no adapter, Muon": (1e-3, 1e-2), "masters, bf16": (1e-3, 1e-2)}
WAYS = {
    "ddp": ParallelConfig(shard="none"),
    "fsdp2": ParallelConfig(shard="fsdp2"),
    "fsdp2 fp32": ParallelConfig(shard="fsdp2", gather="fp32"),
    "fsdp2 reduce": ParallelConfig(shard="fsdp2", reduce="bf16"),
    "hsdp": ParallelConfig(shard="fsdp2", replicate=2),
    "tensor": ParallelConfig(shard="fsdp2", tensor=2),
}
SECTIONS = ("ddp", "fsdp2", "hsdp", "tensor", "moved", "balance")


@dataclass
class Options:
    processes: int = 2  # 2 or 4; `hsdp` always has 4
    steps: int = 10  # of the optimiser
    compositions: str = ""  # their names, with semicolons between; empty: all
    only: str = ""  # sections, with commas between: ddp, fsdp2, hsdp, tensor, moved, balance; empty: all
    patience: int = 600  # seconds that processes may take

    def __post_init__(self) -> None:
        at_least_one(self, "processes", "steps", "patience")
        if self.processes not in (2, 4):
            raise ZooError(f"processes must be 2 or 4, got {self.processes}: the four passes of a step are divided.")
        self.sections = chosen("section", self.only, SECTIONS)
        self.names = [n.strip() for n in self.compositions.split(";") if n.strip()] or list(COMPOSITIONS)
        if wrong := [n for n in self.names if n not in COMPOSITIONS]:
            raise ZooError(f"There is no composition {wrong[0]!r}. Known: {'; '.join(COMPOSITIONS)}.")


def run(options: Options, show: Callable[[str], None] = print) -> Report:
    """Train, compare and count; `show` is told what is going on."""
    report = Report("zoo bench processes", machine=machine(torch.device("cpu"), 1), columns=("largest", ""))
    report.setting = [f"{options.steps} steps of four passes, one with text alone; AdamW at 3e-4; CPU processes, gloo"]
    with torch_threads(1), tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        equal = [s for s in options.sections if s not in ("moved", "balance")]
        show("training on one process")
        one = {name: train(name, options.steps, ParallelConfig()) for name in options.names} if equal else {}
        for section in equal:
            world = 4 if section == "hsdp" else options.processes
            names = [name for name in options.names if section != "tensor" or name in DIVISIBLE]
            show(f"training on {world} processes: {section}")
            found = _trained(place / section, names, section, world, options)
            report.add(*(row for name in names for row in _compared(name, section, world, found, one)))
        if "moved" in options.sections:
            show("counting what is moved")
            report.add(*_moved(place, options))
        if "balance" in options.sections:
            show("dealing samples of real data")
            report.add(*balance_rows())
    return report


def _trained(folder: Path, names: Sequence[str], way: str, world: int, options: Options) -> dict[str, Trained]:
    """Train compositions in processes of their own.

    Raises:
        ZooError: a process failed, or did not end in time.
    """
    children = start(world, folder, names, options.steps, WAYS[way], multiprocessing.get_context("spawn"))
    for child in children:
        child.join(options.patience)
    hang = [child.kill() for child in children if child.exitcode is None]
    if hang or any(child.exitcode for child in children):
        raise ZooError(f"{way} on {world} processes: {'they hang' if hang else 'one of them failed'}.")
    return {name: Trained.load(folder / f"{file_name(name)}.pt") for name in names}


def _compared(name: str, way: str, world: int, found: dict[str, Trained], one: dict[str, Trained]) -> list[Row]:
    loss, weight = differences(found[name], one[name])
    bounds = ROUNDED.get(name, (LOSS, WEIGHT))
    what = f"{name}, {way}, {world} processes"
    search = "searches for unused weights" if way == "ddp" and found[name].unused else ""
    return [
        Row(f"{what}: loss", Value.one(loss), "", bounds[0], at_most=True),
        Row(f"{what}: weights", Value.one(weight), "", bounds[1], at_most=True, note=search),
    ]


def _moved(folder: Path, options: Options) -> list[Row]:
    """Bytes of a step in bf16 on float32 weights, by number formats, and gradients held between passes."""
    name, rows, base = "masters, bf16", [], 0.0
    for way in ("fsdp2 fp32", "fsdp2", "fsdp2 reduce"):
        found = _trained(folder / way.replace(" ", "-"), [name], way, 2, options)[name]
        for kind in ("gathered", "reduced"):
            count = found.moved.get(kind, 0) / 1024
            rows.append(Row(f"{name}, {way}: {kind} in a step", Value.one(count), " KiB"))
        base = base or rows[0].value.median
    for way in ("ddp", "fsdp2"):
        found = _trained(folder / f"held-{way}", ["no adapter"], way, 2, options)["no adapter"]
        count = found.gradients / 1024
        rows.append(Row(f"no adapter, {way}: gradients held between passes", Value.one(count), " KiB"))
    return rows
