"""Turns: threads that share a model wait for each other where a part of it keeps what it knows of a pass on itself.

The parts that come with the zoo keep it in the pass (`zoo.registry.forward_pass`), and no thread waits. An adapter or
a pruner inside the LLM that comes from elsewhere is taken to be of the other kind, unless it says `concurrent = True`.
"""

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from threading import RLock
from typing import Any
from weakref import WeakKeyDictionary

from zoo.registry import Adapter, Pruner

_LOCKS: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()  # beside the models: a lock cannot be copied along
_MAKING = RLock()


def turn_of(model: Any, parts: Iterable[Adapter | Pruner]) -> AbstractContextManager[Any]:
    """Give what a pass of `model`, or a whole generation, runs within: the model's lock, or nothing.

    Args:
        model: the lock is the model's.
        parts: of it, that act inside the LLM.
    """
    if all(part.concurrent for part in parts):
        return nullcontext()
    with _MAKING:
        return _LOCKS.setdefault(model, RLock())
