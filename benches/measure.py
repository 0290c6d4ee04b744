"""Timing on a machine that is not ours alone: variants take turns, and what is compared ran within seconds.

Two clocks run at once. Process CPU time leaves out what other processes did, and is the one that counts with one thread
on a CPU; with several threads, which wait for each other in a loop, and on an accelerator, wall time counts.
"""

import gc
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import torch


@dataclass
class Times:
    """Seconds per step of one variant, an entry for each round."""

    cpu: list[float] = field(default_factory=list)
    wall: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Value:
    """A median over rounds with its quartiles."""

    median: float
    low: float
    high: float

    @classmethod
    def one(cls, number: float) -> "Value":
        """A number that was measured once."""
        return cls(number, number, number)

    def over(self, other: float) -> "Value":
        return Value(self.median / other, self.low / other, self.high / other)

    @classmethod
    def of(cls, numbers: list[float]) -> "Value":
        if len(numbers) < 2:
            return cls.one(numbers[0])
        low, median, high = statistics.quantiles(numbers, n=4, method="inclusive")
        return cls(median, low, high)


@dataclass
class Clock:
    """Measures steps.

    Args:
        device: of the model; a CUDA device is waited for.
        threads: of torch on the CPU.
    """

    device: torch.device
    threads: int

    @property
    def name(self) -> str:
        """Which of the two clocks counts: cpu or wall."""
        return "cpu" if self.device.type == "cpu" and self.threads == 1 else "wall"

    def read(self) -> tuple[float, float]:
        """Return (CPU, wall) seconds now, the device's work done."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.process_time(), time.perf_counter()

    def take(self, times: Times) -> list[float]:
        """Return the seconds per step that count."""
        return times.cpu if self.name == "cpu" else times.wall


class Plain:
    """A variant that is timed by calling it."""

    def __init__(self, step: Callable[[], object]) -> None:
        self.step = step

    def time(self, clock: Clock, steps: int) -> tuple[float, float]:
        """Run `steps` steps; returns CPU and wall seconds of one.

        One step goes before that is not counted: it finds the caches and the memory as another variant left them.
        """
        self.step()
        before = clock.read()
        for _ in range(steps):
            self.step()
        after = clock.read()
        return (after[0] - before[0]) / steps, (after[1] - before[1]) / steps


class Turns(dict[str, Times]):
    """The times of variants that took turns.

    Args:
        clock: says which times count.
        names: of the variants.
    """

    def __init__(self, clock: Clock, names: Iterable[str] = ()) -> None:
        super().__init__({name: Times() for name in names})
        self.clock = clock

    def seconds(self, name: str) -> list[float]:
        """Seconds per step that count, of each round."""
        return self.clock.take(self[name])

    def ratio(self, above: str, below: str) -> Value:
        """How many times as long `above` takes: the median over rounds of the ratio within a round."""
        return Value.of([a / b for a, b in zip(self.seconds(above), self.seconds(below), strict=True)])

    def milliseconds(self, name: str, per: int = 1) -> Value:
        """Milliseconds of one of `per` things that a step does."""
        return Value.of([1e3 * t / per for t in self.seconds(name)])


def interleave(variants: Mapping[str, Plain], clock: Clock, rounds: int, steps: int) -> Turns:
    """Time the variants in turns.

    Args:
        variants: name -> what to time.
        rounds: turns of each.
        steps: of one turn.
    """
    for variant in variants.values():
        variant.time(clock, 1)  # not counted: the first step may compile
    result = Turns(clock, variants)
    for _ in range(rounds):
        gc.collect()
        for name, variant in variants.items():
            cpu, wall = variant.time(clock, steps)
            result[name].cpu.append(cpu)
            result[name].wall.append(wall)
    return result


def matmul(device: torch.device, size: int = 1024, repeat: int = 10) -> tuple[Plain, float]:
    """Return a variant that multiplies square bf16 matrices, and the FLOPs of its step: what the floor is made of."""
    a, b = (torch.randn(size, size, device=device).to(torch.bfloat16) for _ in range(2))

    def step() -> None:
        for _ in range(repeat):
            torch.mm(a, b)

    return Plain(step), repeat * 2.0 * size**3
