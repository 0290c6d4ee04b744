"""`zoo bench device`: what ten minutes on one GPU can tell, written line by line, so that a run that ends early counts.

Training as a share of what the device can multiply, prefill and decoding with and without each pruner, the kernels of
AIM against the blockwise form, the divergence in chunks, MoLE against LoRA. Weights are random. Each section has a time
of its own; a second run with the same file goes on with sections that are not finished. A CPU takes `sizes=tiny`.
"""

import contextlib
import gc
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from zoo.benches.measure import Clock, Value
from zoo.benches.place import chosen
from zoo.benches.report import Report, Row, machine, short
from zoo.registry import ZooError, first_line, names, unknown

# Section -> module with a function `NAME(place)` that measures it, and arguments; in the order of what one wants first.
SECTIONS: dict[str, tuple[str, str, tuple[Any, ...]]] = {
    "matmul": ("device_training", "matmul", ()),
    "train_05b": ("device_training", "whole", ()),
    "train_7b": ("device_training", "large", ()),
    "prompt_576": ("device_prompts", "prompts", (576,)),
    "prompt_2880": ("device_prompts", "prompts", (2880,)),
    "prompt_6272": ("device_prompts", "prompts", (6272,)),
    "aim": ("device_kernels", "aim", ()),
    "kl": ("device_kernels", "kl", ()),
    "mole": ("device_kernels", "mole", ()),
}
# Dense bf16 products of a device in TFLOP/s as its vendor states them, by a part of its name; the first that fits.
PEAKS = {
    "B200": 2250.0,
    "H200": 989.4,
    "H100 PCIe": 756.0,
    "H100": 989.4,
    "GH200": 989.4,
    "A100": 312.0,
    "L40S": 362.0,
    "RTX 4090": 165.2,
    "A10": 125.0,
}


@dataclass
class Options:
    sizes: str = "full"  # full: LLaVA-OneVision's LLMs of 0.5B and 7B behind CLIP-L; tiny: to try the script
    minutes: float = 10.0  # for all sections
    seconds: float = 60.0  # for one section, without what it takes to build its model
    out: str = "device.jsonl"  # a line for each number; sections that are finished in it are not run again
    only: str = ""  # sections, with commas between; empty: all
    pruner: str = "all"  # with commas between; beside none
    keep_ratio: float = 0.1111  # share of the image tokens that pruners with such an option keep
    batches: str = "1,16"  # prompts at once
    device: str = "auto"  # auto | cpu | cuda

    def __post_init__(self) -> None:
        if self.sizes not in ("full", "tiny"):
            raise unknown("sizes", self.sizes, ("full", "tiny"))
        if min(self.minutes, self.seconds) <= 0 or not 0 < self.keep_ratio <= 1:
            raise ZooError("minutes and seconds must be more than 0, keep_ratio in (0, 1].")
        self.sections = chosen("section", self.only, SECTIONS)
        self.pruners = chosen("pruner", "" if self.pruner == "all" else self.pruner, names("pruner"))
        try:
            self.prompts = [int(word) for word in self.batches.split(",")]
        except ValueError:
            self.prompts = [0]
        if min(self.prompts) < 1:
            raise ZooError(f"batches is numbers of at least 1 with commas between, got {self.batches!r}.")


class Journal:
    """The file of results: each line is on the disk when `write` returns."""

    def __init__(self, path: Path, about: dict[str, Any]) -> None:
        self.path, self.about = path, about
        self.lines: list[dict[str, Any]] = []
        if path.exists():
            for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
                with contextlib.suppress(ValueError):  # the last one of a run that was killed
                    self.lines.append(json.loads(line))
            if self.lines and {k: self.lines[0].get(k) for k in about} != about:
                raise ZooError(f"{path} is of another machine or other options: give another out=, or delete it.")
            if path.read_bytes()[-1:] not in (b"", b"\n"):
                with path.open("a") as file:
                    file.write("\n")
        if not self.lines:
            self.write(about)

    def write(self, line: dict[str, Any]) -> None:
        self.lines.append(line)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def finished(self) -> set[str]:
        """Return the sections that came to their end."""
        return {line["section"] for line in self.lines if line.get("end") == "finished"}

    def rows(self) -> list[Row]:
        """Return the numbers; of what was measured twice, the last."""
        found: dict[str, Row] = {}
        for line in self.lines:
            if "value" in line:
                value = Value(*(line["value"][k] for k in ("median", "low", "high")))
                found[line["what"]] = Row(line["what"], value, line["unit"], note=line["note"])
        return list(found.values())


@dataclass
class DevicePlace:
    """What sections share.

    Attributes:
        options: of the bench.
        clock: of the device.
        show: is told what is going on.
        journal: where results go.
        section: that runs.
        until: when it has to end, by `time.monotonic`.
        kept: models that later sections use again.
        left_out: what the section had no time for, or could not run.
    """

    options: Options
    clock: Clock
    show: Callable[[str], None]
    journal: Journal
    section: str = ""
    until: float = 0.0
    kept: dict[str, Any] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)

    @property
    def device(self) -> torch.device:
        return self.clock.device

    @property
    def tiny(self) -> bool:
        return self.options.sizes == "tiny"

    @property
    def left(self) -> float:
        """Seconds left for the section."""
        return self.until - time.monotonic()

    def begin(self) -> None:
        """Begin to count the section's time: what it measures is there."""
        end_of_all = self.kept["end"]
        self.until = min(time.monotonic() + self.options.seconds, end_of_all)

    def row(self, what: str, value: Value, unit: str, note: str = "") -> None:
        """Write a number down."""
        row = Row(what, value, unit, note=note)
        spread = {"median": value.median, "low": value.low, "high": value.high}
        self.journal.write({"section": self.section, "what": what, "value": spread, "unit": unit, "note": note})
        self.show(f"  {row.what}: {short(value.median)}{unit} {note}")

    def seconds(self, step: Callable[[], object], share: float = 1.0, most: int = 7, warm: bool = False) -> Value:
        """Time a step: once to warm up, then at least once, and until a share of the section's time is over.

        Args:
            step: what to time.
            share: of the time that is left.
            most: times.
            warm: it ran before.
        """
        until = time.monotonic() + share * max(0.0, self.left)
        if not warm:
            step()
        times: list[float] = []
        while not times or (len(times) < most and time.monotonic() < until):
            before = self.clock.read()[1]
            step()
            times.append(self.clock.read()[1] - before)
        return Value.of(times)

    @contextlib.contextmanager
    def trying(self, what: str) -> Iterator[None]:
        """Go on where something cannot run here, too little memory for example: it is written down and left out."""
        try:
            yield
        except Exception as error:  # of any kind: the device is there for minutes, and other sections can use them
            kind = "" if isinstance(error, ZooError) else f"{type(error).__name__}: "
            self.left_out.append(f"{what}: {kind}{first_line(error)[:200]}")
            self.show(f"  {self.left_out[-1]}")
        finally:
            self.clean()

    def clean(self) -> None:
        """Give memory back to the device."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def run(options: Options, show: Callable[[str], None] = print) -> Report:
    """Measure the sections that are not in the file yet, as far as the time allows."""
    from zoo.runs.processes import start_accelerator
    from zoo.storage.precision import fast_products

    device = start_accelerator(options.device).device
    if device.type == "cpu" and not options.only and options.sizes == "full":
        raise ZooError("zoo bench device measures a GPU, and there is none. On a CPU: sizes=tiny, or choose by only=.")
    fast_products()
    about = machine(device, torch.get_num_threads())
    kind = about["machine"].partition(";")[0]
    settings = {"sizes": options.sizes, "keep_ratio": options.keep_ratio}
    journal = Journal(Path(options.out), {"machine": kind, "versions": about["versions"], **settings})
    place = DevicePlace(options, Clock(device, torch.get_num_threads()), show, journal)
    place.kept["end"] = time.monotonic() + 60 * options.minutes
    finished = journal.finished()
    for name in options.sections:
        if name in finished:
            show(f"{name}: finished before")
        elif time.monotonic() >= place.kept["end"]:
            show(f"{name}: no time left; the same command goes on here")
        else:
            _run(place, name)
    return Report("zoo bench device", journal_lines(place), journal.rows(), about)


def _run(place: DevicePlace, name: str) -> None:
    module, function, arguments = SECTIONS[name]
    place.section, place.left_out = name, []
    if function != "prompts":
        place.kept.pop("prompts", None)  # a model of 15 GB
    place.show(f"{name}: begins")
    began = time.monotonic()
    place.begin()
    with place.trying(name):
        getattr(import_module(f"zoo.benches.{module}"), function)(place, *arguments)
    took = round(time.monotonic() - began, 1)
    place.journal.write({"section": name, "end": "finished", "took": took, "left_out": place.left_out})


def journal_lines(place: DevicePlace) -> list[str]:
    """Say in words which sections ran, and what they left out."""
    ends = {line["section"]: line for line in place.journal.lines if "end" in line}
    lines = [f"{name}: {end['took']} s" for name, end in ends.items()]
    return [*lines, *(f"{name}: left out: {what}" for name, end in ends.items() for what in end["left_out"])]


def peak_of(device: torch.device) -> tuple[float, str]:
    """Return the dense bf16 TFLOP/s that a device's vendor states, and its name; 0 where it is not in the table."""
    if device.type != "cuda":
        return 0.0, "CPU"
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAKS.items() if part in name), 0.0), name
