"""What the base classes of all kinds of parts have in common: capabilities, and attributes whose default follows.

Capabilities are plain words. A part `needs` some, `provides` some and `destroys` some (an adapter may also say in
`excludes` which must not hold); the check walks the slots in the order vision -> pruner -> projector -> layout -> llm
-> adapter and keeps the set of those that hold. In use:

    grid            tokens fill an (h, w) grid row by row        given by encoders, destroyed by dropping tokens
    cls_attention   the [CLS] row of one layer's attention       given by encoders that have a [CLS] token
    key_attention   how much each patch is looked at             given by encoders whose scores are q.k and no more
    pooling_head    the row of a learnt pooling head             given by SigLIP with `pooling_head=true`
    keys            keys of the layer's attention                given by encoders whose scores are q.k and no more
    prefix_tokens   [CLS] and register tokens of the layer       given by encoders that have them
    image_tokens    images stand in the LLM's sequence           given by projectors
    moe             the LLM's feed-forward layers are experts    given by some LLMs
    dense           they are not                                 given by the others
"""

from __future__ import annotations

from abc import ABCMeta
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch.nn import Module
else:
    Module = object  # a component derives from `nn.Module` itself: nothing here imports torch


class derived:  # used as a decorator, as `property` is
    """The default of an attribute that follows from others; unlike a property, an instance may set its own."""

    def __init__(self, function: Callable[[Any], Any]) -> None:
        self.function, self.__doc__ = function, function.__doc__

    def __get__(self, part: Any, owner: type | None = None) -> Any:
        return self if part is None else self.function(part)


# Not a child of ABC: FSDP gives a sharded module another class, which Python refuses where the two have unlike bases.
class Part(metaclass=ABCMeta):  # noqa: B024  # each kind has its own abstract methods
    """What parts of all kinds say of themselves: class attributes, or set in `__init__` where options decide."""

    needs: frozenset[str] = frozenset()
    """Capabilities that must hold where the part stands."""
    provides: frozenset[str] = frozenset()
    """Capabilities that hold behind it."""
    destroys: frozenset[str] = frozenset()
    """Capabilities that no longer hold behind it."""
    choices: Mapping[str, Sequence[Any]] = {}
    """Option -> values that the check may offer in place of one that does not fit. Of the class."""


class ModelPart(Part, Module):
    """A part that is a module of the composed model: of all kinds but distillers, data sets and tasks."""
