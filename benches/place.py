"""What the benches share before they measure: checks of their options, the threads of torch, turns of variants."""

import contextlib
import gc
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from zoo.benches.measure import Clock, Plain, Turns, interleave
from zoo.registry import ZooError, unknown


def at_least_one(options: object, *names: str) -> None:
    """Refuse options below 1.

    Raises:
        ZooError: one of `names` is.
    """
    for name in names:
        if getattr(options, name) < 1:
            raise ZooError(f"{name} must be at least 1, got {getattr(options, name)}.")


def chosen(kind: str, words: str, allowed: Collection[str]) -> list[str]:
    """Read names with commas between; all that are allowed if there is none.

    Raises:
        ZooError: a name is not allowed; `kind` says what it is the name of.
    """
    found = [word for word in words.split(",") if word]
    for word in found:
        if word not in allowed:
            raise unknown(kind, word, allowed)
    return found or list(allowed)


@contextlib.contextmanager
def torch_threads(number: int) -> Iterator[None]:
    """Let torch use some threads on the CPU, and as many as before afterwards; set aside what was imported."""
    gc.collect()
    gc.freeze()  # else collections before rounds and stages go through a million objects of the libraries each time
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@dataclass
class Place:
    """What the sections of a bench share."""

    options: Any  # with rounds and steps
    clock: Clock
    show: Callable[[str], None]  # is told what is going on

    def time(
        self, variants: Mapping[str, Plain | Callable[[], object]], steps: int | None = None, rounds: int | None = None
    ) -> Turns:
        """Time variants in turns; functions too."""
        gc.collect()
        plain = {name: v if isinstance(v, Plain) else Plain(v) for name, v in variants.items()}
        return interleave(plain, self.clock, rounds or self.options.rounds, steps or self.options.steps)


@dataclass
class StepPlace(Place):
    """The same for training steps."""

    accelerator: Any
    precision: str
