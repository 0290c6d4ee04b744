"""`zoo bench checkpoint`: saving, loading and resuming a model that several processes share, on CPUs over gloo.

- Saving against torch.distributed.checkpoint alone, in turns, on the same tensors: what the loop waits for, the work of
  the processor, and the memory of a process beyond its share of weights and AdamW states. Hashes and the flush to the
  disk are counted.
- Loading: the peak of a process over its share, for a published model, and for one of parts that have checkpoints of
  their own; and whether weights, fresh ones among them, are those of one process to the bit.
- Resuming on another number of processes: losses and samples of each step, against the run that nobody stopped.
"""

import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

from zoo.benches import checkpoint_work as work
from zoo.benches.groups import in_group
from zoo.benches.measure import Value
from zoo.benches.place import at_least_one
from zoo.benches.published import SIZES
from zoo.benches.report import Report, Row, machine
from zoo.benches.save import write_kind
from zoo.registry import unknown

SECTIONS = ("save", "load", "resume")
RECIPE = """# @package _global_
defaults:
  - override /model: scenes_tiny
  - override /data: [scenes]
vision: {width: 16, heads: 2, depth: 1, layer: -1, image_size: 32, patch_size: 8}
llm: {hidden_size: 16, num_layers: 2, num_heads: 2, intermediate_size: 32}
tokenizer: {vocab_size: 320}
data: {scenes: {size: 32, scenes: 40, eval_scenes: 4, grid: 4}}
device: cpu
precision: fp32
parallel: {shard: fsdp2}
stages:
  all: {steps: 4, batch_size: 8, checkpoint_every: 2, lr: 0.001, optimizer: muon_adamw}
"""


@dataclass
class Options:
    processes: int = 4  # that share the model
    width: int = 1024  # of the linear layers that are saved
    layers: int = 32  # their number: 34 M parameters, 403 MB with the states of AdamW
    sizes: str = "100m"  # tiny | 100m | 1b | 7b: of the LLaVA with random weights that is loaded
    dtype: str = "float32"  # of its files
    rounds: int = 5  # turns of each way to save
    only: str = "save,load,resume"  # sections

    def __post_init__(self) -> None:
        if self.sizes not in SIZES:
            raise unknown("sizes", self.sizes, SIZES)
        for section in self.only.split(","):
            if section not in SECTIONS:
                raise unknown("section", section, SECTIONS)
        at_least_one(self, "processes", "layers", "rounds")


def run(options: Options, show: Callable[[str], None] = print, context: Any = None) -> Report:
    """Measure each section; every process runs on one thread.

    Args:
        options: of the bench.
        show: called with a line of progress.
        context: of multiprocessing, for the processes.
    """
    report = Report("zoo bench checkpoint", machine=machine(torch.device("cpu"), 1))
    report.setting = [f"{options.processes} processes over gloo, a thread each"]
    sections = {"save": _save, "load": _load, "resume": _resume}
    with tempfile.TemporaryDirectory() as folder:
        for name in options.only.split(","):
            show(name)
            place = Path(folder) / name
            place.mkdir()
            report.add(*sections[name](options, place, context))
            shutil.rmtree(place)
    return report


def _save(options: Options, place: Path, context: Any) -> list[Row]:
    ranks = in_group(
        options.processes, work.save, options.width, options.layers, options.rounds, str(place), context=context
    )

    def slowest(way: str, key: str) -> list[float]:
        return [max(rank[way][i][key] for rank in ranks) for i in range(options.rounds)]

    def added(way: str) -> list[float]:
        return [sum(rank[way][i]["cpu"] for rank in ranks) for i in range(options.rounds)]

    note = f"{ranks[0]['own'] / 1e6:.0f} MB in each process"
    rows = []
    for way, words in (("sync", "at once"), ("behind", "behind the training")):
        extra = [max(rank["extra"][way] / rank["own"] for rank in ranks)]
        bound = 1.05 if way == "behind" else None
        rows.append(Row(f"saving {words}: memory over a share", Value.of(extra), bound=bound, at_most=True, note=note))
    alone = slowest("dcp", "seen")
    for way, words, bound in (("sync", "at once", 1.1), ("behind", "behind the training", 0.3)):
        ratios = [a / b for a, b in zip(slowest(way, "seen"), alone, strict=True)]
        what = f"saving {words}: what the loop waits, over DCP alone"
        rows.append(Row(what, Value.of(ratios), bound=bound, at_most=True, note=f"DCP: {median(alone):.2f} s"))
        ratios = [a / b for a, b in zip(added(way), added("dcp"), strict=True)]
        rows.append(Row(f"saving {words}: work of the processor, over DCP alone", Value.of(ratios)))
    return rows


def _load(options: Options, place: Path, context: Any) -> list[Row]:
    rows = []
    for kind in ("published", "parts"):
        words = write_kind(kind, options.sizes, options.dtype, place)
        ranks = in_group(options.processes, work.load, words, context=context)
        own, fresh = (max(rank[key] for rank in ranks) / 1e6 for key in ("own", "fresh"))
        note = f"a share is {own:.0f} MB; the projector, whole in each process, has {fresh:.1f} MB"
        peak = Value.of([max(rank["peak"] / rank["own"] for rank in ranks)])
        rows.append(Row(f"loading, {kind}: peak over a share", peak, bound=1.2, at_most=True, note=note))
        alone, shared = (in_group(n, work.values, words, context=context)[0] for n in (1, options.processes))
        same = Value.one(float(sum(alone[n] == shared[n] for n in alone) / len(alone)))
        rows.append(Row(f"loading, {kind}: weights that are those of one process to the bit", same, "", bound=1.0))
    return rows


def _resume(options: Options, place: Path, context: Any) -> list[Row]:
    """Cut a run of each number of processes ahead of its last two steps, and go on with others."""
    rows = []
    counts = sorted({1, 2, options.processes})
    config = place / "conf"
    (config / "recipe").mkdir(parents=True)
    (config / "recipe" / "shares.yaml").write_text(RECIPE, encoding="utf-8")

    def trained(count: int, words: list[str]) -> dict[str, Any]:
        return in_group(count, work.train, str(config), words, context=context)[0]

    whole = {n: trained(n, ["recipe=shares", f"run.folder={place / f'whole-{n}'}"]) for n in counts}
    for before, after in [(options.processes, n) for n in counts[:-1]] + [(n, options.processes) for n in counts[:-1]]:
        folder = place / f"{before}-{after}"
        shutil.copytree(place / f"whole-{before}", folder)
        for path in sorted((folder / "checkpoints").glob("step-*"))[1:]:
            shutil.rmtree(path)
        found = trained(after, [f"resume={folder}"])
        apart = _apart(found["losses"], whole[before]["losses"])
        text = f"resuming, {before} -> {after} processes"
        rows.append(Row(f"{text}: difference of losses", Value.one(apart), "", bound=1e-6, at_most=True))
        same = [sorted(seen) == sorted(whole[before]["samples"][step]) for step, seen in found["samples"].items()]
        what = f"{text}: steps with the samples of the whole run"
        rows.append(Row(what, Value.one(sum(same) / len(same)), "", bound=1.0, note=f"{len(same)} steps"))
    return rows


def _apart(found: Mapping[str, float], wanted: Mapping[str, float]) -> float:
    """Return the largest difference of a step's loss, as a share of it."""
    if found.keys() != wanted.keys():
        return float("inf")
    return max(abs(found[step] - loss) / max(1.0, abs(loss)) for step, loss in wanted.items())
