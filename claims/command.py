"""`zoo bench claims`: what the papers claim, as small experiments that anyone can run on two cores, over several seeds.

A claim is a file beside this one, named like it, with an `Experiment`. Nothing is tuned after the fact: a claim that
does not hold shows as one that does not.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import torch

from zoo.benches.measure import Value
from zoo.benches.place import at_least_one, chosen, torch_threads
from zoo.benches.real_data import lacking
from zoo.benches.report import Report, Row, machine
from zoo.claims.experiment import Experiment, RowFile, Run, mean, over_seeds, source_hash
from zoo.registry import ZooError
from zoo.storage.precision import fast_products

CLAIMS = (
    "pool", "mole", "moextend", "pruning", "pruning_fashion", "pruning_film", "vlora", "pool_cells", "mole_domains",
    "moextend_clothes", "vlora_clothes", "llava_kd", "llava_mod", "llava_kd_clothes", "llava_mod_clothes",
    "distill_pruned", "distill_pruned_clothes", "mole_smollm", "vlora_smollm", "pool_smollm", "pruning_smollm",
    "llava_kd_smollm", "llava_mod_smollm", "moextend_smollm",
)  # fmt: skip


@dataclass
class Options:
    claim: str = ""  # claims, with commas between; empty: all
    seeds: int = 3  # runs of each
    first: int = 0  # seed of the first run; the next follow
    share: float = 1.0  # of the steps; less is for tests and shows nothing
    threads: int = 1  # of torch on the CPU
    plots: str = ""  # folder for pictures of the claims that draw some; empty: none
    rows: str = "runs/claims"  # folder where rows are kept as they are measured, and read where they are; empty: none

    def __post_init__(self) -> None:
        self.claims = chosen("claim", self.claim, CLAIMS)
        at_least_one(self, "seeds", "threads")
        if not 0 < self.share <= 1:
            raise ZooError(f"share must be in (0, 1], got {self.share}.")


def experiment(claim: str) -> Experiment:
    """Return the experiment of a claim."""
    found: Experiment = import_module(f"zoo.claims.{claim}").EXPERIMENT
    return found


def run(options: Options, show: Callable[[str], None] = print) -> Report:
    """Run the claims that `options.claim` names."""
    with torch_threads(options.threads):
        fast_products()
        device = torch.device("cpu")
        report = Report(
            "zoo bench claims", machine=machine(device, options.threads), columns=("mean", "range of seeds")
        )
        for claim in options.claims:
            told = experiment(claim)
            if why := lacking(told.data):
                report.setting.append(f"{claim}: not run: {why}")
                show(report.setting[-1])
                continue
            runs = _seeds(claim, told, options, show)
            found = over_seeds(runs)
            report.setting += [f"{claim}: {line}" for line in told.setting]
            report.add(
                *(Row(f"{claim}: {name}", Value(mean(each), min(each), max(each)), "") for name, each in found.items())
            )
            report.add(*(bound.row(claim, [run.found for run in runs]) for bound in told.bounds))
            if options.plots and told.draw is not None:
                told.draw(found, Path(options.plots) / f"{claim}.png")
        return report


def _seeds(claim: str, told: Experiment, options: Options, show: Callable[[str], None]) -> list[Run]:
    """Measure every seed whose rows are not kept; what arms keep while they train goes when all seeds are there."""
    runs, files = [], []
    for seed in range(options.first, options.first + options.seeds):
        show(f"{claim}: seed {seed}")
        head = {"claim": claim, "seed": seed, "share": options.share, "threads": options.threads}
        head |= {"torch": torch.__version__, "code": source_hash(claim)}
        file = RowFile(Path(options.rows) / f"{claim}-{seed}.jsonl" if options.rows else None, head, show)
        one = Run(seed, options.share, show, file)
        if not file.whole:
            told.measure(one)
            file.append({"arm": None, "rows": {}, "whole": True})
        runs.append(one)
        files.append(file)
    for file in files:
        file.remove_folder()
    return runs
