"""The forward pass that runs now: what the model tells the parts inside the LLM of it, and what they note in it.

All of it belongs to the pass and nothing to a module, so that threads may share a model, and passes of a model that
drafts may stand between those of the model that it drafts for, even where both are one.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch


@dataclass
class Pass:
    """A pass of the LLM.

    Attributes:
        sequence: what the model knows of the positions (`zoo.model_types.LLMSequence`).
        dropped: what a pruner inside the LLM has done so far (`zoo.fusion.dropping.Run`); None: nothing.
    """

    sequence: Any
    dropped: Any = None


_NOW: ContextVar[Pass | None] = ContextVar("zoo_pass", default=None)


def current() -> Pass | None:
    """Give the pass that runs now; None where the LLM was called by itself."""
    return _NOW.get()


@contextmanager
def running(sequence: Any) -> Iterator[Pass]:
    """Say to the parts inside the LLM that what runs in this block is a pass over `sequence`."""
    if torch.compiler.is_compiling():  # a graph cannot set it; parts that ask for the pass refuse to be compiled
        yield Pass(sequence)
        return
    token = _NOW.set(now := Pass(sequence))
    try:
        yield now
    finally:
        _NOW.reset(token)
