"""One forward pass as a value: what the model knows of it, and what parts note in it while it runs.

A hook inside an encoder or a language model that we do not own is given tensors and nothing else. It finds the pass
that it belongs to by `current()`, and keeps in it what it would otherwise have to keep on a module. So a module is the
same before a pass as behind it, and any number of passes may run at once:

- threads share a model, and each has the pass that it began;
- a pass may run inside of another: a teacher's, or that of a model that drafts;
- layers that backward runs again, in a thread of autograd's own, find the pass that they ran in first (`carried`);
- a compiled graph reads the pass that was begun outside of it and writes into it. It cannot begin one.

What is asked of a pass when it is over (which columns each layer saw, how tokens were routed) is asked of the value,
which the model gives with its output, as `passed`. No part remembers it.

What is run without a model has no pass. A language model by itself gets one where its decoder is entered, with what
adapters were told before; one layer by itself, or a graph, uses that of the part, `alone`, and such runs take turns.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar, Token
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from zoo.registry.errors import ZooError

if TYPE_CHECKING:
    from torch import Tensor

_CONDITIONS = "zoo_conditions"  # under which a cache holds what adapters made of its images


@dataclass
class Pass:
    """A pass of the model, from the pixels to the losses. A copy of it is empty: it holds tensors of a graph.

    Attributes:
        sequence: what the model knows of the positions (`zoo.composed.outputs.LLMSequence`); None: nothing.
        conditions: what adapters made of the images, by adapter. All passes of one generation share it.
        dropped: what a pruner inside the LLM has done so far (`zoo.fusion.pruners.inside.dropper.Run`); None: nothing.
        padding_mask: (B, T) 1 where a token is real, beside an attention mask of four dimensions.
        rows: B, as the decoder was given it.
        valid: from which layer on, and which of the tokens (S,) are no padding there, S = B * length.
        records: how tokens were routed, layer by layer, by adapter (`zoo.fusion.adapters.routing_trace`).
        taken: what hooks take from the encoder that runs (`zoo.vision.encoders.base.Taken`); None: nothing.
        notes: what hooks hand on to each other, by a key of their part.
        left: the decoder is through: layers that run now are run again, for backward.
    """

    sequence: Any = None
    conditions: dict[str, Any] = field(default_factory=dict)
    dropped: Any = None
    padding_mask: Tensor | None = None
    rows: int = 1
    valid: list[tuple[int, Tensor]] = field(default_factory=list)
    records: dict[str, list[Any]] = field(default_factory=dict)
    taken: Any = None
    notes: dict[str, Any] = field(default_factory=dict)
    left: bool = False
    token: Token[Pass | None] | None = field(default=None, repr=False)  # of a pass that `begin` began

    def __reduce__(self) -> Any:
        return Pass, ()

    def again(self) -> Pass:
        """Give what a layer needs of the pass when backward runs it again.

        Not the records: their tensors hold the graph, and the graph holds what runs again, a circle that Python's
        collector does not see.
        """
        return Pass(
            self.sequence,
            dict(self.conditions),
            padding_mask=self.padding_mask,
            rows=self.rows,
            valid=list(self.valid),
            notes=dict(self.notes),
            left=True,
        )

    def valid_in(self, layer: int) -> Tensor | None:
        """Which of the tokens (S,) of a layer are no padding; None: all, as far as is known."""
        for first, valid in reversed(self.valid):
            if first <= layer:
                return valid
        return None


_NOW: ContextVar[Pass | None] = ContextVar("zoo_pass", default=None)


class _Seen(threading.local):
    """The same for compiled graphs: Dynamo of torch 2.11 reads lists, and no context variables."""

    def __init__(self) -> None:
        self.now: list[Pass | None] = [None]


_SEEN = _Seen()


def current() -> Pass | None:
    """Give the pass that runs now in this thread; None where a part is run without a model."""
    return _SEEN.now[0] if _compiling() else _NOW.get()


def _set(now: Pass | None) -> Token[Pass | None]:
    _SEEN.now[0] = now
    return _NOW.set(now)


def _reset(token: Token[Pass | None]) -> None:
    _NOW.reset(token)
    _SEEN.now[0] = _NOW.get()


@contextmanager
def running(sequence: Any = None, conditions: dict[str, Any] | None = None) -> Iterator[Pass]:
    """Begin a pass: what runs in this block belongs to it.

    Args:
        sequence: what the model knows of the positions, as far as it does yet.
        conditions: of the generation that the pass is one of; None: none yet.
    """
    now = Pass(sequence, {} if conditions is None else conditions)
    if _compiling():  # a graph cannot set it; parts in the graph use their own
        yield now
        return
    token = _set(now)
    try:
        yield now
    finally:
        _reset(token)


def required(alone: Pass) -> Pass:
    """Give the pass that runs, to read what its layers left; in a graph `alone`, which such layers wrote into.

    Raises:
        ZooError: no pass runs, so nothing is known of one that is over.
    """
    if (now := current()) is not None:
        return now
    if _compiling():
        return alone
    raise ZooError(
        "Losses of a pass are read within it, and none runs: a model does so in its forward; around a language model "
        "by itself, `with zoo.registry.forward_pass.running():` holds both."
    )


@contextmanager
def joined(alone: Pass) -> Iterator[Pass]:
    """Run a block in the pass that runs now, or in one of its own where none does; in a graph, in `alone`."""
    now = current()
    if now is not None or _compiling():
        yield now or alone
        return
    with running() as now:
        yield now


def begin() -> Pass:
    """Begin a pass where no block can: in a hook before a module. What is behind the module calls `end`."""
    now = Pass()
    now.token = _set(now)
    return now


def end(now: Pass) -> None:
    """End what `begin` began; other passes are left alone."""
    if now.token is not None:
        _reset(now.token)
        now.token = None


def carried(function: Callable[..., Any]) -> Callable[..., Any]:
    """Make of what checkpointing runs, and runs again in backward, a function that finds the pass of now each time."""
    now = current()
    if now is None or _compiling():
        return function

    again, begun = now.again(), False

    def run(*args: Any, **kwargs: Any) -> Any:
        nonlocal begun
        if not begun:  # in the pass itself
            begun = True
            return function(*args, **kwargs)
        with _entered(again):
            return function(*args, **kwargs)

    return run


def conditions_in(cache: Any) -> dict[str, Any]:
    """Give what adapters made of the images that a cache begins with."""
    return getattr(cache, _CONDITIONS, None) or {}


def put_conditions(cache: Any, conditions: dict[str, Any]) -> None:
    """Let a cache hold what adapters made of its images, for the passes that go on with it."""
    if conditions and hasattr(cache, "__dict__"):
        setattr(cache, _CONDITIONS, conditions)


@contextmanager
def _entered(now: Pass) -> Iterator[None]:
    token = _set(now)
    try:
        yield
    finally:
        _reset(token)


def _compiling() -> bool:
    import torch  # names of parts are listed without it

    return torch.compiler.is_compiling()
