"""`zoo bench fusion`: what the ways of bringing vision into a language model cost, each against what it replaces.

Every method has a file of its own beside this one with a function `rows(place) -> list[Row]`; what is compared there
runs in turns on the same machine, with random weights, and only ratios count.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch

from zoo.benches.measure import Clock
from zoo.benches.place import Place, at_least_one, chosen, torch_threads
from zoo.benches.report import Report, machine
from zoo.registry import build, unknown
from zoo.runs.processes import start_accelerator
from zoo.storage.precision import fast_products

# Method -> module with its rows.
METHODS = {
    "pool": "zoo.benches.fusion_pool",
    "mole": "zoo.benches.fusion_mole",
    "moextend": "zoo.benches.fusion_moextend",
    "vlora": "zoo.benches.fusion_vlora",
}

# Language models: Llama with tied embeddings.
LLMS: dict[str, dict[str, Any]] = {
    "m100": {"hidden_size": 768, "num_layers": 12, "num_heads": 12, "intermediate_size": 2048},
    "tiny": {"hidden_size": 32, "num_layers": 4, "num_heads": 2, "intermediate_size": 64},
}
VOCAB = {"m100": 32000, "tiny": 64}


@dataclass
class Options:
    sizes: str = "m100"  # of the language model: m100, with 110 M parameters; tiny
    only: str = ""  # methods, with commas between; empty: all
    rows: int = 1  # sequences of a pass
    dtype: str = "float32"  # of all weights: float32 | bfloat16
    threads: int = 1  # of torch on the CPU
    rounds: int = 7  # turns of each variant
    steps: int = 2  # in a turn
    device: str = "auto"  # auto | cpu | cuda

    def __post_init__(self) -> None:
        if self.sizes not in LLMS:
            raise unknown("sizes", self.sizes, LLMS)
        if self.dtype not in ("float32", "bfloat16"):
            raise unknown("dtype", self.dtype, ("float32", "bfloat16"))
        at_least_one(self, "rows", "threads", "rounds", "steps")
        self.methods = chosen("method", self.only, METHODS)


@dataclass
class FusionPlace(Place):
    """What the methods share."""

    @property
    def device(self) -> torch.device:
        return self.clock.device

    @property
    def dtype(self) -> torch.dtype:
        return getattr(torch, self.options.dtype)

    def still(self, module: Any) -> Any:
        """Return a module ready to be timed in inference: on the device, in the dtype, frozen."""
        return module.to(self.device, self.dtype).eval().requires_grad_(False)

    def llm(self, **changes: Any) -> Any:
        """Return a language model with random weights, the same each time, in eval mode."""
        torch.manual_seed(0)
        sizes = {"name": "hf", "tie_embeddings": True, **LLMS[self.options.sizes], **changes}
        return self.still(build("llm", sizes, vocab_size=VOCAB[self.options.sizes]))

    def random(self, *size: int) -> torch.Tensor:
        """Return the same random numbers each time."""
        generator = torch.Generator().manual_seed(0)
        return torch.randn(*size, generator=generator).to(self.device, self.dtype)


def run(options: Options, show: Callable[[str], None] = print) -> Report:
    """Measure the methods that `options.only` names; `show` is told what is going on."""
    with torch_threads(options.threads):
        device = start_accelerator(options.device).device
        fast_products()
        place = FusionPlace(options, Clock(device, options.threads), show)
        report = Report("zoo bench fusion", machine=machine(device, options.threads))
        report.setting = [
            f"language model {options.sizes}: Llama, {_said(LLMS[options.sizes])}, tied embeddings; {options.dtype}",
            f"{options.rows} rows; ratios of {place.clock.name} time within a round; {options.rounds} rounds",
        ]
        for method in options.methods:
            show(f"measuring: {method}")
            report.add(*import_module(METHODS[method]).rows(place))
        return report


def _said(sizes: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in sizes.items())
