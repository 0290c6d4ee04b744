"""`zoo bench native`: images that keep their shapes; attention of the encoder, and batches of unlike images."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from zoo.benches import native_page, native_windows
from zoo.benches.measure import Clock
from zoo.benches.place import at_least_one, chosen, torch_threads
from zoo.benches.report import Report, machine
from zoo.runs.allocator import keep_memory
from zoo.vision.encoders.qwen import FAMILIES

SECTIONS = {"windows": native_windows.run, "page": native_page.run}


@dataclass
class Options:
    only: str = ""  # windows | page, with commas between; empty: both
    families: str = "qwen2_5_vl"  # of the encoders of `windows`, with commas between
    width: int = 320  # of these encoders, in heads of 80 as the published ones have
    depth: int = 8  # their blocks, every fourth of which attends to whole images
    rounds: int = 9  # turns of each encoder; parts of the page
    images: int = 1000  # of the page
    batch: int = 8  # images of a step on the page
    threads: int = 1  # of torch on the CPU

    def __post_init__(self) -> None:
        chosen("only", self.only, SECTIONS)
        chosen("families", self.families, FAMILIES)
        at_least_one(self, "rounds", "batch", "threads", "depth")
        native_windows.allowed(self.width)
        native_page.allowed(self.images, self.batch, self.rounds)


def run(options: Options, show: Callable[[str], None] = print) -> Report:
    """Measure the sections."""
    device = torch.device("cpu")
    clock = Clock(device, options.threads)
    report = Report("zoo bench native", machine=machine(device, options.threads))
    report.setting = [f"float32, random weights; {clock.name} time, {options.rounds} rounds"]
    keep_memory()  # as runs do on a CPU: else page faults of either way outweigh what attention takes
    with torch_threads(options.threads):
        for name in chosen("only", options.only, SECTIONS):
            setting, rows = SECTIONS[name](options, clock, show)
            report.setting.append(setting)
            report.add(*rows)
    return report
