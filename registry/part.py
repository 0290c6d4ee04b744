"""What the base classes of all kinds of parts have in common: capabilities, and attributes with a derived default.

Capabilities are plain words. A part `needs` some, `provides` some and `destroys` some (an adapter may also list in
`excludes` those that must not hold); the check goes through the slots in the order vision -> pruner -> projector ->
layout -> llm -> adapter and keeps the set of those that hold. In use:

    grid            tokens fill an (h, w) grid row by row        given by encoders, destroyed by dropping tokens
    cls_attention   the [CLS] row of one layer's attention       given by encoders that have a [CLS] token
    key_attention   attention that each patch receives           given by encoders whose scores are plain q.k
    pooling_head    the row of a learnt pooling head             given by SigLIP with `pooling_head=true`
    summary         the output of that head, one for each row    given by SigLIP with `summary=true`
    next_block      row of [CLS] and keys of the block behind    given by encoders with `next_block=true`
    keys            keys of the layer's attention                given by encoders whose scores are plain q.k
    text_tower      patches and texts as vectors of one space    given by CLIP and SigLIP that have their text tower
    prefix_tokens   [CLS] and register tokens of the layer       given by encoders that have them
    projected       tokens behind the projector, to compare      given to pruners where it makes one token of one
    question        what the prompt asks about its images        given to every part that gets features of images
    image_tokens    images are tokens of the LLM's sequence      given by projectors
    moe             the LLM's feed-forward layers are experts    given by some LLMs
    dense           they are not                                 given by the others

`cls_attention` and `key_attention` are those of the block that made the features. `key_attention@9` is that of block 9,
counted from 1 as in `hidden_states` of transformers; it holds where `key_attention` does, for each block that runs.
"""

from __future__ import annotations

from abc import ABCMeta
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from zoo.registry.errors import ZooError
from zoo.registry.presets import Preset

if TYPE_CHECKING:
    from torch.nn import Module
else:
    Module = object  # a component derives from `nn.Module` itself: nothing here imports torch


OF_BLOCKS = ("cls_attention", "key_attention")  # words that may name a block


def base_of(word: str) -> str:
    """The capability without its block: key_attention of key_attention@9."""
    return word.partition("@")[0]


def block_of(word: str) -> int | None:
    """The block that a capability names: 9 of key_attention@9; None: it names no block.

    Raises:
        ZooError: the capability is not given by block, or the block is not a whole number.
    """
    base, at, block = word.partition("@")
    if not at:
        return None
    if base not in OF_BLOCKS or not block.isdecimal():
        raise ZooError(
            f"The capability {word!r} is unknown: {' and '.join(OF_BLOCKS)} may name a block, by a whole number, as in "
            "key_attention@9."
        )
    return int(block)


class derived:  # used as a decorator, as `property` is
    """A default computed from other attributes; unlike a property, an instance may set its own value."""

    def __init__(self, function: Callable[[Any], Any]) -> None:
        self.function, self.__doc__ = function, function.__doc__

    def __get__(self, part: Any, owner: type | None = None) -> Any:
        return self if part is None else self.function(part)


# Not a child of ABC: FSDP gives a sharded module another class, which Python refuses where the two have unlike bases.
class Part(metaclass=ABCMeta):  # noqa: B024  # each kind has its own abstract methods
    """What parts of all kinds declare: as class attributes, or in `__init__` where options decide."""

    needs: frozenset[str] = frozenset()
    """Capabilities that must hold in front of the part."""
    provides: frozenset[str] = frozenset()
    """Capabilities that hold behind it."""
    destroys: frozenset[str] = frozenset()
    """Capabilities that no longer hold behind it."""
    choices: Mapping[str, Sequence[Any]] = {}
    """Option -> values that the check may suggest in place of one that does not fit. A class attribute."""
    presets: Mapping[str, Preset] = {}
    """Name -> values of options, such as the authors' for one model. A class attribute."""


class ModelPart(Part, Module):
    """A part that is a module of the composed model: all kinds but distillers, data sets and tasks."""

    skips_weights: bool | None = None
    """Whether a pass may leave weights of it that train without a gradient: a layer that is dropped, an expert without
    tokens. Several processes then search for them in each pass. None: not declared, and they search in parts of
    plug-ins."""
