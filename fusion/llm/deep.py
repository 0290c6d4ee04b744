"""Features of images for several layers of an LLM, added by hooks: DeepStack, arXiv:2406.04334, as in Qwen3-VL.

A map k of features is added to the output of layer k at the columns of image tokens, in the pass over the prompt alone.
Maps and columns are in the pass (`zoo.registry.forward_pass`), so tokens that a pruner drops between the layers take
theirs along, and a pass without images, or one that decodes, adds nothing.
"""

from functools import partial
from typing import Any, NamedTuple

from torch import Tensor, nn

from zoo.registry import ZooError
from zoo.registry.forward_pass import Pass, current


class DeepFeatures(NamedTuple):
    """What a pass adds behind the first layers of its LLM."""

    columns: Tensor  # (B, T) image token of each column, counted over the batch, -1 for text
    maps: tuple[Tensor, ...]  # (S, C) of each layer


def take_deep(llm: Any, count: int) -> None:
    """Let the first `count` layers add the features of a pass to their output.

    Raises:
        ZooError: the LLM has fewer layers.
    """
    if count > llm.num_layers:
        raise ZooError(f"the encoder gives features for {count} layers of the LLM, which has {llm.num_layers}")
    for number in range(count):
        llm.layers[number].register_forward_hook(partial(_add, number))


def _add(number: int, layer: nn.Module, args: Any, out: Any) -> Any:
    now = current()
    deep: DeepFeatures | None = getattr(now.sequence, "deep", None) if now is not None else None
    if now is None or deep is None or number >= len(deep.maps):
        return None
    hidden = out[0] if isinstance(out, tuple) else out
    index = _columns_left(now, number, deep.columns).to(hidden.device)
    if index.shape != hidden.shape[:2]:
        raise ZooError(f"Features for layer {number} of {list(index.shape)} columns; it has {list(hidden.shape[:2])}.")
    rows = deep.maps[number].to(hidden)[index.clamp(min=0)]
    hidden = hidden + rows.masked_fill((index < 0).unsqueeze(-1), 0)
    return (hidden, *out[1:]) if isinstance(out, tuple) else hidden


def _columns_left(now: Pass, number: int, index: Tensor) -> Tensor:
    """Follow the columns that a pruner inside the LLM left in a layer: (B, K)."""
    if now.dropped is None or now.dropped.past:
        return index
    tokens = now.dropped.layers[number]
    if len(tokens.column) != len(index):  # beams, whose rows were described before they were repeated
        index = index.repeat_interleave(len(tokens.column) // len(index), 0)
    return index.gather(1, tokens.column).masked_fill(~tokens.seen, -1)
