"""One forward pass as a value: what the model knows of it, and what parts note in it while it runs.

A hook inside an encoder or a language model of another library gets tensors and nothing else. It finds its pass by
`current()`, and keeps there what it would otherwise have to keep on a module. So no pass leaves a trace on modules,
and any number of passes may run at once:

- threads share a model, and each has the pass that it began;
- a pass may run inside another: a teacher's, or that of a draft model;
- layers that backward runs again, in a thread of autograd's own, find the pass that they ran in first (`carried`);
- a compiled graph reads the pass that was begun outside it and writes into it. It cannot begin one.

Which columns each layer attended to, or how tokens were routed, is read from the pass when it is over: the model
returns it with its output, as `passed`.

A part that runs without a composed model has no pass. A language model by itself gets one where its decoder is
entered, with the conditions that adapters were given before; one layer by itself, or a graph, uses a pass kept on the
part, `alone`, and such runs take turns.
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
    """A pass of the model, from the pixels to the losses. A copy or pickle of it is empty: it holds tensors of a graph.

    Attributes:
        sequence: what the model knows of the positions (`zoo.composed.outputs.LLMSequence`); None: nothing.
        conditions: what adapters made of the images, by adapter. All passes of one generation share the dict.
        dropped: state of a pruner inside the LLM in this pass (`zoo.fusion.pruners.inside.dropper`); None: nothing.
        padding_mask: (B, T) 1 for valid tokens, given beside an attention mask of four dimensions.
        rows: B, as the decoder was given it.
        valid: pairs of a layer and the tokens (S,) that are valid from it on, S = B * length.
        records: how tokens were routed, layer by layer, by adapter (`zoo.fusion.adapters.routing_trace`).
        taken: what hooks captured in the encoder that runs (`zoo.vision.encoders.base.Taken`); None: nothing.
        notes: what hooks of a part pass to each other, by a key of the part.
        left: the decoder has returned: layers that run from now on are recomputed for backward.
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
        """Return a copy with what a layer needs of the pass when backward recomputes it.

        Records are left out: their tensors hold the graph, and the graph holds the recomputed function, a reference
        cycle through C++ that Python's garbage collector cannot find.
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
        """Return which of the tokens (S,) of a layer are valid; None: all, as far as is known."""
        for first, valid in reversed(self.valid):
            if first <= layer:
                return valid
        return None


_CURRENT: ContextVar[Pass | None] = ContextVar("zoo_pass", default=None)


class _GraphState(threading.local):
    """The current pass for compiled graphs: Dynamo of torch 2.11 traces lists, but not context variables."""

    def __init__(self) -> None:
        self.now: list[Pass | None] = [None]


_GRAPH = _GraphState()


def current() -> Pass | None:
    """Return the pass that runs now in this thread; None where a part runs without a model."""
    return _GRAPH.now[0] if _compiling() else _CURRENT.get()


def _set(now: Pass | None) -> Token[Pass | None]:
    _GRAPH.now[0] = now
    return _CURRENT.set(now)


def _reset(token: Token[Pass | None]) -> None:
    _CURRENT.reset(token)
    _GRAPH.now[0] = _CURRENT.get()


@contextmanager
def running(sequence: Any = None, conditions: dict[str, Any] | None = None) -> Iterator[Pass]:
    """Begin a pass: what runs in this block belongs to it.

    Args:
        sequence: what the model knows of the positions, as far as it does yet.
        conditions: of the generation that the pass is one of; None: none yet.
    """
    now = Pass(sequence, {} if conditions is None else conditions)
    if _compiling():  # a graph cannot set a context variable; parts in the graph use their own pass
        yield now
        return
    token = _set(now)
    try:
        yield now
    finally:
        _reset(token)


def required(alone: Pass) -> Pass:
    """Return the pass that runs, to read what its layers noted; in a graph `alone`, which such layers wrote into.

    Raises:
        ZooError: no pass runs, and one that is over leaves nothing on the part.
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
    """Begin a pass where a `with` block is impossible: in a pre-hook of a module, whose forward hook calls `end`."""
    now = Pass()
    now.token = _set(now)
    return now


def end(now: Pass) -> None:
    """End a pass that `begin` began; others are not changed."""
    if now.token is not None:
        _reset(now.token)
        now.token = None


def carried(function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a function that checkpointing runs, and recomputes in backward, so that it finds the current pass each time.

    Autograd recomputes in a thread of its own, whose context variables are not those of the forward pass.
    """
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
    """Return what adapters made of the images at the beginning of a cache."""
    return getattr(cache, _CONDITIONS, None) or {}


def put_conditions(cache: Any, conditions: dict[str, Any]) -> None:
    """Keep what adapters made of the images on their cache, for the passes that continue it."""
    if conditions and hasattr(cache, "__dict__"):  # the cache may come back in another `generate`, or another thread
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
