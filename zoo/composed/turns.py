"""A lock per model, for parts that keep state of a pass on themselves: threads that share the model then take turns.

The zoo's own parts keep that state in the pass (`zoo.registry.forward_pass`), and no thread waits. An adapter or a
pruner inside the LLM from a plug-in is assumed to need the lock, unless it sets `concurrent = True`.
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
    """Return the context of a pass of `model`, or of a whole generation: the model's lock, or nothing.

    Args:
        model: that owns the lock.
        parts: its parts that act inside the LLM.
    """
    if all(part.concurrent for part in parts):
        return nullcontext()
    with _MAKING:
        return _LOCKS.setdefault(model, RLock())
