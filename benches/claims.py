"""`zoo bench claims`: what the papers claim, as small experiments that anyone can run on two cores, over several seeds.

Every claim has a file of its own beside this one with

    SETTING: list[str]                                            what is done, for people
    measure(seed, share, show) -> dict[str, float]                one run; `share` of the steps, below 1 for tests
    judge(found) -> list[Row]                                     name -> numbers, one for each seed: rows with bounds
    draw(found, path)                                             a picture of them, where one says more
    DATA: tuple[str, ...]                                         folders of real data below $ZOO_DATA that it needs

Nothing is tuned after the fact: a claim that does not hold shows as one that does not.
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
from zoo.registry import ZooError
from zoo.storage.precision import fast_products

# Claim -> module.
CLAIMS = {
    "pool": "zoo.claims.pool",
    "mole": "zoo.claims.mole",
    "moextend": "zoo.claims.moextend",
    "pruning": "zoo.claims.pruning",
    "pruning_fashion": "zoo.claims.fashion",
    "pruning_film": "zoo.claims.film",
    "vlora": "zoo.claims.vlora",
    "pool_cells": "zoo.claims.pool_cells",
    "mole_domains": "zoo.claims.mole_domains",
    "moextend_clothes": "zoo.claims.moextend_clothes",
    "vlora_clothes": "zoo.claims.vlora_clothes",
    "llava_kd": "zoo.claims.llava_kd",
    "llava_mod": "zoo.claims.llava_mod",
    "llava_kd_clothes": "zoo.claims.llava_kd_clothes",
    "llava_mod_clothes": "zoo.claims.llava_mod_clothes",
    "distill_pruned": "zoo.claims.distill_pruned",
    "distill_pruned_clothes": "zoo.claims.distill_pruned_clothes",
}


@dataclass
class Options:
    claim: str = ""  # claims, with commas between; empty: all
    seeds: int = 3  # runs of each
    first: int = 0  # seed of the first run; the next follow
    share: float = 1.0  # of the steps; less is for tests and shows nothing
    threads: int = 1  # of torch on the CPU
    plots: str = ""  # folder for pictures of the claims that draw some; empty: none

    def __post_init__(self) -> None:
        self.claims = chosen("claim", self.claim, CLAIMS)
        at_least_one(self, "seeds", "threads")
        if not 0 < self.share <= 1:
            raise ZooError(f"share must be in (0, 1], got {self.share}.")


def run(options: Options, show: Callable[[str], None] = print) -> Report:
    """Run the claims that `options.claim` names."""
    with torch_threads(options.threads):
        fast_products()
        device = torch.device("cpu")
        report = Report(
            "zoo bench claims", machine=machine(device, options.threads), columns=("mean", "range of seeds")
        )
        for claim in options.claims:
            module = import_module(CLAIMS[claim])
            if why := lacking(getattr(module, "DATA", ())):
                report.setting.append(f"{claim}: not run: {why}")
                show(report.setting[-1])
                continue
            runs = []
            for seed in range(options.first, options.first + options.seeds):
                show(f"{claim}: seed {seed}")
                runs.append(module.measure(seed, options.share, show))
            found = {name: [run[name] for run in runs] for name in runs[0]}
            report.setting += [f"{claim}: {line}" for line in module.SETTING]
            report.add(*[Row(f"{claim}: {name}", over(numbers), "") for name, numbers in found.items()])
            report.add(*module.judge(found))
            if options.plots and hasattr(module, "draw"):
                module.draw(found, Path(options.plots) / f"{claim}.png")
        return report


def over(numbers: list[float]) -> Value:
    """Mean over seeds, with the lowest and the highest."""
    return Value(sum(numbers) / len(numbers), min(numbers), max(numbers))
